"""What a run can minimise, by the name in `train.objective`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial

from torch import Tensor

from rankwise.data.packing import collate
from rankwise.data.seq2seq import collate_seq2seq
from rankwise.models.head_loss import CROSS_ENTROPY, LossTerms
from rankwise.models.loss import token_losses
from rankwise.models.seq2seq import seq2seq_losses
from rankwise.train.config import TrainConfig
from rankwise.train.needs import NEEDS
from rankwise.train.objective import Objective

TOKENS = Objective(NEEDS["sft"], token_losses, collate)
"""Cross entropy of each token that carries a label, in nats."""

OBJECTIVES: dict[str, Objective] = {
    "sft": TOKENS,
    "text": Objective(NEEDS["text"], token_losses, collate),
    "seq2seq": Objective(NEEDS["seq2seq"], seq2seq_losses, collate_seq2seq),
}


def objective_of(train: TrainConfig) -> Objective:
    """The objective that a run's settings describe."""
    return OBJECTIVES[train.objective]


def minimised(objective: Objective, train: TrainConfig) -> Objective:
    """What training minimises of `objective`: with label smoothing and z-loss, which evaluation never measures.

    The losses of an objective that `needs.smooths` take `terms`.
    """
    terms = LossTerms(train.label_smoothing, train.z_loss)
    if terms == CROSS_ENTROPY:
        return objective
    losses: Callable[..., Tensor] = objective.losses  # the seam's type does not name `terms`
    return replace(objective, losses=partial(losses, terms=terms))
