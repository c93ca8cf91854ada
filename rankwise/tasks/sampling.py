"""How often a row of each task is drawn, and from which task each row of a step is.

Three rules give the shares p_t of the tasks in a step:

- size: p_t ~ n_t, the task's rows;
- temperature T: p_t ~ n_t ** (1 / T) (Arivazhagan et al. 2019, arXiv 1907.05019);
- behind: p_t ~ max(loss_t / reference_t - 1, 0), by how far the task's validation loss is above that of an adapter of
  its own (Gottumukkala et al., ACL 2020, draw by the gap to single-task performance). A tenth of
  all rows stays by size, so that no task is forgotten and each can fall behind again; where none is behind, all are.

Shares become whole rows by carrying on what rounding leaves: after any number of steps of a stretch in which the shares
stay, a task has had its share of the rows to within one row. So the draw is a function of the stretch and the step
alone, the same on any number of processes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from rankwise.tasks.config import BEHIND, DEFAULT_TEMPERATURE, TEMPERATURE, SamplingConfig

FLOOR = 0.1
"""The share of rows that `behind` draws by size."""


def shares_of(
    sampling: SamplingConfig,
    sizes: Mapping[str, int],
    losses: Mapping[str, float] | None = None,
    references: Mapping[str, float] | None = None,
) -> dict[str, float]:
    """The share of each task of `sizes` (its rows), summing to 1.

    `losses`: the tasks' validation losses now, of `behind`; None: not measured yet, then shares go by size.
    `references`: those of single adapters.
    """
    by_size = _normal({name: float(size) for name, size in sizes.items()})
    if sampling.by == TEMPERATURE:
        power = 1.0 / (sampling.temperature or DEFAULT_TEMPERATURE)
        return _normal({name: size**power for name, size in sizes.items()})
    if sampling.by != BEHIND or not losses or not references:
        return by_size
    gaps = {name: max(losses[name] / references[name] - 1.0, 0.0) for name in sizes}
    if not any(gaps.values()):
        return by_size
    behind = _normal(gaps)
    return {name: (1 - FLOOR) * behind[name] + FLOOR * by_size[name] for name in sizes}


def with_replay(now: Mapping[str, float], earlier: Mapping[str, float], replay: float) -> dict[str, float]:
    """Shares of a stage's own tasks, and of those of earlier stages, which together have the share `replay`."""
    if not earlier or not replay:
        return dict(now)
    return {name: share * (1 - replay) for name, share in now.items()} | {
        name: share * replay for name, share in _normal(earlier).items()
    }


def _normal(weights: Mapping[str, float]) -> dict[str, float]:
    total = sum(weights.values())
    return {name: weight / total for name, weight in weights.items()}


@dataclass
class Stretch:
    """Steps in which the shares stay.

    Args:
        first: its first step, from 1.
        shares: of the tasks, in their order, summing to 1.
        drawn: rows of each task that were drawn before it.
    """

    first: int
    shares: list[float]
    drawn: list[int] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        """As a checkpoint holds it."""
        return {"first": self.first, "shares": list(self.shares), "drawn": list(self.drawn)}


class Draw:
    """How many rows of each task are in each step.

    Args:
        batch_size: rows in a step.
        num_rows: rows in the whole run; the last step is cut there.
        stretch: where the shares begin.
    """

    def __init__(self, batch_size: int, num_rows: int, stretch: Stretch) -> None:
        self.batch_size, self.num_rows = batch_size, num_rows
        self.begin(stretch)

    def begin(self, stretch: Stretch) -> None:
        """From here on the shares are those of `stretch`."""
        assert len(stretch.drawn) == len(stretch.shares), stretch
        self.stretch = stretch
        self._ends = [np.zeros(len(stretch.shares), dtype=np.int64)]
        """Rows of each task in the first 0, 1, 2, ... steps of the stretch."""

    def rows_in(self, step: int) -> int:
        """Rows of all tasks in `step`."""
        return max(0, min(self.batch_size, self.num_rows - (step - 1) * self.batch_size))

    def before(self, step: int) -> list[int]:
        """Rows of each task in all steps before `step`, which is in the stretch or behind its last."""
        return (np.array(self.stretch.drawn) + self._end(step - self.stretch.first)).tolist()

    def counts(self, step: int) -> list[int]:
        """Rows of each task in `step`."""
        place = step - self.stretch.first
        return (self._end(place + 1) - self._end(place)).tolist()

    def _end(self, num_steps: int) -> np.ndarray:
        assert num_steps >= 0, "steps before the stretch are over"
        shares = np.array(self.stretch.shares)
        first = self.stretch.first
        while len(self._ends) <= num_steps:
            done = len(self._ends) - 1
            had = self._ends[-1]
            rows = self.rows_in(first + done)
            wanted = shares * (int(had.sum()) + rows) - had
            counts = np.maximum(np.floor(wanted), 0).astype(np.int64)
            for _ in range(rows - int(counts.sum())):
                counts[int(np.argmax(np.where(shares > 0, wanted - counts, -np.inf)))] += 1
            while counts.sum() > rows:  # a task that was rounded up before has none to give
                counts[int(np.argmin(np.where(counts > 0, wanted - counts, np.inf)))] -= 1
            self._ends.append(had + counts)
        return self._ends[num_steps]


def spread(counts: Sequence[int], words: np.ndarray) -> list[int]:
    """The task of each row of a step, in an order that random `words` (one a row) decide."""
    tasks = np.repeat(np.arange(len(counts)), counts)
    return tasks[np.argsort(words, kind="stable")].tolist()
