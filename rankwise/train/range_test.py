"""The learning-rate range test: which rate a curve of losses at growing rates speaks for.

Smith 2017, "Cyclical Learning Rates for Training Neural Networks" (arXiv 1506.01186, section 3.3): the rate grows from
step to step, by a constant factor, until the loss rises. Two things make the curve readable after some tens of steps:

- Paired: each step's loss is taken less the loss of the same rows before any training. What is left is what training
  has done; that some rows are harder than others (most of the noise of a training curve) is gone.
- Restarted: several short passes, each from the same start on other rows; the curve is their mean, then smoothed over
  neighbouring rates.

The pick is a fixed part of the rate at which the curve is lowest: there one more step still helped, but a run is long,
and stays at its rate (`PART_OF_LOWEST`; benchmarks/find_lr.py compares it with a grid of runs). A pass ends early
where it diverges.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from rankwise.errors import RequestError, WorkError

LOWEST_LR, HIGHEST_LR = 1e-5, 1.0
LEAST_STEPS, MOST_STEPS = 40, 100
"""Of a pass, where nobody says how many: as many as the run has, within these; 8 to 20 for each factor of ten."""
NUM_RESTARTS = 3
DIVERGED = 0.25
"""A pass ends when its loss is above that of the untrained model by this part of it, at the mean of the last three."""
PART_OF_LOWEST = 1 / 3
SMOOTHED_OVER = 2.0
"""Standard deviation, in steps, of the Gaussian that the mean curve is smoothed with."""
NOTICEABLE = 0.005
"""A curve that never falls by this part of the untrained loss says nothing."""


@dataclass(frozen=True)
class RangeTest:
    """Rates from `lowest` to `highest` in `num_steps` steps, in each of `num_restarts` passes.

    Raises: RequestError for a range or number that makes no test.
    """

    lowest: float = LOWEST_LR
    highest: float = HIGHEST_LR
    num_steps: int = LEAST_STEPS
    num_restarts: int = NUM_RESTARTS

    def __post_init__(self) -> None:
        if not 0 < self.lowest < self.highest < math.inf:
            raise RequestError(f"the rates must grow from above 0: {self.lowest:g} to {self.highest:g} do not")
        if self.num_steps < 10:
            raise RequestError(f"a range test of {self.num_steps} steps shows nothing; use 10 or more")
        if self.num_restarts < 1:
            raise RequestError(f"a range test needs 1 restart or more, not {self.num_restarts}")

    @property
    def rates(self) -> list[float]:
        """The rate of each step, growing by a constant factor."""
        factor = (self.highest / self.lowest) ** (1 / (self.num_steps - 1))
        return [self.lowest * factor**step for step in range(self.num_steps)]


@dataclass(frozen=True)
class Found:
    """The rate picked, the rate at which the smoothed curve is lowest, and the curve: a rate and its loss in nats."""

    lr: float
    lowest_at: float
    curve: list[tuple[float, float]]


def one_pass(rates: Sequence[float], before: Sequence[float], step: Callable[[int, float], float]) -> list[float]:
    """How much each step's loss is above (or below) that of the untrained model, until the pass diverges.

    `before`: that model's loss on each step's rows; `step(number, rate)`: trains a step and gives its loss on them
    before the update. A loss that is not finite, or a WorkError, is a divergence.
    """
    changes: list[float] = []
    for number, (rate, start) in enumerate(zip(rates, before, strict=True)):
        try:
            loss = step(number, rate)
        except WorkError:
            if number == 0:
                raise  # nothing was trained yet: it is not the rate
            break
        if not math.isfinite(loss):
            break
        changes.append(loss - start)
        recent = changes[-3:]
        if sum(recent) / len(recent) > DIVERGED * start:
            break
    return changes


def read_curve(rates: Sequence[float], passes: Sequence[Sequence[float]], before: float) -> Found:
    """The mean of the passes as far as all of them went, smoothed; and the rate that it speaks for.

    `before`: mean loss of the untrained model, to give the curve in nats rather than as a change.

    Raises: WorkError when the loss never falls noticeably, or still falls at the highest rate.
    """
    length = min(len(one) for one in passes)
    if length < 3:
        raise WorkError(f"training diverges from the lowest rate on, {rates[0]:g}; lower it with --lowest")
    mean = [sum(one[place] for one in passes) / len(passes) for place in range(length)]
    smooth = _smoothed(mean)
    place = min(range(length), key=smooth.__getitem__)
    if smooth[place] > -NOTICEABLE * abs(before):
        raise WorkError(
            f"the loss does not fall at any rate from {rates[0]:g} to {rates[length - 1]:g} (by {-smooth[place]:.4f} "
            f"of {before:.4f} at most): nothing is learned in {len(rates)} steps; see `rankwise data preview`, or use "
            "more with --steps"
        )
    if place == len(rates) - 1:
        raise WorkError(f"the loss still falls at the highest rate, {rates[-1]:g}; raise it with --highest")
    curve = [(rate, before + change) for rate, change in zip(rates, smooth, strict=False)]
    return Found(pick_below(rates[place]), rates[place], curve)


def _smoothed(values: Sequence[float]) -> list[float]:
    """Gaussian-weighted means; at the ends of what is there."""

    def mean_around(place: int) -> float:
        weights = [math.exp(-0.5 * ((place - other) / SMOOTHED_OVER) ** 2) for other in range(len(values))]
        return sum(w * v for w, v in zip(weights, values, strict=True)) / sum(weights)

    return [mean_around(place) for place in range(len(values))]


def pick_below(lowest_at: float) -> float:
    """The rate picked where the curve is lowest at `lowest_at`, to two significant digits: more would be noise."""
    return float(f"{lowest_at * PART_OF_LOWEST:.1e}")
