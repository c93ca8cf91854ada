"""An optimizer's state by parameter name, and the learning rate as a pure function of the step.

State goes by names, never by position, so that a checkpoint does not depend on the order of parameter groups.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Container, Mapping

import torch
from torch import Tensor, nn

from rankwise.errors import WorkError

COUNT = torch.int64
"""The dtype in which whole numbers are saved that an optimizer holds as such (bitsandbytes' step count)."""

BLOCK_ENTRIES = 256
"""Entries that share a scale in bitsandbytes' 8-bit state."""

_SHAPES: dict[str, Callable[[nn.Parameter], tuple[int, ...]]] = {
    **dict.fromkeys(("qmap1", "qmap2"), lambda parameter: (256,)),
    **dict.fromkeys(("absmax1", "absmax2"), lambda parameter: (-(-parameter.numel() // BLOCK_ENTRIES),)),
}
"""Shapes of state that has not its parameter's: the values that codes stand for, and the blocks' scales."""


def learning_rate(step: int, num_steps: int, lr: float, schedule: str, warmup_steps: int, floor: float = 0.0) -> float:
    """The rate of `step` (1 to num_steps).

    Grows linearly to `lr` at step `warmup_steps`; then stays (`constant`), or falls (`linear`, `cosine`) to
    `floor` * lr, which it would reach one step after the last: no step is wasted at a rate of 0.
    """
    assert 1 <= step <= num_steps, (step, num_steps)
    if step <= warmup_steps:
        return lr * step / warmup_steps
    progress = (step - max(warmup_steps, 1)) / (num_steps - max(warmup_steps, 1) + 1)
    match schedule:
        case "constant":
            return lr
        case "linear":
            return lr * (floor + (1 - floor) * (1 - progress))
        case "cosine":
            return lr * (floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * progress)))
    raise AssertionError(schedule)


def trained_parameters(optimizer: torch.optim.Optimizer) -> list[nn.Parameter]:
    """What the optimizer updates now (a growth of ranks replaces parameters, so nobody keeps a list of their own)."""
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]


def optimizer_state(optimizer: torch.optim.Optimizer, parameters: Mapping[str, nn.Parameter]) -> dict[str, Tensor]:
    """Every state tensor as `<parameter name>/<state name>`, on the CPU; nothing for a parameter never updated."""
    state: dict[str, Tensor] = {}
    for name, parameter in parameters.items():
        for key, value in optimizer.state.get(parameter, {}).items():
            whole = torch.tensor(value, dtype=COUNT) if isinstance(value, int) else value
            assert isinstance(whole, Tensor), f"optimizer state '{key}' is not a tensor"
            # all parameters share one map of codes, and a file holds no tensor twice
            state[f"{name}/{key}"] = whole.detach().cpu().clone() if key in _SHAPES else whole.detach().cpu()
    return state


def load_optimizer_state(
    optimizer: torch.optim.Optimizer,
    parameters: Mapping[str, nn.Parameter],
    state: Mapping[str, Tensor],
    kept: Container[str] | None = None,
) -> None:
    """Puts back what `optimizer_state` gave; with `kept`, only of the parameters in it (the others' is checked).

    Raises: WorkError when a name or a shape does not fit the parameters.
    """
    optimizer.state.clear()
    in_fused = {id(p) for group in optimizer.param_groups if group.get("fused") for p in group["params"]}
    fused = {name for name, parameter in parameters.items() if id(parameter) in in_fused}
    for full_name, value in state.items():
        name, _, key = full_name.rpartition("/")
        parameter = parameters.get(name)
        if parameter is None:
            raise WorkError(f"the checkpoint holds optimizer state for '{name}', which this run does not train")
        shape = _SHAPES[key](parameter) if key in _SHAPES else tuple(parameter.shape)
        if value.ndim and tuple(value.shape) != shape:
            raise WorkError(
                f"the checkpoint's optimizer state '{full_name}' has shape {list(value.shape)}, where the parameter's "
                f"{list(parameter.shape)} needs {list(shape)}"
            )
        if kept is None or name in kept:
            optimizer.state[parameter][key] = _placed(value, parameter, name in fused)


def _placed(value: Tensor, parameter: nn.Parameter, fused: bool) -> Tensor | int:
    """A state tensor where the optimizer expects it: numbers on the CPU (a fused kernel's beside the parameter)."""
    if value.ndim == 0 and value.dtype == COUNT:
        return int(value)
    if value.ndim == 0:
        return value.to(parameter.device if fused else "cpu", copy=True)
    moments = value.is_floating_point() and value.shape == parameter.shape
    return value.to(parameter.device, parameter.dtype if moments else value.dtype, copy=True)
