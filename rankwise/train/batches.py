"""Which rows are in which step, and the micro batches that they make.

Rows come from an endless stream of epochs, each shuffled by the seed and its own number: step s takes rows
(s - 1) * batch_size to s * batch_size of the stream. So the order depends on nothing but the seed, and a resumed run
finds its place by its step alone.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from rankwise import distributed
from rankwise.data.example import Example
from rankwise.data.packing import epoch_order
from rankwise.train.objective import MicroBatch, Objective


class RowOrder:
    """The rows of each step.

    Args:
        num_examples: rows in an epoch.
        batch_size: rows in a step.
        num_rows: rows in the whole run; the last step is cut there.
        seed: of the shuffling.
    """

    def __init__(self, num_examples: int, batch_size: int, num_rows: int, seed: int) -> None:
        assert num_examples > 0
        self.num_examples, self.batch_size, self.num_rows, self.seed = num_examples, batch_size, num_rows, seed
        self._orders: dict[int, list[int]] = {}

    def rows(self, step: int) -> list[int]:
        """Indices of the examples in `step` (from 1), in the order of the stream."""
        first = (step - 1) * self.batch_size
        return [self._row(place) for place in range(first, min(first + self.batch_size, self.num_rows))]

    def _row(self, place: int) -> int:
        epoch, offset = divmod(place, self.num_examples)
        if epoch not in self._orders:
            # an order is as long as the data: only the current epoch's is kept
            self._orders = {epoch: epoch_order(self.num_examples, self.seed, epoch)}
        return self._orders[epoch][offset]


class MicroBatches:
    """Called with a step, gives this process's micro batches of it, on the device.

    Args:
        objective: makes a micro batch of its rows.
        examples: the training set.
        order: which of them are in a step.
        micro_batch_size: rows in a micro batch; the last one of a step may have fewer.
        pad_id: token that fills padded rows up.
        packing: lay a micro batch's rows end to end, instead of padding them.
        device: where the batches go.
    """

    def __init__(
        self,
        objective: Objective,
        examples: Sequence[Example],
        order: RowOrder,
        micro_batch_size: int,
        pad_id: int,
        packing: bool,
        device: torch.device,
    ) -> None:
        self.objective, self.examples, self.order, self.micro_batch_size = objective, examples, order, micro_batch_size
        self.pad_id, self.packing, self.device = pad_id, packing, device

    def __call__(self, step: int) -> list[MicroBatch]:
        """The micro batches of `step`."""
        rows = self.order.rows(step)[distributed.rank() :: distributed.world_size()]
        chosen = [self.examples[row] for row in rows]
        if not self.packing:  # rows of like length share a micro batch: less padding; the step's mean stays the same
            chosen.sort(key=lambda example: -len(example.input_ids))
        size = self.micro_batch_size
        return [
            self.objective.collate(chosen[start : start + size], self.pad_id, self.packing).to(self.device)
            for start in range(0, len(chosen), size)
        ]
