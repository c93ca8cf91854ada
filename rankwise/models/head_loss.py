"""Cross entropy of hidden states under an output head, a few rows at a time: the logits of a batch are never held.

For a frozen plain linear head the gradient with respect to the hidden states is computed in the forward pass (as in
Liger Kernel, Hsu et al. 2024, arXiv 2410.10989), for the loss of a row depends on that row alone. With logits
z = f(u), u = h W^T + b, p = softmax(z), N = logsumexp(z), label y, smoothing e and z-loss coefficient c:

    loss    = N - (1 - e) z_y - e mean(z) + c N^2
    dloss/dz = (1 + 2 c N) p - (1 - e) onehot(y) - e / V
    dloss/dh = (dloss/dz * f'(u)) W

so that one [n, H] tensor is kept instead of [n, V]. Other heads (trained, or wrapped by an adapter) are recomputed
chunk by chunk in the backward pass.

Label smoothing: Szegedy et al. 2015, arXiv 1512.00567, section 7. z-loss: Chowdhery et al. 2022, PaLM, arXiv
2204.02311, section 5. f is the identity, Cohere's scale, or Gemma 2's soft cap (arXiv 2408.00118, section 2).

Legend: H hidden size, V vocabulary, n rows, C rows of a chunk, R rows of a block.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int64
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint

CHUNK_ROWS = 256
"""Rows of the head at a time: large enough for the matrix units, and 24 MiB of bf16 for a vocabulary of 49,152."""

BLOCK_ROWS = 16
"""Rows of a chunk that a CPU takes through the softmax at a time, in float32: they stay in its cache."""


@dataclass(frozen=True)
class LossTerms:
    """What is added to plain cross entropy: label smoothing, from 0 below 1, and the coefficient of the z-loss."""

    label_smoothing: float = 0.0
    z_loss: float = 0.0


CROSS_ENTROPY = LossTerms()
"""Plain cross entropy: what evaluation measures."""


@dataclass(frozen=True)
class LogitMap:
    """f(u): what a model makes of its head's scores: scale * u, or cap * tanh(scale * u / cap)."""

    scale: float = 1.0
    cap: float | None = None

    def __call__(self, scores: Tensor) -> Tensor:
        """f(scores), not in place."""
        if self.cap is None:
            return scores if self.scale == 1.0 else scores * self.scale
        return torch.tanh(scores * (self.scale / self.cap)) * self.cap

    def slope(self, logits: Tensor) -> Tensor | None:
        """The derivative of f where f is `logits`, as a new tensor; None where it is 1."""
        if self.cap is None:
            return None if self.scale == 1.0 else logits.new_tensor(self.scale)
        return (logits / self.cap).square_().neg_().add_(1.0).mul_(self.scale)


AS_IT_IS = LogitMap()
"""The logits are the head's scores."""


def head_losses(
    head: nn.Module,
    rows: Float[Tensor, "n H"],
    targets: Int64[Tensor, " n"],
    terms: LossTerms = CROSS_ENTROPY,
    logit_map: LogitMap = AS_IT_IS,
) -> Float[Tensor, " n"]:
    """The loss of `targets` under `logit_map(head(rows))`, in nats, by the cheapest exact way for this head.

    float32, or float64 for float64 rows.
    """
    if is_frozen_linear(head):
        assert isinstance(head, nn.Linear)
        return _FrozenHeadLoss.apply(  # type: ignore[no-any-return]
            rows, head.weight, head.bias, targets, terms, logit_map
        )
    if rows.shape[0] == 0:
        return logit_losses(head(rows), targets, terms)
    losses = []
    for some_rows, some_targets in zip(rows.split(CHUNK_ROWS), targets.split(CHUNK_ROWS), strict=True):
        arguments = (head, some_rows, some_targets, terms, logit_map)
        if torch.is_grad_enabled():
            losses.append(checkpoint(_head_chunk, *arguments, use_reentrant=False))
        else:
            losses.append(_head_chunk(*arguments))
    return torch.cat(losses)


def is_frozen_linear(head: nn.Module) -> bool:
    """Whether the head is a plain linear layer that nobody trains or listens to."""
    return (
        type(head) is nn.Linear
        and not any(parameter.requires_grad for parameter in head.parameters())
        and not head._forward_hooks
        and not head._forward_pre_hooks
    )


