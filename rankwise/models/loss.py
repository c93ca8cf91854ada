"""Cross entropy of the trained positions only, without ever holding the logits of a batch.

The backbone runs on the whole batch; only the rows of its hidden states that predict a label go through the output
head, CHUNK_ROWS at a time. For a frozen plain linear head the gradient with respect to the hidden states is computed in
the forward pass (as in Liger Kernel, Hsu et al. 2024, arXiv 2410.10989): the loss of a row depends on that row alone:

    d loss_i / d h_i = (softmax(h_i W^T + b) - onehot(y_i)) W

so that one [n, H] tensor is kept instead of [n, V]. Other heads (trained, or wrapped by an adapter) are recomputed
chunk by chunk in the backward pass. A model whose logits are more than its head's output (soft cap, scale) is noticed
on the first batch and takes the plain path through its own logits.

Legend: B rows, T positions, H hidden size, V vocabulary, n trained positions, C rows of a chunk.
Not here: label smoothing, z-loss, encoder-decoder models.
"""

from __future__ import annotations

import logging
from typing import Any, Literal
from weakref import WeakKeyDictionary

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int64
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

from rankwise.models.attention import forward_inputs
from rankwise.models.batch import IGNORED, Batch
from rankwise.models.probing import backbone, takes, undisturbed

CHUNK_ROWS = 256
"""Rows of the head at a time: large enough for the matrix units, and 48 MiB of float32 for a vocabulary of 49,152."""

LossPath = Literal["chunked", "plain"]

_PATHS: WeakKeyDictionary[PreTrainedModel, LossPath] = WeakKeyDictionary()
_log = logging.getLogger(__name__)


def token_losses(model: PreTrainedModel, batch: Batch) -> Float[Tensor, " n"]:
    """Cross entropy of each trained position, in nats, in reading order; float32 (float64 for float64 models).

    A trained position is one whose label is not IGNORED and which has a position before it to predict it.

    Raises: RequestError when the batch is packed and the model cannot keep samples apart.
    """
    trained = batch.labels[:, 1:] != IGNORED
    targets = batch.labels[:, 1:][trained]
    inputs = forward_inputs(batch, model)
    if loss_path(model, batch) == "plain":
        return _plain_losses(model, inputs, trained, targets)
    hidden: Tensor = backbone(model)(**inputs)[0]
    predicting = F.pad(trained, (0, 1)).flatten().nonzero().squeeze(1)
    # Two-dimensional and contiguous: a frozen head copies itself for every row of a strided three-dimensional slice.
    rows = hidden.reshape(-1, hidden.shape[-1]).index_select(0, predicting)
    head = model.get_output_embeddings()
    assert isinstance(head, nn.Module)
    return head_losses(head, rows, targets)


def example_losses(model: PreTrainedModel, batch: Batch) -> tuple[Float[Tensor, " E"], Int64[Tensor, " E"]]:
    """For each example of the batch, the sum of the losses of its trained positions, and how many they are."""
    losses = token_losses(model, batch)
    owner = batch.example_index[:, 1:][batch.labels[:, 1:] != IGNORED]
    sums = losses.new_zeros(batch.num_examples).index_add(0, owner, losses)
    return sums, torch.bincount(owner, minlength=batch.num_examples)


def head_losses(head: nn.Module, rows: Float[Tensor, "n H"], targets: Int64[Tensor, " n"]) -> Float[Tensor, " n"]:
    """Cross entropy of `targets` under `head(rows)`, by the cheapest exact way for this head."""
    if is_frozen_linear(head):
        assert isinstance(head, nn.Linear)
        return _FrozenHeadLoss.apply(rows, head.weight, head.bias, targets)  # type: ignore[no-any-return]
    if rows.shape[0] == 0:
        return _cross_entropy(head(rows), targets)
    losses = []
    for some_rows, some_targets in zip(rows.split(CHUNK_ROWS), targets.split(CHUNK_ROWS), strict=True):
        if torch.is_grad_enabled():
            losses.append(checkpoint(_head_chunk, head, some_rows, some_targets, use_reentrant=False))
        else:
            losses.append(_head_chunk(head, some_rows, some_targets))
    return torch.cat(losses)


def is_frozen_linear(head: nn.Module) -> bool:
    """Whether the head is a plain linear layer that nobody trains or listens to."""
    return (
        type(head) is nn.Linear
        and not any(parameter.requires_grad for parameter in head.parameters())
        and not head._forward_hooks
        and not head._forward_pre_hooks
    )


