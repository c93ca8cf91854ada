"""An objective whose batches say which task each row is of, and tell the model before it reads them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Int64
from torch import Tensor
from transformers import PreTrainedModel

from rankwise.data.example import Example
from rankwise.models.batch import Batch
from rankwise.train.objective import Objective

Route = Callable[[PreTrainedModel, Tensor], AbstractContextManager[None]]
"""Tells a model the task of each row, [B], or of each token of a packed row, [1, N]: numbers of the tasks."""


@dataclass(frozen=True)
class TaskBatch:
    """A micro batch and the number of each row's task. It is a `MicroBatch`, as the one in it is."""

    batch: Any
    tasks: Int64[Tensor, " E"]

    @property
    def num_examples(self) -> int:
        """Data rows."""
        return self.batch.num_examples

    @property
    def num_tokens(self) -> int:
        """Tokens read, without padding."""
        return self.batch.num_tokens

    @property
    def num_trained(self) -> int:
        """Losses that it has."""
        return self.batch.num_trained

    def where(self) -> Int64[Tensor, "..."]:
        """The task of each row of the model's input, [B], or of each token where rows are packed, [1, N]."""
        if isinstance(self.batch, Batch) and self.batch.is_packed:
            return self.tasks[self.batch.example_index]
        return self.tasks

    def to(self, device: torch.device | str) -> TaskBatch:
        """The same batch on another device."""
        return TaskBatch(self.batch.to(device), self.tasks.to(device))


def for_tasks(objective: Objective, names: Sequence[str], route: Route) -> Objective:
    """The same objective on batches of examples with a `task`, one of `names`; `route` is told before each forward."""
    numbers = {name: number for number, name in enumerate(names)}

    def collate(examples: Sequence[Example], pad_id: int, packing: bool) -> TaskBatch:
        tasks = torch.tensor([numbers[example.task] for example in examples], dtype=torch.int64)
        return TaskBatch(objective.collate(examples, pad_id, packing), tasks)

    def losses(model: PreTrainedModel, batch: TaskBatch, **terms: Any) -> Tensor:
        with route(model, batch.where()):
            return objective.losses(model, batch.batch, **terms)

    assert objective.step_losses is None, "losses that depend on other rows of their step have no task"
    return replace(
        objective, losses=losses, collate=collate,
        count=lambda batch: objective.count(batch.batch), weights=lambda batch: objective.weights(batch.batch),
    )  # fmt: skip