def _head_chunk(
    head: nn.Module,
    rows: Float[Tensor, "C H"],
    targets: Int64[Tensor, " C"],
    terms: LossTerms,
    logit_map: LogitMap,
) -> Float[Tensor, " C"]:
    scores = head(rows)
    return logit_losses(logit_map(scores.to(wide(scores.dtype))), targets, terms)


def logit_losses(
    logits: Float[Tensor, "C V"], targets: Int64[Tensor, " C"], terms: LossTerms = CROSS_ENTROPY
) -> Float[Tensor, " C"]:
    """The loss of each row, by plain autograd; float32, or float64 for float64 logits."""
    logits = logits.to(wide(logits.dtype))
    losses = F.cross_entropy(logits, targets, reduction="none", label_smoothing=terms.label_smoothing)
    if terms.z_loss:
        losses = losses + terms.z_loss * logits.logsumexp(dim=-1).square()
    return losses


def wide(dtype: torch.dtype) -> torch.dtype:
    """The dtype that losses are computed in."""
    return torch.float64 if dtype == torch.float64 else torch.float32


class _FrozenHeadLoss(torch.autograd.Function):
    """Losses [n] of rows [n, H] under a frozen linear head (weight [V, H], bias [V] or None).

    The softmax is computed in float32. The kept gradient has the rows' dtype: autograd through the head would round it
    to that dtype in the same place, before the backbone sees it.
    """

    @staticmethod
    def forward(
        ctx: Any,
        rows: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        terms: LossTerms,
        logit_map: LogitMap,
    ) -> Tensor:
        needs_gradient = ctx.needs_input_grad[0]
        losses = rows.new_empty(rows.shape[0], dtype=wide(rows.dtype))
        gradient = torch.empty_like(rows) if needs_gradient else None
        in_blocks = rows.device.type == "cpu" and not torch.compiler.is_compiling()
        block_rows = BLOCK_ROWS if in_blocks else CHUNK_ROWS
        for start in range(0, rows.shape[0], CHUNK_ROWS):
            chunk = slice(start, start + CHUNK_ROWS)
            scores = F.linear(rows[chunk], weight, bias)
            for first in range(0, scores.shape[0], block_rows):
                block = slice(first, first + block_rows)
                own = slice(start + first, start + min(first + block_rows, scores.shape[0]))
                logits = logit_map(scores[block].to(losses.dtype))
                losses[own], shares = _block(logits, targets[own, None], terms, logit_map, needs_gradient)
                if shares is not None:
                    scores[block] = shares  # the scores have been read: their place is free
            if gradient is not None:
                gradient[chunk] = scores @ weight
            del scores  # or the next chunk's would be made beside them
        ctx.save_for_backward(gradient)
        return losses

    @staticmethod
    @once_differentiable  # which hides the argument names from the type checker
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, upstream: Tensor
    ) -> tuple[Tensor | None, ...]:
        (gradient,) = ctx.saved_tensors
        found = None if gradient is None else (gradient * upstream[:, None]).to(gradient.dtype)
        return found, None, None, None, None, None


def _block(
    logits: Float[Tensor, "R V"],
    targets: Int64[Tensor, "R 1"],
    terms: LossTerms,
    logit_map: LogitMap,
    needs_gradient: bool,
) -> tuple[Float[Tensor, " R"], Float[Tensor, "R V"] | None]:
    """The losses of some rows, and their gradients with respect to the head's scores."""
    smoothing = terms.label_smoothing
    largest = logits.amax(dim=-1, keepdim=True)
    shares = logits.sub(largest).exp_()
    total = shares.sum(dim=-1, keepdim=True)
    normaliser = total.log().add_(largest)
    losses = normaliser - (1.0 - smoothing) * logits.gather(1, targets)
    if smoothing:
        losses = losses - smoothing * logits.mean(dim=-1, keepdim=True)
    if terms.z_loss:
        losses = losses + terms.z_loss * normaliser.square()
    if not needs_gradient:
        return losses.squeeze(1), None
    shares.mul_((1.0 + 2.0 * terms.z_loss * normaliser) / total)
    shares.scatter_add_(1, targets, shares.new_full(targets.shape, smoothing - 1.0))
    if smoothing:
        shares.sub_(smoothing / logits.shape[-1])
    slope = logit_map.slope(logits)
    if slope is not None:
        shares.mul_(slope)
    return losses.squeeze(1), shares
