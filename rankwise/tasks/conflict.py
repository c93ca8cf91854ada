"""Conflict of tasks: the cosine of their gradients in each adapted layer, over time.

Two tasks conflict in a layer where their gradients point apart: cos(g_a, g_b) < 0 (Yu et al. 2020, "Gradient surgery
for multi-task learning", arXiv 2001.06782, definition 1). There a step for one undoes a step for the other, and an
adapter for each is worth its parameters. g_t is the gradient of task t's mean loss with respect to the adapter's
parameters of that layer, all tasks at the same parameters: those that they share, see `rankwise.recipes.task_conflict`.

Legend: T tasks, P = T (T - 1) / 2 pairs of them, in the order (0, 1), (0, 2), ..., (1, 2), ...
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any

import torch
from torch import Tensor

DIGITS = 4
"""Cosines are written with so many."""


@dataclass(frozen=True)
class Conflict:
    """One measurement: for each layer the cosines of all pairs of `tasks`; None for a task that moves nothing there."""

    step: int
    tasks: tuple[str, ...]
    modules: dict[str, list[float | None]]

    @property
    def pairs(self) -> list[tuple[str, str]]:
        """The pairs of tasks, in the order of the cosines."""
        return list(combinations(self.tasks, 2))

    def to_dict(self) -> dict[str, Any]:
        """As a line of conflict.jsonl."""
        return {"step": self.step, "tasks": list(self.tasks), "modules": self.modules}

    @staticmethod
    def from_dict(line: Mapping[str, Any]) -> Conflict:
        """What `to_dict` gave. Raises: KeyError, TypeError or ValueError for anything else."""
        tasks = tuple(str(name) for name in line["tasks"])
        num_pairs = len(tasks) * (len(tasks) - 1) // 2
        modules: dict[str, list[float | None]] = {}
        for name, values in line["modules"].items():
            if len(values) != num_pairs:
                raise ValueError(f"'{name}' has {len(values)} cosines for {num_pairs} pairs of tasks")
            modules[str(name)] = [None if value is None else float(value) for value in values]
        return Conflict(int(line["step"]), tasks, modules)


def cosines(gradients: Sequence[Sequence[Tensor]]) -> list[float | None]:
    """cos(g_a, g_b) of all pairs of tasks in one layer, each gradient given as its parts; None where one is zero."""
    flat = [torch.cat([part.detach().flatten().double() for part in parts]) for parts in gradients]
    norms = [float(torch.linalg.vector_norm(one)) for one in flat]
    return [
        round(float(flat[a] @ flat[b]) / (norms[a] * norms[b]), DIGITS) if norms[a] and norms[b] else None
        for a, b in combinations(range(len(flat)), 2)
    ]


@dataclass(frozen=True)
class Apart:
    """A layer and the two tasks that are furthest apart there. `cosine`: of these, the mean over the measurements."""

    module: str
    cosine: float
    tasks: tuple[str, str]


def furthest(measurements: Sequence[Conflict]) -> list[Apart]:
    """The pair of tasks that is furthest apart in each layer, over all measurements; the worst layer first.

    Layers in which no pair could be compared are left out. All measurements are of the same tasks.
    """
    found: dict[str, list[list[float]]] = {}
    pairs = measurements[0].pairs if measurements else []
    for one in measurements:
        assert one.pairs == pairs, "measurements of other tasks"
        for module, values in one.modules.items():
            lists = found.setdefault(module, [[] for _ in pairs])
            for place, value in enumerate(values):
                if value is not None:
                    lists[place].append(value)
    apart: list[Apart] = []
    for module, lists in found.items():
        means = [(sum(values) / len(values), pair) for values, pair in zip(lists, pairs, strict=True) if values]
        if means:
            cosine, pair = min(means)
            apart.append(Apart(module, cosine, pair))
    return sorted(apart, key=lambda one: (one.cosine, one.module))


def isolated(apart: Sequence[Apart], below: float) -> list[str]:
    """The layers to give each task an adapter of its own: those with a pair whose cosine is less than `below`."""
    return [one.module for one in apart if one.cosine < below]
