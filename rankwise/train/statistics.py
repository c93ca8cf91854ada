"""Norms of gradients and weights while a run trains, by part of the adapter: which half of it, kind of layer, depth.

What is idle, vanishes with depth or explodes shows here first. Taken before clipping; nothing is changed.
"""

from __future__ import annotations

import math
import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence

import torch
from torch import Tensor, nn

Norms = dict[str, dict[str, float]]
"""`grad_norm` and `weight_norm`, each from a part's name to the Euclidean norm over all its entries."""

FACTORS = {"lora_A": "A", "lora_B": "B"}

_DEPTH = re.compile(r"\.(\d+)\.")


def parts_of(name: str) -> list[str]:
    """The parts that a parameter counts to: `A` of `layer 3` in a `q_proj`.

    A parameter that is neither A nor B (a magnitude, a bias, a module trained whole) counts by its own name.
    """
    module, _, factor = re.sub(r"\.\d+$", "", name).rpartition(".")  # a gate numbers its adapters
    depth = _DEPTH.search(name)
    parts = [FACTORS.get(factor, factor), module.rpartition(".")[2]]
    return [part for part in parts if part] + ([f"layer {depth[1]}"] if depth else [])


def norms(parameters: Mapping[str, nn.Parameter]) -> Norms:
    """Of the parameters, by their names in the model, and of their gradients, as they are now; read all at once."""
    trained = {name: parameter for name, parameter in parameters.items() if parameter.grad is not None}
    gradients = [parameter.grad for parameter in trained.values() if parameter.grad is not None]
    weights = [parameter.detach() for parameter in trained.values()]
    found = _norms([*gradients, *weights])
    return {
        "grad_norm": _by_part(trained, found[: len(trained)]),
        "weight_norm": _by_part(trained, found[len(trained) :]),
    }


def _norms(tensors: Sequence[Tensor]) -> list[float]:
    if not tensors:
        return []
    return torch.stack([norm.float() for norm in torch._foreach_norm(list(tensors))]).tolist()


def _by_part(names: Iterable[str], values: Sequence[float]) -> dict[str, float]:
    squares: dict[str, float] = defaultdict(float)
    for name, value in zip(names, values, strict=True):
        for part in parts_of(name):
            squares[part] += value * value
    return {part: math.sqrt(total) for part, total in squares.items()}


Measure = Callable[[], Norms]
"""Called when a step's gradients are there."""
