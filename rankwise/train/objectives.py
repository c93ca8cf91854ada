"""What a run can minimise, by the name in `train.objective`."""

from __future__ import annotations

from rankwise.models.batch import Batch
from rankwise.models.loss import token_losses
from rankwise.train.loop import Objective


def _num_trained(batch: Batch) -> int:
    return batch.num_trained


TOKENS = Objective(losses=token_losses, count=_num_trained)
"""Cross entropy of each token that carries a label, in nats."""

OBJECTIVES: dict[str, Objective] = {"sft": TOKENS, "text": TOKENS}
