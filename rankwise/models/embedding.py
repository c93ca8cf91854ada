"""Text embeddings and their contrastive loss over a whole step, in memory of one micro batch.

A row is an anchor, the text that belongs to it (its positive), and perhaps texts that do not (hard negatives). With
unit vectors a_i for anchors and c_j for candidates (all positives and all negatives of the step), and temperature t:

    loss_i = -log( exp(a_i . p_i / t) / sum_j exp(a_i . c_j / t) )

InfoNCE (van den Oord et al. 2018, arXiv 1807.03748, equation 4) with in-batch negatives (Henderson et al. 2017, arXiv
1705.00652, section 4.4). A candidate that is the same text as row i's positive, or as its anchor, is no negative of it
and is left out of the sum.

Over a whole step, in the memory of one micro batch: `rankwise.train.contrastive`.

Legend: M texts, T positions, H hidden size, N rows and their anchors, K candidates.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int64
from torch import Tensor
from transformers import PreTrainedModel

from rankwise.models.attention import prefer_blocks
from rankwise.models.unpadded import without_padding


def embed(
    model: PreTrainedModel, input_ids: Int64[Tensor, "M T"], mask: Int64[Tensor, "M T"], pooling: str
) -> Float[Tensor, "M H"]:
    """Unit vectors of texts padded on the right; float32 (float64 for float64 models)."""
    inputs = {"input_ids": input_ids, "attention_mask": mask}
    prefer_blocks(model, inputs)
    return without_padding(model, inputs, lambda: _pooled(model(**inputs)[0], mask, pooling))


def _pooled(hidden: Float[Tensor, "M T H"], mask: Int64[Tensor, "M T"], pooling: str) -> Float[Tensor, "M H"]:
    hidden = hidden if hidden.dtype == torch.float64 else hidden.float()
    match pooling:
        case "mean":
            weights = mask[..., None].to(hidden.dtype)
            pooled = (hidden * weights).sum(1) / weights.sum(1)
        case "cls":
            pooled = hidden[:, 0]
        case "last":
            pooled = hidden[torch.arange(len(hidden), device=hidden.device), mask.sum(1) - 1]
        case _:
            raise AssertionError(pooling)
    return F.normalize(pooled, dim=-1)


def contrast_logits(
    anchors: Float[Tensor, "N H"],
    candidates: Float[Tensor, "K H"],
    own: Int64[Tensor, " N"],
    keys: tuple[Int64[Tensor, " N"], Int64[Tensor, " K"]],
    temperature: float,
) -> Float[Tensor, "N K"]:
    """Similarities over the temperature; -inf for candidates that are no negatives of the row.

    `own`: which candidate is the positive of each row; `keys`: those of anchors and candidates (`TextBatch.keys`).
    """
    logits = anchors @ candidates.T / temperature
    anchor_keys, candidate_keys = keys
    same = candidate_keys[None, :] == candidate_keys[own][:, None]
    same |= candidate_keys[None, :] == anchor_keys[:, None]
    same[torch.arange(len(own), device=own.device), own] = False
    return logits.masked_fill(same, -torch.inf)


def positive_ranks(logits: Float[Tensor, "N K"], own: Int64[Tensor, " N"]) -> Int64[Tensor, " N"]:
    """The place of each row's positive among its candidates, from 1; equal similarities count against it."""
    right = logits.gather(1, own[:, None])
    return (logits >= right).sum(1)
