"""What an objective is: the seam between the loop, the data and the model.

An objective turns examples into batches (`collate`), says how many losses a batch has (`count`) and how much each
counts (`weights`), and computes them (`losses`). The loop knows nothing else: it adds up the weighted losses of a step
and divides by the step's sum of weights, so that k micro batches equal one, whatever is trained. Validation is the mean
of the same losses.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor
from transformers import PreTrainedModel

from rankwise import distributed
from rankwise.data.example import Example
from rankwise.train.needs import Needs


@runtime_checkable
class MicroBatch(Protocol):
    """What the loop asks of a batch, whatever is in it (`rankwise.models.batch.Batch` is one)."""

    @property
    def num_examples(self) -> int:
        """Data rows."""
        ...

    @property
    def num_tokens(self) -> int:
        """Tokens read, without padding."""
        ...

    @property
    def num_trained(self) -> int:
        """Losses that it has."""
        ...


@dataclass(frozen=True)
class Filler:
    """A batch of no account: a process that has no rows left sends it through a model that is spread over processes,
    for there every forward and backward pass is a matter of all of them.
    """

    batch: MicroBatch
    num_examples: int = 0
    num_tokens: int = 0
    num_trained: int = 0


class Meter:
    """Means of what an objective sees beside its loss (accuracy, margin), between two readings.

    `losses` adds to it; the loop reads it after each step, evaluation after its rows. So figures of training and of
    validation never mix.
    """

    def __init__(self, names: tuple[str, ...] = ()) -> None:
        self.names = names
        self._sums = torch.zeros(len(names), 2, dtype=torch.float64)
        self._is_closed = False

    def add(self, name: str, values: Tensor) -> None:
        """Takes one figure for each unit of a batch in, [n]."""
        if self._is_closed:
            return
        row = self._sums[self.names.index(name)]
        row += torch.tensor([float(values.detach().double().sum()), values.numel()], dtype=torch.float64)

    @property
    def is_closed(self) -> bool:
        """Whether what is computed now is of no account."""
        return self._is_closed

    @contextlib.contextmanager
    def closed(self) -> Iterator[None]:
        """In the block, nothing is taken in: the losses are those of a batch of no account."""
        self._is_closed = True
        try:
            yield
        finally:
            self._is_closed = False

    def pour(self, sums: dict[str, list[float]]) -> None:
        """Adds sum and count of each figure to `sums`, over all processes, and starts afresh."""
        if not self.names:
            return
        taken, self._sums = self._sums, torch.zeros_like(self._sums)
        distributed.all_reduce_sum([taken])
        for name, (total, count) in zip(self.names, taken.tolist(), strict=True):
            before = sums.get(name, [0.0, 0.0])
            sums[name] = [before[0] + total, before[1] + count]


def means(sums: Mapping[str, Sequence[float]]) -> dict[str, float]:
    """The mean of each figure that was seen at all, from `Meter.pour`."""
    return {name: total / count for name, (total, count) in sums.items() if count}


def num_trained(batch: MicroBatch) -> int:
    """How many losses a batch will have, before anything is computed."""
    return batch.num_trained


def unweighted(batch: Any) -> Tensor | None:
    """Each loss counts once."""
    return None


def weighted_sum(losses: Tensor, weights: Tensor | None) -> Tensor:
    """The sum of the losses, each times its weight. Nothing is multiplied where each counts once."""
    return losses.sum() if weights is None else (losses * weights.to(losses.dtype)).sum()


def total_weight(weights: Tensor | None, count: int) -> float:
    """What the weights of so many losses sum up to."""
    return count if weights is None else float(weights.double().sum())


@dataclass(frozen=True)
class Objective:
    """What is minimised: the weighted mean of `losses` over a step, sum(w l) / sum(w).

    Args:
        needs: of the model and of the rows.
        losses: one loss for each trained unit (token, pair, row) of a micro batch, [num_trained], float32, with a
            graph; takes the model and what `collate` made.
        collate: examples, the pad token and whether to pack, to a micro batch on the CPU; it has a `.to(device)`.
        count: how many losses that will be.
        weights: how much each of them counts, [num_trained], or None: once each.
        meter: what `losses` measures besides.
        step_losses: where a loss depends on other micro batches of its step: the losses of each of them in turn, each
            to be summed and taken back to the parameters before the next is asked for. None: `losses` of each.
    """

    needs: Needs
    losses: Callable[[PreTrainedModel, Any], Tensor]
    collate: Callable[[Sequence[Example], int, bool], Any]
    count: Callable[[Any], int] = num_trained
    weights: Callable[[Any], Tensor | None] = unweighted
    meter: Meter = field(default_factory=Meter)
    step_losses: Callable[[PreTrainedModel, Sequence[Any]], Iterator[Tensor]] | None = None

    def losses_of(self, model: PreTrainedModel, batches: Iterable[Any]) -> Iterator[Tensor]:
        """The losses of each of these batches, which are a step (or all rows of an evaluation), in turn."""
        if self.step_losses is not None:
            yield from self.step_losses(model, list(batches))
            return
        for batch in batches:
            yield self.losses(model, batch)
