"""Loss in nats per trained token over a set of examples, and its perplexity exp(loss)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from transformers import PreTrainedModel

from rankwise.data.example import Example
from rankwise.data.packing import collate
from rankwise.errors import RequestError, WorkError
from rankwise.evaluate.progress import progress_bar
from rankwise.models.loss import token_losses


class LossError(WorkError):
    """The loss is not a number, or infinite: `loss`."""

    def __init__(self, loss: float):
        self.loss = loss
        super().__init__(f"the loss is {loss}: the model's weights or its precision are broken; try fp32")


@dataclass(frozen=True)
class Likelihood:
    """`loss`: mean over all trained tokens of all examples, not a mean of means."""

    loss: float
    num_tokens: int
    num_examples: int

    @property
    def perplexity(self) -> float:
        """exp(loss); infinite where that is too large for a float."""
        return math.exp(self.loss) if self.loss < 700 else math.inf


def measure_loss(
    model: PreTrainedModel,
    examples: Sequence[Example],
    pad_id: int,
    batch_size: int,
    packing: bool,
    progress: bool = False,
) -> Likelihood:
    """The model's loss on `examples`, `batch_size` at a time, those of similar length together.

    Packed or padded changes the speed only. Dropout is off; no gradient is kept.

    Raises: RequestError when nothing is trained on, LossError when the loss is not a number.
    """
    if batch_size < 1:
        raise RequestError(f"batch_size must be at least 1, not {batch_size}")
    order = sorted(examples, key=lambda example: -len(example.input_ids))
    total, num_tokens = 0.0, 0
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad(), progress_bar("measuring loss", len(order), progress) as advance:
            for start in range(0, len(order), batch_size):
                chosen = order[start : start + batch_size]
                losses = token_losses(model, collate(chosen, pad_id, packing).to(model.device))
                total += float(losses.double().sum())
                num_tokens += losses.numel()
                advance(len(chosen))
    finally:
        model.train(was_training)
    if not num_tokens:
        raise RequestError(f"no token of the {len(order)} examples is trained on; check the data with `data preview`")
    if not math.isfinite(total):
        raise LossError(total)
    return Likelihood(total / num_tokens, num_tokens, len(order))
