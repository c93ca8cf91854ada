"""Paired differences of losses: how large, how sure, and whether several of them in one table can be believed.

A method is compared with another one on the same examples, with the same seeds, on one or more tasks. With D the
difference of the losses, seeds and examples are both drawn from larger sets, and crossed: every seed meets every
example of a task. Means of D vary by the seed (start and order of rows), by the example, and by both together:

    D[t, s, e] = mean[t] + seed[s] + run[t, s] + example[t, e] + rest[t, s, e]

The variance of the mean over tasks has three levels:

- V_seeds, of what a seed does alike on every task, with S - 1 degrees of freedom;
- V_runs, of what it does on each task by itself: the sum of the tasks' variances over T^2, with degrees of freedom by
  Welch and Satterthwaite, between S - 1 and T (S - 1);
- V_examples.

Where one run covers all tasks, all that comes from seeds is in V_seeds. Where a run trains one task (`apart`), runs of
a seed on different tasks share no more than the drawn start: V_seeds is then what the variance over seeds of the mean
exceeds V_runs by, and at least 0.

The interval is a hierarchical bootstrap's: seeds are drawn with replacement, the same on every task and again for each,
and examples within each task (crossed levels: Owen 2007, The pigeonhole bootstrap, arXiv 0712.1111). With 3 to 8 seeds
its percentiles are far too narrow, and it counts `rest` three times. So the draws of each level are scaled to that
level's unbiased variance (method of moments), those of seeds and runs also by Student's t over the normal. Half of the
interval is the 95 % quantile of the draws' size, and at least

    h(0.95)    with    h(level)^2 = sum over the three levels of t[freedom, level]^2 V,

for draws of three seeds have few values and short tails. p is the level at which h, scaled alike, meets the mean. One t
for all levels was tried first: with three seeds 12 % of its intervals missed, because a small V_seeds by chance raises
the degrees of freedom as well. V_runs alone misses in up to 21 % where half of the seeds' variance is common to the
tasks, the larger of both with V_runs' degrees of freedom in 9, what is done here in 7. Size and coverage:
tests/bench/test_statistics.py.

Legend: T tasks, S seeds, E examples of a task, N draws.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
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
    """Of the mean, by level, each with its degrees of freedom; `seeds` and `runs` hold the rest, `examples` does not.

    Args:
        seeds: of what a seed does alike on all tasks.
        runs: of what it does on each task by itself; 0 where one run covers all tasks.
        examples: of the examples.
    """

    seeds: float
    runs: float
    examples: float
    freedom: int
    freedom_runs: float
    freedom_examples: int

    @property
    def total(self) -> float:
        """The variance of the mean."""
        return self.seeds + self.runs + self.examples

    def half(self, tail: float) -> float:
        """Half of an interval that leaves `tail` out, by Student's t of each level."""
        levels = (
            (self.seeds, self.freedom), (self.runs, self.freedom_runs), (self.examples, self.freedom_examples)
        )  # fmt: skip
        return math.sqrt(sum(float(t.isf(tail / 2, freedom)) ** 2 * variance for variance, freedom in levels))


def variances(tasks: Sequence[Array], apart: bool = False) -> Variances:
    """The variance of the mean of the tasks' means, by the method of moments; `tasks`: [S, E] each.

    `apart`: a run trains one task, so that runs of a seed on different tasks are different runs.
    """
    count, num_seeds = len(tasks), tasks[0].shape[0]
    seeds = float(_by_seed(tasks).var(ddof=1)) / num_seeds
    runs, freedom_runs = 0.0, float(num_seeds - 1)
    if apart and count > 1:  # of one task both are the same
        of_task = np.array([task.mean(axis=1).var(ddof=1) for task in tasks]) / num_seeds / count**2
        runs = float(of_task.sum())
        if runs:
            freedom_runs *= runs**2 / float((of_task**2).sum())
        seeds = max(seeds - runs, 0.0)
    examples = 0.0
    for task in tasks:
        size = task.shape[1]
        residual = task - task.mean(axis=0) - task.mean(axis=1, keepdims=True) + task.mean()
        rest = (residual**2).sum() / ((num_seeds - 1) * (size - 1)) / (num_seeds * size)
        examples += (task.mean(axis=0).var(ddof=1) / size - rest) / count**2
    freedom_examples = sum(task.shape[1] - 1 for task in tasks)
    return Variances(seeds, runs, max(float(examples), 0.0), num_seeds - 1, freedom_runs, freedom_examples)


def _by_seed(tasks: Sequence[Array]) -> Array:
    """The mean of each seed, [S]."""
    return np.mean([task.mean(axis=1) for task in tasks], axis=0)


