"""What a run can minimise, by the name in `train.objective`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial

from jaxtyping import Float
from torch import Tensor
from transformers import PreTrainedModel

from rankwise.attach.inject import disabled
from rankwise.data.head_batches import collate_classes, collate_tags, collate_texts
from rankwise.data.packing import collate
from rankwise.data.preference_batch import collate_preferences
from rankwise.data.seq2seq import collate_seq2seq
from rankwise.models.batch import Batch
from rankwise.models.head_loss import CROSS_ENTROPY, LossTerms
from rankwise.models.heads import class_losses, correct, head_logits
from rankwise.models.label_batch import LabelBatch
from rankwise.models.loss import token_losses
from rankwise.models.seq2seq import seq2seq_losses
from rankwise.train.config import DEFAULT_DPO_BETA, DEFAULT_POOLING, DEFAULT_TEMPERATURE, TrainConfig
from rankwise.train.contrastive import RETRIEVAL_FIGURES, Contrast
from rankwise.train.needs import NEEDS
from rankwise.train.objective import Meter, Objective
from rankwise.train.preference import FIGURES, Preference, Reference

ACCURACY = "accuracy"

TOKENS = Objective(NEEDS["sft"], token_losses, collate, weights=Batch.label_weights)
"""Cross entropy of each token that carries a label, in nats; those of an answer with a weight count so much."""


def preference(beta: float, reference: Reference = disabled) -> Objective:
    """`dpo` with this beta, against the base alone or another reference."""
    pairs = Preference(beta, reference, Meter(FIGURES))
    return Objective(NEEDS["dpo"], pairs.losses, collate_preferences, meter=pairs.meter)


def classifier(name: str) -> Objective:
    """Cross entropy of each label of rows or words, in nats, and the share that the head gets right."""
    meter = Meter((ACCURACY,))

    def losses(model: PreTrainedModel, batch: LabelBatch) -> Float[Tensor, " n"]:
        logits = head_logits(model, batch)
        meter.add(ACCURACY, correct(logits, batch))
        return class_losses(logits, batch)

    needs = NEEDS[name]
    return Objective(needs, losses, collate_tags if needs.layout == "tags" else collate_classes, meter=meter)


def contrastive(pooling: str, temperature: float) -> Objective:
    """Each anchor's own text against all others of the step."""
    contrast = Contrast(pooling, temperature, Meter(RETRIEVAL_FIGURES))
    return Objective(
        NEEDS["embedding"], contrast.losses, collate_texts, meter=contrast.meter, step_losses=contrast.step_losses
    )


OBJECTIVES: dict[str, Objective] = {
    "sft": TOKENS,
    "text": Objective(NEEDS["text"], token_losses, collate),
    "seq2seq": Objective(NEEDS["seq2seq"], seq2seq_losses, collate_seq2seq),
    "dpo": preference(DEFAULT_DPO_BETA),
    "classification": classifier("classification"),
    "token-classification": classifier("token-classification"),
    "embedding": contrastive(DEFAULT_POOLING, DEFAULT_TEMPERATURE),
}


def objective_of(train: TrainConfig, reference: Reference = disabled) -> Objective:
    """The objective that a run's settings describe; `reference`: what `dpo` compares the model with."""
    if train.objective == "dpo":
        return preference(train.beta, reference)
    if train.objective == "embedding":
        return contrastive(train.pooling_name, train.similarity_temperature)
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
