"""Which optimizers there are, and the parameter groups that they get: rates and weight decay by what a parameter is.

`adamw`        AdamW (Loshchilov and Hutter 2019, arXiv 1711.05101) from torch: 8 bytes of state a parameter.
`adamw-fused`  the same in one kernel for all parameters.
`adamw-8bit`   moments in 8 bits, in blocks of 256 with a scale each (Dettmers et al. 2022, arXiv 2110.02861, section
               2), from bitsandbytes: about 2 bytes a parameter. Tensors of fewer than 4,096 entries keep 32 bits.

LoRA+ (Hayou et al. 2024, arXiv 2402.12354, section 4): B learns at `ratio` times the rate of A, since with one rate for
both, features learn too slowly in wide models.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Mapping
from typing import Any

import torch
from torch import nn

from rankwise.errors import RequestError

MATRIX_DIMENSIONS = 2
"""Parameters with at least so many dimensions decay; biases and magnitudes do not."""

LR_RATIO = "lr_ratio"
"""The key under which a group holds what its learning rate is multiplied with."""

QUANTISED_DEVICES = ("cpu", "cuda", "xpu")
"""Where bitsandbytes has kernels for 8-bit moments."""

Groups = list[dict[str, Any]]
Builder = Callable[[Groups, float, tuple[float, float]], torch.optim.Optimizer]


def parameter_groups(
    parameters: Mapping[str, nn.Parameter], weight_decay: float, faster: Collection[str] = (), ratio: float = 1.0
) -> Groups:
    """Groups in a stable order: matrices decay, others don't; those named in `faster` learn at `ratio` times the rate.

    A parameter that replaces another (a growth of ranks) takes its place in its group.
    """
    groups: dict[tuple[float, float], list[nn.Parameter]] = {}
    for name, parameter in parameters.items():
        decay = weight_decay if parameter.ndim >= MATRIX_DIMENSIONS else 0.0
        groups.setdefault((decay, ratio if name in faster else 1.0), []).append(parameter)
    return [{"params": members, "weight_decay": d, LR_RATIO: r} for (d, r), members in groups.items()]


def set_learning_rate(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """Gives every parameter group the rate `lr`, times the group's own ratio."""
    for group in optimizer.param_groups:
        group["lr"] = lr * group.get(LR_RATIO, 1.0)


def make_optimizer(
    parameters: Mapping[str, nn.Parameter],
    lr: float,
    betas: tuple[float, float],
    weight_decay: float,
    name: str = "adamw",
    faster: Collection[str] = (),
    ratio: float = 1.0,
) -> torch.optim.Optimizer:
    """The optimizer `name` over `parameters`; those named in `faster` learn at `ratio` times `lr`.

    Raises: RequestError for a package that is not installed, or a device that the optimizer does not run on.
    """
    assert parameters, "nothing to train"
    if name == "adamw-8bit":
        _check_device(next(iter(parameters.values())).device)
    optimizer = OPTIMIZERS[name](parameter_groups(parameters, weight_decay, faster, ratio), lr, betas)
    set_learning_rate(optimizer, lr)
    return optimizer


def _adamw(groups: Groups, lr: float, betas: tuple[float, float]) -> torch.optim.Optimizer:
    return torch.optim.AdamW(groups, lr=lr, betas=betas)


def _fused_adamw(groups: Groups, lr: float, betas: tuple[float, float]) -> torch.optim.Optimizer:
    return torch.optim.AdamW(groups, lr=lr, betas=betas, fused=True)


def _adamw_8bit(groups: Groups, lr: float, betas: tuple[float, float]) -> torch.optim.Optimizer:
    notices = logging.getLogger("bitsandbytes")
    level = notices.level
    notices.setLevel(logging.ERROR)  # it warns of optional kernels that nothing here uses
    try:
        import bitsandbytes
    except ImportError:
        raise RequestError(
            "train.optimizer: adamw-8bit needs the package bitsandbytes; pip install 'rankwise[quantized]', "
            "or use adamw"
        ) from None
    finally:
        notices.setLevel(level)
    return bitsandbytes.optim.AdamW8bit(groups, lr=lr, betas=betas)


def _check_device(device: torch.device) -> None:
    if device.type not in QUANTISED_DEVICES:
        raise RequestError(
            f"train.optimizer: adamw-8bit runs on {', '.join(QUANTISED_DEVICES)}, not on {device.type}; use adamw"
        )


OPTIMIZERS: dict[str, Builder] = {
    "adamw": _adamw,
    "adamw-fused": _fused_adamw,
    "adamw-8bit": _adamw_8bit,
}
"""Every name that `train.optimizer` takes (`config.OPTIMIZERS` lists them without torch)."""
