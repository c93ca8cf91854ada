"""The micro batches that the rows of a step make."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from rankwise import distributed
from rankwise.data.example import Example
from rankwise.train.objective import Filler, MicroBatch, Objective
from rankwise.train.order import RowOrder
from rankwise.train.task_order import TaskOrder


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
        order: RowOrder | TaskOrder,
        micro_batch_size: int,
        pad_id: int,
        packing: bool,
        device: torch.device,
    ) -> None:
        self.objective, self.examples, self.order, self.micro_batch_size = objective, examples, order, micro_batch_size
        self.pad_id, self.packing, self.device = pad_id, packing, device

    def __call__(self, step: int) -> list[MicroBatch]:
        """The micro batches of `step`."""
        chosen = self._examples(distributed.dealt(self.order.rows(step)))
        size = self.micro_batch_size
        return [self._micro_batch(chosen[start : start + size]) for start in range(0, len(chosen), size)]

    def whole(self, step: int) -> list[MicroBatch]:
        """The micro batches of one process that takes the whole step: the same on all."""
        chosen, size = self._examples(self.order.rows(step)), self.micro_batch_size
        return [self._micro_batch(chosen[start : start + size]) for start in range(0, len(chosen), size)]

    def first(self, step: int) -> MicroBatch:
        """The first micro batch of one process that would take the whole step: the same on all."""
        return self._micro_batch(self._examples(self.order.rows(step))[: self.micro_batch_size])

    def smallest(self, step: int) -> MicroBatch:
        """The shortest row of the step alone, whichever process it is dealt to."""
        chosen = self._examples(self.order.rows(step))
        return self._micro_batch([min(chosen, key=lambda example: len(example.input_ids))])

    def num_most(self, step: int) -> int:
        """How many micro batches the process has that has most: the first."""
        num_rows = math.ceil(len(self.order.rows(step)) / distributed.world_size())
        return math.ceil(num_rows / self.micro_batch_size)

    def _examples(self, rows: Sequence[int]) -> list[Example]:
        chosen = [self.examples[row] for row in rows]
        if not self.packing:  # rows of like length share a micro batch: less padding; the step's mean stays the same
            chosen.sort(key=lambda example: -len(example.input_ids))
        return chosen

    def _micro_batch(self, examples: Sequence[Example]) -> MicroBatch:
        return self.objective.collate(examples, self.pad_id, self.packing).to(self.device)


class InStep:
    """The same micro batches for a model that is spread over processes: equally many on each, filled up where needed.

    Args:
        batches: what is filled up.
    """

    def __init__(self, batches: MicroBatches) -> None:
        self.batches = batches

    def __call__(self, step: int) -> list[MicroBatch]:
        """The micro batches of `step`; those without a loss are fillers too."""
        own = [batch if self.batches.objective.count(batch) else Filler(batch) for batch in self.batches(step)]
        missing = self.batches.num_most(step) - len(own)
        return own + ([Filler(self.batches.smallest(step))] * missing if missing else [])
