"""The optimizer's state shared out among processes: each keeps the state of some parameters and updates these.

ZeRO stage 1 (Rajbhandari et al. 2020, arXiv 1910.02054, section 5.1), parameter by parameter: gradients are summed over
all processes as always, every process updates the parameters that it owns, and sends them to the others. An update
looks at nothing but its own parameter, so the results are those of the whole state, to the bit, for every optimizer
that skips parameters without a gradient, as torch's do.

Who owns what goes by the parameter's place in the optimizer, not by its name or size: a growth of ranks replaces
parameters in their places, and their state stays where it is.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from rankwise import distributed
from rankwise.train.optim import optimizer_state, trained_parameters

_OWNERS: WeakKeyDictionary[torch.optim.Optimizer, list[int]] = WeakKeyDictionary()
"""For an optimizer whose state is shared out, the process that owns each of `trained_parameters`."""


def share_state(optimizer: torch.optim.Optimizer) -> None:
    """From now on each process keeps and updates its share only. At world size 1 nothing changes."""
    if distributed.world_size() == 1:
        return
    sizes = [parameter.numel() for parameter in trained_parameters(optimizer)]
    _OWNERS[optimizer] = deal_out(sizes, distributed.world_size())
    optimizer.register_step_pre_hook(_leave_others)
    optimizer.register_step_post_hook(_exchange)


def deal_out(sizes: list[int], num_processes: int) -> list[int]:
    """The owner of each of so many entries: the largest first, each to the process that has the least so far."""
    loads = [0] * num_processes
    owners = [0] * len(sizes)
    for place in sorted(range(len(sizes)), key=lambda i: (-sizes[i], i)):
        owner = loads.index(min(loads))
        owners[place] = owner
        loads[owner] += sizes[place]
    return owners


def is_shared(optimizer: torch.optim.Optimizer) -> bool:
    """Whether this process holds only a share of the optimizer's state."""
    return optimizer in _OWNERS


def owned(optimizer: torch.optim.Optimizer, parameters: Mapping[str, nn.Parameter]) -> dict[str, nn.Parameter]:
    """Those of `parameters` whose state this process holds: all of them where the state is not shared."""
    if not is_shared(optimizer):
        return dict(parameters)
    mine = {id(parameter) for parameter in _of(optimizer, distributed.rank())}
    return {name: parameter for name, parameter in parameters.items() if id(parameter) in mine}


def whole_state(optimizer: torch.optim.Optimizer, parameters: Mapping[str, nn.Parameter]) -> dict[str, Tensor]:
    """`optimizer_state` of all processes as one, on the first; nothing on the others. All must call it."""
    if not is_shared(optimizer):
        return optimizer_state(optimizer, parameters) if distributed.is_first() else {}
    shares = distributed.gathered_at_first(optimizer_state(optimizer, owned(optimizer, parameters)))
    return {name: tensor for share in shares or () for name, tensor in share.items()}


def _of(optimizer: torch.optim.Optimizer, process: int) -> list[nn.Parameter]:
    pairs = zip(trained_parameters(optimizer), _OWNERS[optimizer], strict=True)
    return [parameter for parameter, owner in pairs if owner == process]


def _leave_others(optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
    for parameter, owner in zip(trained_parameters(optimizer), _OWNERS[optimizer], strict=True):
        if owner != distributed.rank():
            parameter.grad = None  # the optimizer passes it by


def _exchange(optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
    for process in range(distributed.world_size()):
        distributed.broadcast_from(process, _of(optimizer, process))
