"""Cross entropy of the trained positions only, without ever holding the logits of a batch.

The backbone runs on the whole batch; only the rows of its hidden states that predict a label go through the output
head, a chunk at a time (`head_loss`). What the model makes of its head's scores, a scale (Cohere, Granite) or a soft
cap (Gemma 2), is read from its configuration and believed only when it reproduces the model's logits and loss on the
first batch. A model for which it does not takes the plain path through its own logits, and a warning says why.

Legend: B rows, T positions, H hidden size, V vocabulary, n trained positions, E examples.
Encoder-decoder models: seq2seq.py.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import Any, Literal
from weakref import WeakKeyDictionary

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int64
from torch import Tensor, nn
from transformers import PreTrainedModel

from rankwise.models.attention import forward_inputs
from rankwise.models.batch import IGNORED, Batch
from rankwise.models.head_loss import AS_IT_IS, CROSS_ENTROPY, LogitMap, LossTerms, head_losses, logit_losses
from rankwise.models.probing import backbone, takes, undisturbed
from rankwise.models.sharding import inside_forward

LossPath = Literal["chunked", "plain"]

CHECKED_TOKENS = 16
"""Tokens of the first batch on which a model's head is looked at."""

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class _Way:
    """How a model's losses are computed."""

    path: LossPath
    logit_map: LogitMap = AS_IT_IS


_WAYS: WeakKeyDictionary[PreTrainedModel, _Way] = WeakKeyDictionary()


def token_losses(model: PreTrainedModel, batch: Batch, terms: LossTerms = CROSS_ENTROPY) -> Float[Tensor, " n"]:
    """The loss of each trained position, in nats, in reading order; float32 (float64 for float64 models).

    A trained position is one whose label is not IGNORED and which has a position before it to predict it. Without
    `terms` the loss is the plain cross entropy.

    Raises: RequestError when the batch is packed and the model cannot keep samples apart.
    """
    trained = batch.labels[:, 1:] != IGNORED
    targets = batch.labels[:, 1:][trained]
    inputs = forward_inputs(batch, model)
    way = _way(model, batch)
    if way.path == "plain":
        return _plain_losses(model, inputs, trained, targets, terms)

    def chunked() -> Tensor:
        hidden: Tensor = backbone(model)(**inputs)[0]
        predicting = F.pad(trained, (0, 1)).flatten().nonzero().squeeze(1)
        # Two-dimensional and contiguous: a frozen head copies itself for every row of a strided 3-D slice.
        rows = hidden.reshape(-1, hidden.shape[-1]).index_select(0, predicting)
        head = model.get_output_embeddings()
        assert isinstance(head, nn.Module)
        return head_losses(head, rows, targets, terms, way.logit_map)

    return inside_forward(model, chunked)  # of a model that is spread over processes, the head is whole only there


def example_losses(model: PreTrainedModel, batch: Batch) -> tuple[Float[Tensor, " E"], Int64[Tensor, " E"]]:
    """For each example of the batch, the sum of the losses of its trained positions, in float64, and how many."""
    losses = token_losses(model, batch).double()
    owner = batch.example_index[:, 1:][batch.labels[:, 1:] != IGNORED]
    sums = losses.new_zeros(batch.num_examples).index_add(0, owner, losses)
    return sums, torch.bincount(owner, minlength=batch.num_examples)


def _plain_losses(
    model: PreTrainedModel, inputs: dict[str, Any], trained: Tensor, targets: Int64[Tensor, " n"], terms: LossTerms
) -> Float[Tensor, " n"]:
    """Through the model's own logits, of the columns that some row needs where the model can leave out the others."""
    columns = trained.any(dim=0).nonzero().squeeze(1)
    if takes(model, "logits_to_keep"):
        logits: Tensor = model(**inputs, logits_to_keep=columns).logits
    else:
        logits = model(**inputs).logits.index_select(1, columns)
    return logit_losses(logits[trained.index_select(1, columns)], targets, terms)


def loss_path(model: PreTrainedModel, batch: Batch) -> LossPath:
    """How this model's losses are computed, decided once, on the first tokens of the first batch."""
    return _way(model, batch).path


def _way(model: PreTrainedModel, batch: Batch) -> _Way:
    way = _WAYS.get(model)
    if way is None:
        try:
            way = _Way("chunked", _checked_map(model, batch.input_ids[:1, :CHECKED_TOKENS]))
        except _PlainPath as reason:
            _log.warning(
                "%s: %s, so the loss goes through the model's own logits; it needs more memory",
                type(model).__name__, reason,
            )  # fmt: skip
            way = _Way("plain")
        _WAYS[model] = way
    return way


