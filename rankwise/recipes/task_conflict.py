"""The conflict of a run's tasks, measured while it trains: each task's gradient at parameters that all tasks share.

Where a layer has an adapter for each task, these take part in equal shares, so that every task's gradient reaches all
of them; the rows are the same each time, the first of a shuffle, in two batches for each task. A measurement costs one
forward and one backward pass of `tasks.conflict_rows` rows of each task, and memory for 2 T gradients of the adapters.
It changes nothing in the run.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from rankwise.attach.attachment import adapter_layers
from rankwise.data.example import Example
from rankwise.data.packing import epoch_order
from rankwise.errors import RequestError
from rankwise.tasks.conflict import Conflict, Cosines, cosines
from rankwise.train.objective import Objective, weighted_sum
from rankwise.train.rng import untouched

STREAM = 2**31
"""Of the shuffle that chooses the rows: no source of a mix has such a number."""


class ConflictMeter:
    """Measures how far apart the tasks' gradients are.

    Args:
        model: attached.
        objective: what is trained, on examples of any task.
        examples: of each task.
        num_rows: how many rows of each task are taken; a task with fewer gives all.
        batch_size: rows in one forward pass.
        pad_id, packing: as in training.
        seed: chooses the rows.
        together: a block in which all adapters of a layer take part in equal shares.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        objective: Objective,
        examples: Mapping[str, Sequence[Example]],
        num_rows: int,
        layout: tuple[int, int, bool],
        seed: int,
        together: Callable[[], AbstractContextManager[None]],
    ) -> None:
        self._model, self._objective, self._together = model, objective, together
        self._batch_size, self._pad_id, self._packing = layout
        self._rows = {
            name: [own[int(row)] for row in epoch_order(len(own), seed, 0, STREAM)[:num_rows]]
            for name, own in examples.items()
        }
        few = next((name for name, rows in self._rows.items() if len(rows) < 2), None)
        if few is not None:
            raise RequestError(
                f"task '{few}' has one row, and the conflict of tasks is measured on two batches of each; give it more "
                "rows, or leave out tasks.conflict_every and isolate: auto"
            )

    def measure(self, step: int) -> Conflict:
        """The cosines of all pairs of tasks in each adapted layer, as the model is after `step`."""
        found_layers = {name: layer for name, layer in adapter_layers(self._model).items() if layer.rank}  # no heads
        layers = {name: list(layer.peft_parameters().values()) for name, layer in found_layers.items()}
        every = [parameter for parameters in layers.values() for parameter in parameters]
        with untouched(self._model, self._model.device), torch.enable_grad(), _all_trained(every), self._together():
            batches = [
                (self._gradient(rows[0::2], every), self._gradient(rows[1::2], every)) for rows in self._rows.values()
            ]
        found: dict[str, Cosines] = {}
        start = 0
        for name, parameters in layers.items():
            end = start + len(parameters)
            found[name] = cosines([(first[start:end], second[start:end]) for first, second in batches])
            start = end
        return Conflict(step, tuple(self._rows), found)

    def _gradient(self, rows: Sequence[Example], parameters: Sequence[nn.Parameter]) -> list[Tensor]:
        """The gradient of the summed loss of these rows; cosines don't ask for its length."""
        objective, size = self._objective, self._batch_size
        batches = [
            objective.collate(rows[start : start + size], self._pad_id, self._packing).to(self._model.device)
            for start in range(0, len(rows), size)
        ]
        weights = [objective.weights(batch) for batch in batches]
        sums = [torch.zeros_like(parameter) for parameter in parameters]
        for batch, weight in zip(batches, weights, strict=True):
            if not objective.count(batch):
                continue
            with objective.meter.closed():
                loss = weighted_sum(objective.losses(self._model, batch), weight)
            for place, part in enumerate(torch.autograd.grad(loss, parameters, allow_unused=True)):
                if part is not None:
                    sums[place] += part
        return sums


@contextlib.contextmanager
def _all_trained(parameters: Sequence[nn.Parameter]) -> Iterator[None]:
    """In the block all of them take gradients, frozen ones too."""
    before = [parameter.requires_grad for parameter in parameters]
    for parameter in parameters:
        parameter.requires_grad_(True)
    try:
        yield
    finally:
        for parameter, was in zip(parameters, before, strict=True):
            parameter.requires_grad_(was)
