"""A frozen base spread over all processes: each keeps its share of every block, and borrows the rest while it computes.

PyTorch's FSDP2 (`fully_shard`; Zhao et al. 2023, arXiv 2304.11277, after ZeRO-3, Rajbhandari et al. 2020, arXiv
1910.02054) on each block and on what is around the blocks. What is trained stays whole on every process: adapters are
small, may grow while they train, and are summed by the loop once a step.

Every forward and backward pass is then a matter of all processes: one that leaves a pass out keeps the others waiting.

A head that is read without the model's own forward (`rankwise.models.loss` never forms the logits of a batch) would be
found in pieces: the root's parameters are whole only inside its forward. `inside_forward` makes any function such a
forward.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TypeVar

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard, register_fsdp_forward_method
from transformers import PreTrainedModel

from rankwise import distributed
from rankwise.adapters.base import AdapterLayer
from rankwise.errors import RequestError

METHOD = "rankwise_inside_forward"
"""Name under which a sharded model offers its forward's surroundings to other functions."""

T = TypeVar("T")


def shard(model: PreTrainedModel, whole: Iterable[Tensor], device: torch.device, num_shares: int) -> None:
    """Cuts the model's parameters into shares, in place, except for those in `whole`; all go to `device`.

    With as many shares as processes each holds one. With fewer, so many neighbouring processes hold one copy together:
    the processes of a machine, whose exchange is fast. Copies never meet, for what is cut is frozen.

    The model may lie on the CPU before: block after block is moved, cut and let go, so that the device never holds more
    than one whole block beside the shares.

    Raises: RequestError when weights are not plain floating-point numbers (a quantised base), or blocks share some.
    """
    kept = {tensor for tensor in whole if isinstance(tensor, nn.Parameter)}
    _check_plain(model, kept)
    copies = distributed.world_size() // num_shares
    mesh = init_device_mesh(device.type, (copies, num_shares), mesh_dim_names=("copies", "shares"))["shares"]
    with torch.no_grad():
        for module in [*blocks(model), model]:
            fully_shard(module, mesh=mesh, ignored_params=kept)
        for parameter in kept:
            parameter.data = parameter.data.to(device)
        for owner in model.modules():
            for name, buffer in owner._buffers.items():
                if buffer is not None:
                    owner._buffers[name] = buffer.to(device)
    for module in model.modules():
        if isinstance(module, AdapterLayer):
            module.borrows_base = True
    object.__setattr__(model, METHOD, _call)
    register_fsdp_forward_method(model, METHOD)
    model.eval()


def _call(function: Callable[[], T]) -> T:
    return function()


def is_sharded(model: nn.Module) -> bool:
    """Whether the model's parameters are spread over processes."""
    return isinstance(model, FSDPModule)


def inside_forward(model: nn.Module, function: Callable[[], T]) -> T:
    """What `function` gives, run where the model's parameters are whole. Plain models just run it.

    Gradients pass through the tensors that it returns. One such call may not lie within another.
    """
    if not is_sharded(model):
        return function()
    return getattr(model, METHOD)(function)


def blocks(model: nn.Module) -> list[nn.Module]:
    """The repeated parts of a transformer: all members of its outermost module lists."""
    found: list[nn.Module] = []

    def look(module: nn.Module) -> None:
        for child in module.children():
            if isinstance(child, nn.ModuleList):
                found.extend(child)
            else:
                look(child)

    look(model)
    return list(dict.fromkeys(found))


def _check_plain(model: nn.Module, kept: set[nn.Parameter]) -> None:
    for name, parameter in model.named_parameters():
        if parameter not in kept and not (parameter.is_floating_point() and type(parameter) is nn.Parameter):
            raise RequestError(
                f"train.sharding can't cut '{name}' ({type(parameter).__name__}, {parameter.dtype}): only plain "
                "floating-point weights can be spread over processes; set train.sharding=none, where each process "
                "holds the whole quantised base"
            )
    parts = blocks(model)
    inside = {module for block in parts for module in block.modules()}
    owners = [(parameter, block) for block in parts for parameter in block.parameters()]
    owners += [
        (p, model)
        for module in model.modules()
        if module not in inside
        for p in module._parameters.values()
        if p is not None
    ]
    first: dict[nn.Parameter, nn.Module] = {}
    for parameter, owner in owners:
        if first.setdefault(parameter, owner) is not owner and parameter not in kept:
            name = next(name for name, other in model.named_parameters() if other is parameter)
            raise RequestError(
                f"train.sharding cuts a model block by block, and '{name}' is shared between blocks of "
                f"{type(model).__name__}; set train.sharding=none"
            )
