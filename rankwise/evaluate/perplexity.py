"""The mean loss over a set of examples (of tokens: in nats, and its perplexity exp(loss)), for any objective."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor
from transformers import PreTrainedModel

from rankwise import distributed
from rankwise.data.example import Example
from rankwise.errors import RequestError, WorkError
from rankwise.evaluate.progress import progress_bar
from rankwise.evaluate.rounds import rounds
from rankwise.models.probing import undisturbed


@runtime_checkable
class Meter(Protocol):
    """Figures that are measured beside the losses."""

    def pour(self, sums: dict[str, list[float]]) -> None:
        """Adds sum and count of each figure to `sums`, over all processes, and starts afresh."""
        ...

    def closed(self) -> AbstractContextManager[None]:
        """A block in which nothing is taken in."""
        ...


@runtime_checkable
class Measured(Protocol):
    """What is measured: `rankwise.train.objective.Objective` is one."""

    @property
    def losses(self) -> Callable[[PreTrainedModel, Any], Tensor]:
        """One loss for each trained unit of a batch by itself, [n]."""
        ...

    def losses_of(self, model: PreTrainedModel, batches: Iterable[Any]) -> Iterator[Tensor]:
        """The losses of each of these batches in turn: one for each trained unit, [n]."""
        ...

    @property
    def weights(self) -> Callable[[Any], Tensor | None]:
        """How much each loss of a batch counts, [n]; None: once each."""
        ...

    @property
    def collate(self) -> Callable[[Sequence[Example], int, bool], Any]:
        """A batch from examples, the pad token, and whether to pack."""
        ...

    @property
    def meter(self) -> Meter:
        """What `losses` sees besides."""
        ...


class LossError(WorkError):
    """The loss is not a number, or infinite: `loss`."""

    def __init__(self, loss: float):
        self.loss = loss
        super().__init__(f"the loss is {loss}: the model's weights or its precision are broken; try fp32")


@dataclass(frozen=True)
class Likelihood:
    """`loss`: mean over all trained units (tokens, pairs, rows) of all examples, not a mean of means; weighted, where
    answers have weights.

    `figures`: the means of what the objective measures besides; `weight` and `counts`: what the mean loss and each of
    these were divided by.
    """

    loss: float
    num_units: int
    num_examples: int
    figures: Mapping[str, float] = field(default_factory=dict)
    weight: float = 1.0
    counts: Mapping[str, float] = field(default_factory=dict)

    @property
    def perplexity(self) -> float:
        """exp(loss); infinite where that is too large for a float."""
        return math.exp(self.loss) if self.loss < 700 else math.inf


def measure_loss(
    model: PreTrainedModel,
    objective: Measured,
    examples: Sequence[Example],
    pad_id: int,
    batch_size: int,
    packing: bool,
    progress: bool = False,
) -> Likelihood:
    """The model's loss on `examples`, `batch_size` at a time, those of similar length together.

    Packed or padded changes the speed only. Dropout is off; no gradient is kept. Of several processes each takes its
    share of the examples, and all return the same.

    Raises: RequestError when nothing is trained on, LossError when the loss is not a number.
    """
    if batch_size < 1:
        raise RequestError(f"batch_size must be at least 1, not {batch_size}")
    order = sorted(examples, key=lambda example: -len(example.input_ids))
    total, weight, num_units = 0.0, 0.0, 0
    counting: deque[Tensor | None] = deque()
    sums: dict[str, list[float]] = {}
    objective.meter.pour({})  # what others left in it
    try:
        shares = rounds(order, batch_size, model)
        with undisturbed(model), progress_bar("measuring loss", len(distributed.dealt(order)), progress) as advance:
            batches = (objective.collate(chunk, pad_id, packing).to(model.device) for chunk in shares if chunk)
            losses_of_each = objective.losses_of(model, _noted(batches, objective, counting))
            for chunk in shares:
                if not chunk:  # the other processes have rows left, and the model is spread over all of them
                    with objective.meter.closed():
                        objective.losses(model, objective.collate(order[-1:], pad_id, packing).to(model.device))
                    continue
                losses, weights = next(losses_of_each).double(), counting.popleft()
                total += float((losses if weights is None else losses * weights).sum())
                weight += losses.numel() if weights is None else float(weights.double().sum())
                num_units += losses.numel()
                advance(len(chunk))
            assert next(losses_of_each, None) is None
    finally:
        objective.meter.pour(sums)
    sums_of_all = torch.tensor([total, weight, num_units], dtype=torch.float64)
    distributed.all_reduce_sum([sums_of_all])
    total, weight, num_units = float(sums_of_all[0]), float(sums_of_all[1]), int(sums_of_all[2])
    if not num_units:
        raise RequestError(f"nothing in the {len(order)} examples is trained on; check the data with `data preview`")
    if not math.isfinite(total):
        raise LossError(total)
    figures = {name: total / count for name, (total, count) in sums.items() if count}
    counts = {name: count for name, (_, count) in sums.items() if count}
    return Likelihood(total / weight, num_units, len(order), figures, weight, counts)


def together(parts: Sequence[Likelihood]) -> Likelihood:
    """The mean over all rows of several parts, which were measured one by one."""
    weight = sum(part.weight for part in parts)
    counts: dict[str, float] = {}
    for part in parts:
        for name, count in part.counts.items():
            counts[name] = counts.get(name, 0.0) + count
    figures = {
        name: sum(part.figures.get(name, 0.0) * part.counts.get(name, 0.0) for part in parts) / count
        for name, count in counts.items()
    }
    loss = sum(part.loss * part.weight for part in parts) / weight
    units, examples = sum(part.num_units for part in parts), sum(part.num_examples for part in parts)
    return Likelihood(loss, units, examples, figures, weight, counts)


def _noted(batches: Iterable[Any], objective: Measured, weights: deque[Tensor | None]) -> Iterator[Any]:
    """The batches, and what their losses count in `weights`, since some objectives take all of them at once."""
    for batch in batches:
        weights.append(objective.weights(batch))
        yield batch
