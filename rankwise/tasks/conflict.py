"""Conflict of tasks: the cosine of their gradients in each adapted layer, over time, and how much of it is noise.

Two tasks conflict in a layer where their gradients point apart: cos(g_a, g_b) < 0 (Yu et al. 2020, "Gradient surgery
for multi-task learning", arXiv 2001.06782, definition 1). There a step for one undoes a step for the other, and an
adapter for each is worth its parameters. g_t is the gradient of task t's mean loss with respect to the adapter's
parameters of that layer, all tasks at the same parameters: those that they share, see `rankwise.recipes.task_conflict`.

A gradient of few rows is mostly noise, whose cosines are near 0 on either side. The yardstick is the task itself: its
rows are two batches, and cos(g_t1, g_t2), its `own` cosine, is what no other task can be expected to reach. A conflict
is `clear` where every batch of one task points apart from every batch of the other, and each task agrees with itself.

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
class Cosines:
    """Of one layer; None where a gradient is zero.

    Args:
        between: of all pairs of tasks, each task's gradient that of all its rows.
        highest: of all pairs, the highest cosine of a batch of the one and a batch of the other.
        own: of each task, that of its two batches.
    """

    between: list[float | None]
    highest: list[float | None]
    own: list[float | None]


@dataclass(frozen=True)
class Conflict:
    """One measurement, by layer."""

    step: int
    tasks: tuple[str, ...]
    modules: dict[str, Cosines]

    @property
    def pairs(self) -> list[tuple[str, str]]:
        """The pairs of tasks, in the order of the cosines."""
        return list(combinations(self.tasks, 2))

    def to_dict(self) -> dict[str, Any]:
        """As a line of conflict.jsonl."""
        kinds = {"modules": "between", "highest": "highest", "own": "own"}
        by_kind = {
            key: {name: getattr(found, field) for name, found in self.modules.items()} for key, field in kinds.items()
        }
        return {"step": self.step, "tasks": list(self.tasks), **by_kind}

    @staticmethod
    def from_dict(line: Mapping[str, Any]) -> Conflict:
        """What `to_dict` gave. Raises: KeyError, TypeError or ValueError for anything else."""
        tasks = tuple(str(name) for name in line["tasks"])
        num_pairs = len(tasks) * (len(tasks) - 1) // 2

        def numbers(key: str, name: str, count: int) -> list[float | None]:
            values = line[key][name]
            if len(values) != count:
                raise ValueError(f"'{name}' has {len(values)} cosines for {count} ({key})")
            return [None if value is None else float(value) for value in values]

        modules = {
            str(name): Cosines(
                numbers("modules", name, num_pairs),
                numbers("highest", name, num_pairs),
                numbers("own", name, len(tasks)),
            )
            for name in line["modules"]
        }
        return Conflict(int(line["step"]), tasks, modules)


def cosines(batches: Sequence[tuple[Sequence[Tensor], Sequence[Tensor]]]) -> Cosines:
    """Those of one layer. `batches`: for each task the gradients of its two batches, each given as its parts."""
    flat = [[torch.cat([part.detach().flatten().double() for part in parts]) for parts in pair] for pair in batches]
    sums = [first + second for first, second in flat]
    pairs = list(combinations(range(len(flat)), 2))
    crossed = [[_cosine(one, other) for one in flat[a] for other in flat[b]] for a, b in pairs]
    return Cosines(
        [_cosine(sums[a], sums[b]) for a, b in pairs],
        [max((value for value in values if value is not None), default=None) for values in crossed],
        [_cosine(first, second) for first, second in flat],
    )


def _cosine(one: Tensor, other: Tensor) -> float | None:
    norms = float(torch.linalg.vector_norm(one)) * float(torch.linalg.vector_norm(other))
    return round(float(one @ other) / norms, DIGITS) if norms else None


@dataclass(frozen=True)
class Apart:
    """Two tasks in a layer, by the means over the measurements: their cosine, the highest of two batches, their own."""

    module: str
    cosine: float
    tasks: tuple[str, str]
    highest: float | None
    own: tuple[float | None, float | None]

    def is_clear(self, below: float) -> bool:
        """Whether the conflict is more than noise: no two batches reach `below`, and each task agrees with itself, and
        more so than any batch of the one with a batch of the other.
        """
        if self.highest is None or None in self.own:
            return False
        least = min(value for value in self.own if value is not None)
        return self.highest < below and least > max(self.highest, 0.0)


def pairs_by_layer(measurements: Sequence[Conflict]) -> dict[str, list[Apart]]:
    """All pairs of tasks in each layer, over all measurements, which are of the same tasks.

    Pairs that could not be compared are left out.
    """
    every = measurements[0].pairs if measurements else []
    tasks = measurements[0].tasks if measurements else ()
    found: dict[str, list[Apart]] = {}
    for name in dict.fromkeys(name for one in measurements for name in one.modules):
        assert all(one.pairs == every for one in measurements), "measurements of other tasks"
        here = [one.modules[name] for one in measurements if name in one.modules]
        own = {task: _mean([layer.own[place] for layer in here]) for place, task in enumerate(tasks)}
        for place, (a, b) in enumerate(every):
            cosine = _mean([layer.between[place] for layer in here])
            if cosine is not None:
                highest = _mean([layer.highest[place] for layer in here])
                found.setdefault(name, []).append(Apart(name, cosine, (a, b), highest, (own[a], own[b])))
    return found


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None


def furthest(measurements: Sequence[Conflict]) -> list[Apart]:
    """The pair of tasks that is furthest apart in each layer, over all measurements; the worst layer first.

    Layers in which no pair could be compared are left out. All measurements are of the same tasks.
    """
    worst = [min(pairs, key=lambda one: one.cosine) for pairs in pairs_by_layer(measurements).values()]
    return sorted(worst, key=lambda one: (one.cosine, one.module))


def isolated(measurements: Sequence[Conflict], below: float) -> list[str]:
    """The layers to give each task an adapter of its own, the worst first: those with a pair in clear conflict."""
    by_layer = pairs_by_layer(measurements)
    return [one.module for one in furthest(measurements) if any(pair.is_clear(below) for pair in by_layer[one.module])]
