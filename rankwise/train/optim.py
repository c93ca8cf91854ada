"""The optimizer, its state by parameter name, and the learning rate as a pure function of the step.

AdamW (Loshchilov and Hutter 2019, arXiv 1711.05101) from torch, over the adapter's fp32 parameters only. State goes by
names, never by position, so that a checkpoint does not depend on the order of parameter groups.
"""

from __future__ import annotations

import math
from collections.abc import Container, Mapping

import torch
from torch import Tensor, nn

from rankwise.errors import WorkError

MATRIX_DIMENSIONS = 2
"""Parameters with at least so many dimensions decay; biases and magnitudes do not."""


def make_optimizer(
    parameters: Mapping[str, nn.Parameter], lr: float, betas: tuple[float, float], weight_decay: float
) -> torch.optim.AdamW:
    """AdamW over `parameters`, in two groups: matrices with `weight_decay`, everything else without."""
    assert parameters, "nothing to train"
    matrices = [p for p in parameters.values() if p.ndim >= MATRIX_DIMENSIONS]
    others = [p for p in parameters.values() if p.ndim < MATRIX_DIMENSIONS]
    groups = [
        {"params": group, "weight_decay": decay} for group, decay in ((matrices, weight_decay), (others, 0.0)) if group
    ]
    return torch.optim.AdamW(groups, lr=lr, betas=betas)


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


def set_learning_rate(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """Gives every parameter group the rate `lr`."""
    for group in optimizer.param_groups:
        group["lr"] = lr


def trained_parameters(optimizer: torch.optim.Optimizer) -> list[nn.Parameter]:
    """What the optimizer updates now (a growth of ranks replaces parameters, so nobody keeps a list of their own)."""
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]


def optimizer_state(optimizer: torch.optim.Optimizer, parameters: Mapping[str, nn.Parameter]) -> dict[str, Tensor]:
    """Every state tensor as `<parameter name>/<state name>`, on the CPU; nothing for a parameter never updated."""
    state: dict[str, Tensor] = {}
    for name, parameter in parameters.items():
        for key, value in optimizer.state.get(parameter, {}).items():
            assert isinstance(value, Tensor), f"optimizer state '{key}' is not a tensor"
            state[f"{name}/{key}"] = value.detach().cpu()
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
    for full_name, value in state.items():
        name, _, key = full_name.rpartition("/")
        parameter = parameters.get(name)
        if parameter is None:
            raise WorkError(f"the checkpoint holds optimizer state for '{name}', which this run does not train")
        if value.ndim and value.shape != parameter.shape:
            raise WorkError(
                f"the checkpoint's optimizer state '{full_name}' has shape {list(value.shape)}, "
                f"the parameter {list(parameter.shape)}"
            )
        if kept is not None and name not in kept:
            continue
        # torch keeps the step count on the CPU, and the moments beside the parameter
        placed = value.clone() if value.ndim == 0 else value.to(parameter.device, parameter.dtype, copy=True)
        optimizer.state[parameter][key] = placed
