"""Losses of classification heads, through the model's own forward, so that a merged model computes the same.

Legend: B rows, T positions, L classes, n losses.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int64
from torch import Tensor
from transformers import PreTrainedModel

from rankwise.models.attention import prefer_blocks
from rankwise.models.batch import IGNORED
from rankwise.models.label_batch import LabelBatch
from rankwise.models.probing import takes
from rankwise.models.unpadded import without_padding


def set_padding(model: PreTrainedModel, pad_id: int) -> None:
    """Tells the model which token pads: heads of causal models read the last token that is another one."""
    model.config.pad_token_id = pad_id
    model.config.get_text_config().pad_token_id = pad_id


MULTI_THRESHOLD = 0.0
"""A class is chosen where its logit is above this: probability one half."""


def head_logits(model: PreTrainedModel, batch: LabelBatch) -> Float[Tensor, "B ..."]:
    """The head's logits, [B, L] or for tags [B, T, L]; float32 (float64 for float64 models)."""
    inputs = {"input_ids": batch.input_ids, "attention_mask": batch.attention_mask}
    if batch.token_type_ids is not None and takes(model, "token_type_ids"):
        inputs["token_type_ids"] = batch.token_type_ids
    prefer_blocks(model, inputs)
    logits = without_padding(model, inputs, lambda: model(**inputs).logits, batch.is_tagged)
    return logits if logits.dtype == torch.float64 else logits.float()


def class_losses(logits: Float[Tensor, "B ..."], batch: LabelBatch) -> Float[Tensor, " n"]:
    """One loss for each target, in nats, row by row.

    Cross entropy of a row's (a tagged token's) class; where a row may have several, the binary cross entropy of each
    class of each row, whose mean is that of torch's BCEWithLogitsLoss.
    """
    if batch.is_tagged:
        tagged = batch.targets != IGNORED
        return F.cross_entropy(logits[tagged], batch.targets[tagged], reduction="none")
    if batch.targets.ndim == 1:
        return F.cross_entropy(logits, batch.targets, reduction="none")
    targets = batch.targets.to(logits.dtype)
    return F.binary_cross_entropy_with_logits(logits, targets, reduction="none").flatten()


def decided(logits: Float[Tensor, "B ..."], batch: LabelBatch) -> Int64[Tensor, "B ..."]:
    """What the head says, as `batch.targets` has it."""
    if batch.is_tagged or batch.targets.ndim == 1:
        return logits.argmax(-1)
    return (logits > MULTI_THRESHOLD).long()


def correct(logits: Float[Tensor, "B ..."], batch: LabelBatch) -> Bool[Tensor, " n"]:
    """What the head got right: rows; tagged tokens; where a row may have several classes, rows with exactly those."""
    if batch.is_tagged:
        tagged = batch.targets != IGNORED
        return decided(logits, batch)[tagged] == batch.targets[tagged]
    right = decided(logits, batch) == batch.targets
    return right if right.ndim == 1 else right.all(dim=-1)
