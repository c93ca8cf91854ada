"""Paired differences of losses: how large, how sure, and whether several of them in one table can be believed.

A method is compared with another one on the same examples, with the same seeds, on one or more tasks. With D the
difference of the losses, seeds and examples are both drawn from larger sets, and crossed: every seed meets every
example of a task. Means of D vary by the seed (start and order of rows), by the example, and by both together:

    D[t, s, e] = mean[t] + seed[s] + example[t, e] + rest[t, s, e]

The interval is a hierarchical bootstrap's: seeds are drawn with replacement, the same on every task, and examples
within each task (two crossed levels: Owen 2007, The pigeonhole bootstrap, arXiv 0712.1111). With 3 to 8 seeds its
percentiles are far too narrow, and it counts `rest` three times. So the draws of each level are scaled to that level's
unbiased variance (method of moments), those of seeds also by Student's t with S - 1 degrees of freedom over the normal.
Half of the interval is the 95 % quantile of the draws' size, and at least

    h(0.95)    with    h(level)^2 = t[S - 1, level]^2 V_seeds + t[E, level]^2 V_examples,

for draws of three seeds have few values and short tails. p is the level at which h, scaled alike, meets the mean. One t
for both (Satterthwaite's degrees of freedom) was tried first: with three seeds 12 % of its intervals missed, because a
small V_seeds by chance raises the degrees of freedom as well. Size and coverage: tests/bench/test_statistics.py.

Legend: T tasks, S seeds, E examples of a task, N draws.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from scipy.optimize import brentq
from scipy.stats import norm, t

NUM_DRAWS = 10_000
LEVEL = 0.95
CHUNK_DRAWS = 500
"""Draws at a time: memory."""

Array = np.ndarray
"""Of float64; [S, E] for the differences on one task."""


@dataclass(frozen=True)
class Interval:
    """A mean with its 95 % interval, and how likely so large a mean is where the true one is 0."""

    mean: float
    low: float
    high: float
    p: float

    @property
    def half(self) -> float:
        """Half of the interval's width."""
        return (self.high - self.low) / 2


@dataclass(frozen=True)
class Variances:
    """Of the mean, by level: `seeds` (with S - 1 degrees of freedom) holds the rest, `examples` does not."""

    seeds: float
    examples: float
    freedom: int
    freedom_examples: int

    @property
    def total(self) -> float:
        """The variance of the mean."""
        return self.seeds + self.examples

    def half(self, tail: float) -> float:
        """Half of an interval that leaves `tail` out, by Student's t of each level."""
        widths = (t.isf(tail / 2, self.freedom), t.isf(tail / 2, self.freedom_examples))
        return math.sqrt(widths[0] ** 2 * self.seeds + widths[1] ** 2 * self.examples)


def variances(tasks: Sequence[Array]) -> Variances:
    """The variance of the mean of the tasks' means, by the method of moments; `tasks`: [S, E] each."""
    count, num_seeds = len(tasks), tasks[0].shape[0]
    seeds = _by_seed(tasks).var(ddof=1) / num_seeds
    examples = 0.0
    for task in tasks:
        size = task.shape[1]
        residual = task - task.mean(axis=0) - task.mean(axis=1, keepdims=True) + task.mean()
        rest = (residual**2).sum() / ((num_seeds - 1) * (size - 1)) / (num_seeds * size)
        examples += (task.mean(axis=0).var(ddof=1) / size - rest) / count**2
    return Variances(float(seeds), max(float(examples), 0.0), num_seeds - 1, sum(task.shape[1] - 1 for task in tasks))


def _by_seed(tasks: Sequence[Array]) -> Array:
    """The mean of each seed, [S]."""
    return np.mean([task.mean(axis=1) for task in tasks], axis=0)


def interval(tasks: Sequence[Array], seed: int = 0, num_draws: int = NUM_DRAWS) -> Interval:
    """The mean over tasks of the mean difference, with its interval.

    Args:
        tasks: for each task the differences, [S, E]; all with the same seeds, at least two.
        seed: of the draws.
        num_draws: how many.
    """
    assert tasks and all(task.shape[0] == tasks[0].shape[0] >= 2 for task in tasks), "the same two seeds or more"
    mean = float(np.mean([task.mean() for task in tasks]))
    parts = variances(tasks)
    if parts.total == 0.0:  # nothing varies: a method compared with its copy
        return Interval(mean, mean, mean, 1.0 if mean == 0.0 else 0.0)
    least = parts.half(1 - LEVEL)
    half = max(float(np.quantile(np.abs(deviations(tasks, seed, num_draws)), LEVEL)), least)
    return Interval(mean, mean - half, mean + half, _tail(parts, abs(mean) * least / half))


