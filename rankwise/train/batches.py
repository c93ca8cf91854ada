"""The micro batches that the rows of a step make."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from rankwise import distributed
from rankwise.data.example import Example
from rankwise.train.objective import MicroBatch, Objective
from rankwise.train.order import RowOrder


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
