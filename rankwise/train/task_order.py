"""Which rows are in which step of a run on several tasks: as `rankwise.train.order`, with shares that may change.

Each task has a stream of its own shuffled passes over its rows, and a step takes the next rows of some of them; how
many of which is decided by `rankwise.tasks.sampling.Draw`. So no row of a task is seen twice more than another, and a
run that goes on finds its place by the shares and by how many rows were drawn before they began.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from rankwise.data.packing import epoch_order
from rankwise.tasks.sampling import Draw, spread

IN_STEP = 2**32
"""Added to the step's number where its own order is drawn: no epoch of a task has such a number."""


class TaskOrder:
    """The rows of each step.

    Args:
        sizes: rows of each task, as they lie one after another in the examples.
        draw: how many rows of each are in a step.
        seed: of the shuffling.
    """

    def __init__(self, sizes: Sequence[int], draw: Draw, seed: int) -> None:
        self.sizes, self.draw, self.seed = tuple(sizes), draw, seed
        self._starts = np.cumsum([0, *sizes])
        self._orders: dict[tuple[int, int], np.ndarray] = {}

    def rows(self, step: int) -> list[int]:
        """Indices of the examples in `step` (from 1)."""
        counts, before = self.draw.counts(step), self.draw.before(step)
        words = np.random.PCG64(np.random.SeedSequence([self.seed, IN_STEP + step])).random_raw(sum(counts))
        rows: list[int] = []
        for task in spread(counts, words):
            epoch, offset = divmod(before[task], self.sizes[task])
            before[task] += 1
            rows.append(int(self._starts[task]) + int(self._order(task, epoch)[offset]))
        return rows

    def task(self, row: int) -> int:
        """The task that an example is of."""
        return int(np.searchsorted(self._starts, row, side="right")) - 1

    def _order(self, task: int, epoch: int) -> np.ndarray:
        if (task, epoch) not in self._orders:
            for old in sorted(key for key in self._orders if key[0] == task)[:-1]:  # a step may straddle two
                del self._orders[old]
            self._orders[task, epoch] = epoch_order(self.sizes[task], self.seed, epoch, task + 1)
        return self._orders[task, epoch]