def _head_chunk(head: nn.Module, rows: Float[Tensor, "C H"], targets: Int64[Tensor, " C"]) -> Float[Tensor, " C"]:
    return _cross_entropy(head(rows), targets)


def _cross_entropy(logits: Float[Tensor, "C V"], targets: Int64[Tensor, " C"]) -> Float[Tensor, " C"]:
    return F.cross_entropy(logits.to(_wide(logits.dtype)), targets, reduction="none")


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


class _FrozenHeadLoss(torch.autograd.Function):
    """Losses [n] of rows [n, H] under a frozen linear head (weight [V, H], bias [V] or None).

    The softmax is computed in float32. The kept gradient has the rows' dtype: autograd through the head would round it
    to that dtype in the same place, before the backbone sees it.
    """

    @staticmethod
    def forward(ctx: Any, rows: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor) -> Tensor:
        needs_gradient = ctx.needs_input_grad[0]
        losses = rows.new_empty(rows.shape[0], dtype=_wide(rows.dtype))
        gradient = torch.empty_like(rows) if needs_gradient else None
        for start in range(0, rows.shape[0], CHUNK_ROWS):
            chunk = slice(start, start + CHUNK_ROWS)
            own = targets[chunk, None]
            scores = F.linear(rows[chunk], weight, bias).to(losses.dtype)
            normaliser = scores.logsumexp(dim=-1, keepdim=True)
            losses[chunk] = (normaliser - scores.gather(1, own)).squeeze(1)
            if gradient is not None:
                shares = scores.sub_(normaliser).exp_()
                shares.scatter_add_(1, own, shares.new_full(own.shape, -1.0))
                gradient[chunk] = shares.to(weight.dtype) @ weight
        ctx.save_for_backward(gradient)
        return losses

    @staticmethod
    @once_differentiable  # which hides the argument names from the type checker
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, upstream: Tensor
    ) -> tuple[Tensor | None, None, None, None]:
        (gradient,) = ctx.saved_tensors
        return (None if gradient is None else (gradient * upstream[:, None]).to(gradient.dtype)), None, None, None


def _plain_losses(
    model: PreTrainedModel, inputs: dict[str, Any], trained: Tensor, targets: Int64[Tensor, " n"]
) -> Float[Tensor, " n"]:
    """Through the model's own logits, of the columns that some row needs where the model can leave out the others."""
    columns = trained.any(dim=0).nonzero().squeeze(1)
    if takes(model, "logits_to_keep"):
        logits: Tensor = model(**inputs, logits_to_keep=columns).logits
    else:
        logits = model(**inputs).logits.index_select(1, columns)
    return _cross_entropy(logits[trained.index_select(1, columns)], targets)


def loss_path(model: PreTrainedModel, batch: Batch) -> LossPath:
    """How this model's losses are computed, decided once, on the first tokens of the first batch."""
    path = _PATHS.get(model)
    if path is None:
        reason = _more_than_its_head(model, batch.input_ids[:1, :16])
        path = "chunked" if reason is None else "plain"
        if reason is not None:
            _log.warning(
                "%s: %s, so the loss goes through the model's own logits; it needs more memory",
                type(model).__name__, reason,
            )  # fmt: skip
        _PATHS[model] = path
    return path


def _more_than_its_head(model: PreTrainedModel, ids: Int64[Tensor, "1 T"]) -> str | None:
    """Why `head(backbone(ids))` is not the model's logits, or None when it is, to the last bit of one forward pass."""
    head, body = model.get_output_embeddings(), backbone(model)
    if not isinstance(head, nn.Module) or body is model:
        return "its backbone and output head cannot be told apart"
    seen: dict[str, Tensor] = {}

    def at_backbone(module: nn.Module, arguments: Any, output: Any) -> None:
        seen["hidden"] = output[0]

    def at_head(module: nn.Module, arguments: Any, output: Any) -> None:
        seen["head_input"], seen["head_output"] = arguments[0], output

    hooks = [body.register_forward_hook(at_backbone), head.register_forward_hook(at_head)]
    try:
        with undisturbed(model):
            logits = model(input_ids=ids).logits
    finally:
        for hook in hooks:
            hook.remove()
    if seen.keys() != {"hidden", "head_input", "head_output"}:
        return "its logits do not come from its output head"
    if seen["head_input"].shape != seen["hidden"].shape or not torch.equal(seen["head_input"], seen["hidden"]):
        return "it changes the hidden states before the output head"
    if seen["head_output"].shape != logits.shape or not torch.equal(seen["head_output"].to(logits.dtype), logits):
        return "it changes the output head's logits (a soft cap or a scale)"
    return None
