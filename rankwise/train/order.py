"""Which rows are in which step: a function of the seed and the step alone, so that a resumed run finds its place.

Rows come from an endless stream of epochs, each shuffled by the seed and its own number: step s takes rows
(s - 1) * batch_size to s * batch_size of the stream. Neither the number of processes nor how the rows were loaded
changes it.

A mix of several sources draws a fixed number of rows, its quota, from each in every epoch of the mix. Where that is all
of its rows, they are simply part of the shuffle. Otherwise the source has a stream of its own shuffled passes, of which
each epoch takes the next rows: so after any number of epochs no row of a source was seen twice more than another.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from rankwise.data.packing import epoch_order


@dataclass(frozen=True)
class Share:
    """A source in a mix. `size`: its rows; `quota`: how many of them an epoch of the mix draws."""

    size: int
    quota: int


class RowOrder:
    """The rows of each step.

    Args:
        shares: the sources, as they lie one after another in the examples; or the number of rows of a single one.
        batch_size: rows in a step.
        num_rows: rows in the whole run; the last step is cut there.
        seed: of the shuffling.
    """

    def __init__(self, shares: Sequence[Share] | int, batch_size: int, num_rows: int, seed: int) -> None:
        if isinstance(shares, int):
            shares = [Share(shares, shares)]
        self.batch_size, self.num_rows, self.seed = batch_size, num_rows, seed
        self.shares = tuple(shares)
        self.num_examples = sum(share.quota for share in shares)
        """Rows in an epoch."""
        assert self.num_examples > 0
        self._quota_ends = np.cumsum([share.quota for share in shares])
        self._starts = np.cumsum([0, *(share.size for share in shares)])
        self._orders: dict[tuple[int, int], np.ndarray] = {}

    def rows(self, step: int) -> list[int]:
        """Indices of the examples in `step` (from 1), in the order of the stream."""
        first = (step - 1) * self.batch_size
        return [self._row(place) for place in range(first, min(first + self.batch_size, self.num_rows))]

    def source(self, row: int) -> int:
        """The source that an example is of."""
        return int(np.searchsorted(self._starts, row, side="right")) - 1

    def _row(self, place: int) -> int:
        epoch, offset = divmod(place, self.num_examples)
        drawn = int(self._order(0, self.num_examples, epoch)[offset])
        source = int(np.searchsorted(self._quota_ends, drawn, side="right"))
        share = self.shares[source]
        number = drawn - (int(self._quota_ends[source]) - share.quota)
        if share.quota != share.size:
            own_epoch, own_offset = divmod(epoch * share.quota + number, share.size)
            number = int(self._order(source + 1, share.size, own_epoch)[own_offset])
        return int(self._starts[source]) + number

    def _order(self, stream: int, size: int, epoch: int) -> np.ndarray:
        """The order of an epoch. Stream 0 is that of the whole, the others are the sources'."""
        if (stream, epoch) not in self._orders:
            # those that one epoch of the mix and the next may draw from; a step may straddle two
            passes = 1 if stream == 0 else -(-self.shares[stream - 1].quota // size)
            held = sorted(key for key in self._orders if key[0] == stream)
            for old in held[: max(0, len(held) - passes)]:
                del self._orders[old]
            self._orders[stream, epoch] = epoch_order(size, self.seed, epoch, stream)
        return self._orders[stream, epoch]