class _PlainPath(Exception):  # noqa: N818 (a verdict with its reason, not an error)
    """Why the chunked loss is not this model's."""


def _checked_map(model: PreTrainedModel, ids: Int64[Tensor, "1 T"]) -> LogitMap:
    """What the model makes of `head(backbone(ids))`, proven on one forward pass: its logits, and its own loss.

    Raises: _PlainPath with the reason when neither nothing, nor a scale, nor a soft cap explains the logits.
    """
    head, body = model.get_output_embeddings(), backbone(model)
    if not isinstance(head, nn.Module) or body is model:
        raise _PlainPath("its backbone and output head cannot be told apart")
    seen: dict[str, Tensor] = {}

    def at_backbone(module: nn.Module, arguments: Any, output: Any) -> None:
        seen["hidden"] = output[0]

    def at_head(module: nn.Module, arguments: Any, output: Any) -> None:
        seen["head_input"], seen["scores"] = arguments[0], output

    hooks = [body.register_forward_hook(at_backbone), head.register_forward_hook(at_head)]
    try:
        with undisturbed(model):
            output = model(input_ids=ids, **({"labels": ids} if takes(model, "labels") else {}))
    finally:
        for hook in hooks:
            hook.remove()
    if seen.keys() != {"hidden", "head_input", "scores"}:
        raise _PlainPath("its logits do not come from its output head")
    if seen["head_input"].shape != seen["hidden"].shape or not torch.equal(seen["head_input"], seen["hidden"]):
        raise _PlainPath("it changes the hidden states before the output head")
    logit_map = _map_between(model, seen["scores"], output.logits)
    if ids.shape[1] > 1 and output.loss is not None:
        with undisturbed(model):
            rows = seen["hidden"][0, :-1]
            losses = inside_forward(model, lambda: head_losses(head, rows, ids[0, 1:], CROSS_ENTROPY, logit_map))
            found = losses.mean()
        _check_loss(model, float(found), float(output.loss), output.logits[0, :-1], ids[0, 1:])
    return logit_map


def _map_between(model: PreTrainedModel, scores: Float[Tensor, "1 T V"], logits: Float[Tensor, "1 T V"]) -> LogitMap:
    """The map from the head's scores to the logits. Raises: _PlainPath when it is none that we have."""
    if scores.shape == logits.shape:
        if torch.equal(scores.to(logits.dtype), logits):
            return AS_IT_IS
        settings = vars(model.config.get_text_config())
        for logit_map in _maps(settings):
            # the model may round after each of three operations, we do so once
            bound = 4 * torch.finfo(logits.dtype).eps * float(logits.abs().max())
            if float((logit_map(scores.float()) - logits.float()).abs().max()) <= bound:
                return logit_map
    raise _PlainPath("it changes the output head's logits, and not by a scale or soft cap of its configuration")


def _maps(settings: dict[str, Any]) -> list[LogitMap]:
    """What a configuration may mean, by the names that families use; Granite divides where HyperCLOVA X multiplies."""
    numbers = {name: float(value) for name, value in settings.items() if type(value) in (int, float) and value > 0}
    scales = [numbers[name] for name in ("logit_scale", "logits_scaling", "lm_head_multiplier") if name in numbers]
    if "logits_scaling" in numbers:
        scales.append(1.0 / numbers["logits_scaling"])
    cap = numbers.get("final_logit_softcapping")
    capped = [LogitMap(scale, cap) for scale in (1.0, *scales)] if cap is not None else []
    return [*capped, *(LogitMap(scale) for scale in scales)]


def _check_loss(
    model: PreTrainedModel, found: float, own: float, logits: Float[Tensor, "T V"], targets: Int64[Tensor, " T"]
) -> None:
    """Compares the chunked loss with the model's own; a model whose loss has more in it (a router's balance) is named.

    Raises: _PlainPath when the chunked loss is not that of the model's logits.
    """
    plain = float(logit_losses(logits, targets).mean())
    bound = max(1e-4, 2 * torch.finfo(logits.dtype).eps) * max(1.0, abs(plain))
    if not abs(found - plain) <= bound:
        raise _PlainPath(f"its chunked loss is {found:.6g} where its logits give {plain:.6g}")
    if not abs(own - plain) <= bound:
        _log.warning(
            "%s: its own loss (%.6g on the first tokens) is not the cross entropy of its logits (%.6g), which is what "
            "is trained on and measured here",
            type(model).__name__, own, plain,
        )  # fmt: skip
