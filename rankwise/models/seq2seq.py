"""Encoder-decoder models (T5, mT5, BART): batches of questions and answers, and the losses of the answers' tokens.

The encoder reads the question; the decoder reads the answer shifted right by the model's own rule and predicts it (T5:
Raffel et al. 2019, arXiv 1910.10683, section 2.1; BART: Lewis et al. 2019, arXiv 1910.13461). As for causal models,
the logits of a batch are never held: encoder and decoder run as they are, and only rows that carry a label go through
the output head, a chunk at a time. T5 scales the decoder's output by d_model ** -0.5 before a tied head. Whether
head(scale * decoder(...)) is the model is proven on the first rows, to the last bit of one forward pass; a model for
which no scale is (a bias of its own on the logits) goes through its own logits.

Legend: B rows, S tokens of the longest question, T of the longest answer, H hidden size, n trained tokens.
Not here: packing. Cross attention would have to be cut into segments too.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass, replace
from typing import Any
from weakref import WeakKeyDictionary

import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn
from transformers import PreTrainedModel

from rankwise.models.batch import IGNORED
from rankwise.models.head_loss import CROSS_ENTROPY, LossTerms, head_losses, logit_losses
from rankwise.models.probing import undisturbed
from rankwise.models.sharding import inside_forward

PLAIN: None = None
CHECKED_TOKENS = 16

_SCALES: WeakKeyDictionary[PreTrainedModel, float | None] = WeakKeyDictionary()
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Seq2SeqBatch:
    """Questions and answers, padded on the right. A label is IGNORED where an answer has no token."""

    input_ids: Int64[Tensor, "B S"]
    attention_mask: Int64[Tensor, "B S"]
    labels: Int64[Tensor, "B T"]

    @property
    def num_examples(self) -> int:
        """Rows."""
        return self.input_ids.shape[0]

    @property
    def num_tokens(self) -> int:
        """Tokens of questions and answers, without padding."""
        return int(self.attention_mask.sum()) + self.num_trained

    @property
    def num_trained(self) -> int:
        """Tokens of answers: each is predicted, the first from the decoder's start token."""
        return int((self.labels != IGNORED).sum())

    def to(self, device: torch.device | str) -> Seq2SeqBatch:
        """The same batch on another device."""
        return replace(self, **{name: value.to(device) for name, value in vars(self).items()})


def seq2seq_losses(
    model: PreTrainedModel, batch: Seq2SeqBatch, terms: LossTerms = CROSS_ENTROPY
) -> Float[Tensor, " n"]:
    """The loss of each token of the answers, in nats, in reading order; float32 (float64 for float64 models)."""
    if model not in _SCALES:
        _SCALES[model] = _proven_scale(model, batch)
    trained = batch.labels != IGNORED
    targets = batch.labels[trained]
    scale = _SCALES[model]
    if scale is None:
        return logit_losses(_own_logits(model, batch)[trained], targets, terms)

    def chunked() -> Tensor:
        rows = _decoded(model, batch)[trained]
        head = model.get_output_embeddings()
        assert isinstance(head, nn.Module)
        return head_losses(head, rows if scale == 1.0 else rows * scale, targets, terms)

    return inside_forward(model, chunked)  # of a model that is spread over processes, the head is whole only there


def decoder_inputs(model: PreTrainedModel, labels: Int64[Tensor, "B T"]) -> Int64[Tensor, "B T"]:
    """What the decoder reads to predict `labels`: these, shifted right by the model's own rule."""
    shifted: Any = model.prepare_decoder_input_ids_from_labels(labels=labels)  # type: ignore[operator]
    return shifted


def writes_apart(model: PreTrainedModel) -> bool:
    """Whether the model writes with a decoder of its own; one that classifies with it does not."""
    return bool(model.config.is_encoder_decoder) and model.can_generate()


def start_token_id(model: PreTrainedModel) -> int:
    """The token that the decoder starts from, when it writes."""
    own: Any = model.generation_config
    stated = None if own is None else own.decoder_start_token_id
    return model.config.decoder_start_token_id if stated is None else stated


def _decoded(model: PreTrainedModel, batch: Seq2SeqBatch) -> Float[Tensor, "B T H"]:
    """The decoder's last hidden states."""
    encoded = model.get_encoder()(input_ids=batch.input_ids, attention_mask=batch.attention_mask)[0]
    return model.get_decoder()(
        input_ids=decoder_inputs(model, batch.labels),
        encoder_hidden_states=encoded,
        encoder_attention_mask=batch.attention_mask,
        use_cache=False,
    )[0]


def _own_logits(model: PreTrainedModel, batch: Seq2SeqBatch) -> Float[Tensor, "B T V"]:
    return model(
        input_ids=batch.input_ids,
        attention_mask=batch.attention_mask,
        decoder_input_ids=decoder_inputs(model, batch.labels),
        use_cache=False,
    ).logits


def _scale_between(model: PreTrainedModel, head: nn.Module, batch: Seq2SeqBatch) -> float | None:
    logits, hidden = _own_logits(model, batch), _decoded(model, batch)
    for scale in (1.0, float(hidden.shape[-1]) ** -0.5):
        if torch.equal(head(hidden * scale).to(logits.dtype), logits):
            return scale
    return None


def _proven_scale(model: PreTrainedModel, batch: Seq2SeqBatch) -> float | None:
    """The scale with which head(scale * decoder(...)) is the model; None, and a warning, when there is none."""
    few = Seq2SeqBatch(*(part[:1, :CHECKED_TOKENS] for part in (batch.input_ids, batch.attention_mask, batch.labels)))
    head = model.get_output_embeddings()
    reason = "it has no output head of its own"
    if isinstance(head, nn.Module):
        with undisturbed(model):
            scale = inside_forward(model, lambda: _scale_between(model, head, few))
        if scale is not None:
            return scale
        reason = "its logits are more than its output head makes of its decoder's output"
    _log.warning(
        "%s: %s, so the loss goes through the model's own logits; it needs more memory", type(model).__name__, reason
    )
    return None
