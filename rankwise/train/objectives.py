"""What a run can minimise, by the name in `train.objective`."""

from __future__ import annotations

from rankwise.data.packing import collate
from rankwise.models.loss import token_losses
from rankwise.train.config import TrainConfig
from rankwise.train.needs import NEEDS
from rankwise.train.objective import Objective

TOKENS = Objective(NEEDS["sft"], token_losses, collate)
"""Cross entropy of each token that carries a label, in nats."""

OBJECTIVES: dict[str, Objective] = {
    "sft": TOKENS,
    "text": Objective(NEEDS["text"], token_losses, collate),
}


def objective_of(train: TrainConfig) -> Objective:
    """The objective that a run's settings describe."""
    return OBJECTIVES[train.objective]
