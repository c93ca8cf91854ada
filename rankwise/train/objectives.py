"""What a run can minimise, by the name in `train.objective`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial

from torch import Tensor

from rankwise.attach.inject import disabled
from rankwise.data.packing import collate
from rankwise.data.preference_batch import collate_preferences
from rankwise.data.seq2seq import collate_seq2seq
from rankwise.models.head_loss import CROSS_ENTROPY, LossTerms
from rankwise.models.loss import token_losses
from rankwise.models.seq2seq import seq2seq_losses
from rankwise.train.config import DEFAULT_DPO_BETA, TrainConfig
from rankwise.train.needs import NEEDS
from rankwise.train.objective import Meter, Objective
from rankwise.train.preference import FIGURES, Preference, Reference

TOKENS = Objective(NEEDS["sft"], token_losses, collate)
"""Cross entropy of each token that carries a label, in nats."""


def preference(beta: float, reference: Reference = disabled) -> Objective:
    """`dpo` with this beta, against the base alone or another reference."""
    pairs = Preference(beta, reference, Meter(FIGURES))
    return Objective(NEEDS["dpo"], pairs.losses, collate_preferences, meter=pairs.meter)


OBJECTIVES: dict[str, Objective] = {
    "sft": TOKENS,
    "text": Objective(NEEDS["text"], token_losses, collate),
    "seq2seq": Objective(NEEDS["seq2seq"], seq2seq_losses, collate_seq2seq),
    "dpo": preference(DEFAULT_DPO_BETA),
}


def objective_of(train: TrainConfig, reference: Reference = disabled) -> Objective:
    """The objective that a run's settings describe; `reference`: what `dpo` compares the model with."""
    if train.objective == "dpo":
        return preference(train.beta, reference)
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