def _tail(parts: Variances, size: float) -> float:
    """The tail at which half of the interval is `size`."""
    if size == 0.0 or parts.half(1e-12) <= size:
        return 1.0 if size == 0.0 else 1e-12
    return float(brentq(lambda tail: parts.half(tail) - size, 1e-12, 1.0))  # type: ignore[arg-type]


def deviations(tasks: Sequence[Array], seed: int, num_draws: int) -> Array:
    """Bootstrap draws of the mean less the mean, each level scaled as said above, [N]."""
    rng = np.random.default_rng(seed)
    parts, num_seeds = variances(tasks), tasks[0].shape[0]
    tail = (1 - LEVEL) / 2
    seeds = scaled(_weights(rng, num_draws, num_seeds) @ _by_seed(tasks), parts.seeds)
    examples = np.zeros(num_draws)
    for task in tasks:
        means = task.mean(axis=0)
        for start in range(0, num_draws, CHUNK_DRAWS):
            rows = slice(start, min(start + CHUNK_DRAWS, num_draws))
            examples[rows] += _weights(rng, rows.stop - start, len(means)) @ means / len(tasks)
    return seeds * float(t.isf(tail, num_seeds - 1) / norm.isf(tail)) + scaled(examples, parts.examples)


def scaled(draws: Array, variance: float) -> Array:
    """Draws about 0 with this variance; all 0 where they do not vary."""
    spread = draws.std()
    return (draws - draws.mean()) * (math.sqrt(variance) / spread if spread else 0.0)


def _weights(rng: np.random.Generator, rows: int, size: int) -> Array:
    """For each of `rows` draws of `size` things with replacement, the share of each thing, [rows, size]."""
    drawn = rng.integers(size, size=(rows, size)) + size * np.arange(rows)[:, None]
    return np.bincount(drawn.ravel(), minlength=rows * size).reshape(rows, size) / size


def holm(p_values: Sequence[float]) -> list[float]:
    """The p values corrected for their number (Holm 1979): below 0.05 in the whole family of tests, in their order."""
    order = sorted(range(len(p_values)), key=lambda index: p_values[index])
    corrected = [0.0] * len(p_values)
    highest = 0.0
    for place, index in enumerate(order):
        highest = max(highest, min(1.0, (len(p_values) - place) * p_values[index]))
        corrected[index] = highest
    return corrected


def share(top: Sequence[Array], bottom: Sequence[Array], seed: int = 0, num_draws: int = NUM_DRAWS) -> Interval:
    """The ratio of two means over the same seeds and examples, with its interval by the delta method.

    Args:
        top: for each task the differences, [S, E].
        bottom: likewise.
        seed: of the draws.
        num_draws: how many.
    """
    below = float(np.mean([task.mean() for task in bottom]))
    ratio = float(np.mean([task.mean() for task in top])) / below
    # to first order, a ratio moves by (d top - ratio d bottom) / bottom
    moves = [(over - ratio * under) / below for over, under in zip(top, bottom, strict=True)]
    found = interval(moves, seed, num_draws)
    return Interval(ratio, ratio - found.half, ratio + found.half, found.p)


def lowest(tasks_of: Mapping[float, Sequence[Array]], seed: int = 0, num_draws: int = 2_000) -> dict[float, float]:
    """How often each choice (a learning rate) has the lowest mean loss when seeds and examples are drawn anew.

    Args:
        tasks_of: for each choice its losses by task, [S, E] each; seeds and examples are the same for all choices.
        seed: of the draws.
        num_draws: how many.
    """
    rng = np.random.default_rng(seed)
    choices = list(tasks_of)
    first = tasks_of[choices[0]]
    num_seeds = first[0].shape[0]
    counts = np.zeros(len(choices))
    for _ in range(num_draws):
        seeds = rng.integers(num_seeds, size=num_seeds)
        examples = [rng.integers(task.shape[1], size=task.shape[1]) for task in first]
        means = [
            np.mean([task[np.ix_(seeds, own)].mean() for task, own in zip(tasks_of[choice], examples, strict=True)])
            for choice in choices
        ]
        counts[int(np.argmin(means))] += 1
    return {choice: float(count / num_draws) for choice, count in zip(choices, counts, strict=True)}