def interval(tasks: Sequence[Array], seed: int = 0, num_draws: int = NUM_DRAWS, apart: bool = False) -> Interval:
    """The mean over tasks of the mean difference, with its interval.

    Args:
        tasks: for each task the differences, [S, E]; all with the same seeds, at least two.
        seed: of the draws.
        num_draws: how many.
        apart: a run trains one task, so that runs of a seed on different tasks are different runs.
    """
    assert tasks and all(task.shape[0] == tasks[0].shape[0] >= 2 for task in tasks), "the same two seeds or more"
    mean = float(np.mean([task.mean() for task in tasks]))
    parts = variances(tasks, apart)
    if parts.total == 0.0:  # nothing varies: a method compared with its copy
        return Interval(mean, mean, mean, 1.0 if mean == 0.0 else 0.0)
    least = parts.half(1 - LEVEL)
    half = max(float(np.quantile(np.abs(deviations(tasks, seed, num_draws, apart)), LEVEL)), least)
    return Interval(mean, mean - half, mean + half, _tail(parts, abs(mean) * least / half))


def _tail(parts: Variances, size: float) -> float:
    """The tail at which half of the interval is `size`."""
    if size == 0.0 or parts.half(1e-12) <= size:
        return 1.0 if size == 0.0 else 1e-12
    return float(brentq(lambda tail: parts.half(tail) - size, 1e-12, 1.0))  # type: ignore[arg-type]


def deviations(tasks: Sequence[Array], seed: int, num_draws: int, apart: bool = False) -> Array:
    """Bootstrap draws of the mean less the mean, each level scaled as said above, [N]."""
    rng = np.random.default_rng(seed)
    parts, num_seeds = variances(tasks, apart), tasks[0].shape[0]
    found = _widened(_weights(rng, num_draws, num_seeds) @ _by_seed(tasks), parts.seeds, parts.freedom)
    examples = np.zeros(num_draws)
    for task in tasks:
        means = task.mean(axis=0)
        for start in range(0, num_draws, CHUNK_DRAWS):
            rows = slice(start, min(start + CHUNK_DRAWS, num_draws))
            examples[rows] += _weights(rng, rows.stop - start, len(means)) @ means / len(tasks)
    if parts.runs:
        runs = sum(_weights(rng, num_draws, num_seeds) @ task.mean(axis=1) for task in tasks)
        found = found + _widened(np.asarray(runs), parts.runs, parts.freedom_runs)
    return found + scaled(examples, parts.examples)


def _widened(draws: Array, variance: float, freedom: float) -> Array:
    """Draws about 0 with this variance, and Student's t's width."""
    tail = (1 - LEVEL) / 2
    return scaled(draws, variance) * float(t.isf(tail, freedom) / norm.isf(tail))


def scaled(draws: Array, variance: float) -> Array:
    """Draws about 0 with this variance; all 0 where they do not vary."""
    spread = draws.std()
    return (draws - draws.mean()) * (math.sqrt(variance) / spread if spread else 0.0)


def _weights(rng: np.random.Generator, rows: int, size: int) -> Array:
    """For each of `rows` draws of `size` things with replacement, the share of each thing, [rows, size]."""
    drawn = rng.integers(size, size=(rows, size)) + size * np.arange(rows)[:, None]
    return np.bincount(drawn.ravel(), minlength=rows * size).reshape(rows, size) / size


def holm(p_values: Sequence[float], num_tests: int | None = None) -> list[float]:
    """The p values corrected for their number (Holm 1979): below 0.05 in the whole family of tests, in their order.

    `num_tests`: how many the family has, where not all of them are given.
    """
    total = len(p_values) if num_tests is None else num_tests
    order = sorted(range(len(p_values)), key=lambda index: p_values[index])
    corrected = [0.0] * len(p_values)
    highest = 0.0
    for place, index in enumerate(order):
        highest = max(highest, min(1.0, (total - place) * p_values[index]))
        corrected[index] = highest
    return corrected


def share(
    top: Sequence[Array], bottom: Sequence[Array], seed: int = 0, num_draws: int = NUM_DRAWS, apart: bool = False
) -> Interval:
    """The ratio of two means over the same seeds and examples, with its interval by the delta method.

    Args:
        top: for each task the differences, [S, E].
        bottom: likewise.
        seed: of the draws.
        num_draws: how many.
        apart: as of `interval`.
    """
    below = float(np.mean([task.mean() for task in bottom]))
    ratio = float(np.mean([task.mean() for task in top])) / below
    # to first order, a ratio moves by (d top - ratio d bottom) / bottom
    moves = [(over - ratio * under) / below for over, under in zip(top, bottom, strict=True)]
    found = interval(moves, seed, num_draws, apart)
    return Interval(ratio, ratio - found.half, ratio + found.half, found.p)


def contrast(over: Array, under: Array) -> Array:
    """Of two sets of examples with the same seeds, one array whose mean and variances are those of their difference.

    Args:
        over: [S, E].
        under: [S, E'], of other examples.
    """
    size = over.shape[1] + under.shape[1]
    by_seed = over.mean(axis=1, keepdims=True) - under.mean(axis=1, keepdims=True)
    # each example's deviation, weighted so that the mean over all of them is the difference of the two means
    parts = [
        sign * (size / one.shape[1]) * (one - one.mean(axis=1, keepdims=True)) + by_seed
        for sign, one in ((1, over), (-1, under))
    ]
    return np.concatenate(parts, axis=1)
