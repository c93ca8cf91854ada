"""One autograd function for a LoRA linear layer: y = x W^T + b + s (d(x) A^T) B^T, with d for dropout.

Plain autograd keeps the adapter's output, its sum with the base's and casts of A and B alive; this function saves x and
h = x A^T only, and adds the adapter's part into the output of the base's matrix product. Backward writes dx in place.

Legend: N tokens, n inputs, o outputs, r rank, s scale. Gradients (G = dL/dy): dB = s G^T h, dh = s G B, dA = dh^T x,
dx = G W + dh A. W is frozen and gets none.

Dropout draws one random byte an entry, eight from each 64-bit number, and keeps the entries below a threshold: the
probability of keeping is rounded to a multiple of 1/256, and what is kept is scaled by the inverse of exactly that (the
plain path is taken where that is too coarse). The mask is kept as one byte an entry, and d(x) is formed again in the
backward pass.
"""

# torch types Function.apply and ctx loosely, and strict mode brings these rules back
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportIncompatibleMethodOverride=false

from __future__ import annotations

from typing import Any, cast

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor
from torch.autograd.function import once_differentiable


class LoraLinear(torch.autograd.Function):
    """See the module. All tensors are of one dtype."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Float[Tensor, "N n"],
        weight: Float[Tensor, "o n"],
        bias: Float[Tensor, " o"] | None,
        A: Float[Tensor, "r n"],
        B: Float[Tensor, "o r"],
        scale: float,
        kept: Bool[Tensor, "N n"] | None,
    ) -> Float[Tensor, "N o"]:
        """Shapes as in the legend; `kept` is the mask, `scale` has the inverse of its probability in it."""
        y = F.linear(x, weight, bias)
        h = F.linear(x if kept is None else x * kept, A)
        y.addmm_(h, B.T, alpha=scale)
        ctx.save_for_backward(x, h, weight, A, B, kept)
        ctx.scale = scale
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Float[Tensor, "N o"]) -> tuple[Tensor | None, ...]:
        """Gradients of x, a trained bias, A and B; the base's weight gets none."""
        x, h, weight, A, B, kept = ctx.saved_tensors
        need_x, _, need_bias, need_A, need_B, *_ = ctx.needs_input_grad
        grad_x = grad_A = grad_B = None
        if need_B:
            grad_B = (grad.T @ h).mul_(ctx.scale)
        if need_x or need_A:
            grad_h = (grad @ B).mul_(ctx.scale)
            if need_A:
                grad_A = grad_h.T @ (x if kept is None else x * kept)
            if need_x:
                grad_x = grad @ weight
                if kept is None:
                    grad_x.addmm_(grad_h, A)
                else:
                    grad_x.add_((grad_h @ A).mul_(kept))
        return grad_x, None, grad.sum(0) if need_bias else None, grad_A, grad_B, None, None


def keep_threshold(dropout: float) -> int | None:
    """Bytes below it are kept; None where 1/256 is too coarse: the rate would be off by more than 5 %."""
    threshold = round((1.0 - dropout) * 256)
    return threshold if threshold and abs((1.0 - threshold / 256) - dropout) <= 0.05 * dropout else None


def kept_entries(like: Float[Tensor, "N n"], dropout: float) -> tuple[Bool[Tensor, "N n"], float]:
    """A random mask of the entries to keep, from the global generator, and the probability of keeping that it has."""
    threshold = keep_threshold(dropout)
    assert threshold is not None, f"dropout {dropout} is for the plain path"
    count = like.numel()
    words = torch.empty((count + 7) // 8, dtype=torch.int64, device=like.device).random_(-(2**63), None)
    kept = words.view(torch.uint8)[:count].view(like.shape) < threshold
    return kept, threshold / 256


def lora_linear(
    x: Float[Tensor, "*batch n"],
    weight: Float[Tensor, "o n"],
    bias: Float[Tensor, " o"] | None,
    A: Float[Tensor, "r n"],
    B: Float[Tensor, "o r"],
    scale: float,
    dropout: float = 0.0,
) -> Float[Tensor, "*batch o"]:
    """The layer's output, differentiable in x, A, B and a trained bias; `weight` must be frozen.

    A and B are cast to the dtype of x: fp32 beside a bf16 base keeps their gradients in fp32.
    """
    flat = x.reshape(-1, x.shape[-1])
    if not torch.is_grad_enabled() and not dropout and flat.shape[0] < A.shape[0] and A.dtype != x.dtype:
        # fewer rows than r (decoding): casting x costs less than casting A and B
        y = F.linear(flat, weight, bias).add_(F.linear(F.linear(flat.to(A.dtype), A), B), alpha=scale)
        return y.view(*x.shape[:-1], weight.shape[0])
    down, up, kept = A.to(x.dtype), B.to(x.dtype), None
    if dropout:
        kept, probability = kept_entries(flat, dropout)
        scale /= probability
    if torch.is_grad_enabled() or kept is not None:
        y = cast(Tensor, LoraLinear.apply(flat, weight, bias, down, up, scale, kept))
    else:
        y = F.linear(flat, weight, bias).addmm_(F.linear(flat, down), up.T, alpha=scale)
    return y.view(*x.shape[:-1], weight.shape[0])
