"""One autograd function for a LoRA linear layer: y = x W^T + b + s (d(x) A^T) B^T, with d for dropout.

Plain autograd keeps the adapter's output, its sum with the base's and casts of A and B alive; this function saves x and
h = d(x) A^T only (with dropout a bit an entry too, and d(x) is formed again in the backward pass), and adds the
adapter's part into the output of the base's matrix product. Backward writes dx in place. A and B are used through
copies in the dtype of x; their gradients have their own dtype.

Two variants. With `other`, the layer's input is silu(x) * other, formed again in the backward pass: the down projection
of a SwiGLU (Shazeer 2020, arXiv 2002.05202, equation 6), which then keeps two tensors instead of four. With very many
tokens in fp32 the sum W + s B A is formed, here and again in the backward pass, and multiplied once (`forms_sum`). In
bf16 it would lose updates smaller than the weight's last digit.

Legend: N tokens, n inputs, o outputs, r rank, s scale. Gradients (G = dL/dy): dB = s G^T h, dh = s G B, dA = dh^T d(x),
dx = G W + d'(dh A). W is frozen and gets none. A W that is stored in 8 or 4 bits is dequantised in the forward pass and
again in the backward pass, and not kept. (s B A is not folded into it, which would save a product: in bf16 the sum
would round small changes away.)

A gradient that is to be differentiated again (`create_graph=True`) is computed by plain autograd's operations, from A
and B themselves: slower, and only then.
"""

# torch types Function.apply and ctx loosely, and strict mode brings these rules back
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportIncompatibleMethodOverride=false

from __future__ import annotations

from typing import Any, NamedTuple, cast

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from rankwise.adapters.dropout import KeepRule, kept_entries, masked, spread
from rankwise.adapters.sharing import Derived
from rankwise.quantized import dense_weight


class Factors(NamedTuple):
    """A and B as they are trained, their copies in the dtype of x, and what is known already."""

    A: Float[Tensor, "r n"]
    B: Float[Tensor, "o r"]
    scale: float
    down: Float[Tensor, "r n"]
    up: Float[Tensor, "o r"]
    h: Float[Tensor, "N r"] | None = None
    """x A^T, where a layer with the same input has computed it."""
    derived: tuple[Derived, ...] = ()
    """What holds `down` and `up`; dropped in the backward pass."""


class _Constants(NamedTuple):
    """What the function needs and gives no gradient to."""

    down: Tensor
    up: Tensor
    scale: float
    h: Tensor | None
    kept: Tensor | None
    derived: tuple[Derived, ...]
    stored: nn.Module | None
    formed: bool


def forms_sum(x: Float[Tensor, "N n"], weight: Float[Tensor, "o n"]) -> bool:
    """Whether W + s B A is formed: two sums of o n numbers are saved N o and N n of them.

    Measured on a CPU (docs/log.md): it pays from four times as many tokens as where these are equal.
    """
    num_outputs, num_inputs = weight.shape
    return x.element_size() > 2 and x.shape[0] * (num_outputs + num_inputs) >= 8 * num_outputs * num_inputs


class LoraLinear(torch.autograd.Function):
    """See the module. All tensors but A and B are of one dtype."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Float[Tensor, "N n"],
        other: Float[Tensor, "N n"] | None,
        weight: Float[Tensor, "o n"] | None,
        bias: Float[Tensor, " o"] | None,
        A: Float[Tensor, "r n"],
        B: Float[Tensor, "o r"],
        constants: _Constants,
    ) -> Float[Tensor, "N o"]:
        """Shapes as in the legend; the constants' scale has the inverse of the probability of keeping in it.

        Without `weight`, it is that of the constants' `stored` layer.
        """
        down, up, scale, h, kept, ctx.derived, ctx.stored, ctx.formed = constants
        read = _read(x, other)
        dense = _dense(weight, ctx.stored, x)
        if ctx.formed:
            y = F.linear(read, torch.addmm(dense, up, down, alpha=scale), bias)
        else:
            h = _down(read, kept, down) if h is None else h
            y = F.linear(read, dense, bias).addmm_(h, up.T, alpha=scale)
        ctx.save_for_backward(x, other, h, weight, down, up, kept, A, B)
        ctx.scale, ctx.dtypes = scale, (A.dtype, B.dtype)
        return y

    @staticmethod
    def backward(ctx: Any, grad: Float[Tensor, "N o"]) -> tuple[Tensor | None, ...]:
        """Gradients of x, other, a trained bias, A and B; the base's weight gets none."""
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            return _differentiable(ctx, grad)
        x, other, h, weight, down, up, kept, _, _ = ctx.saved_tensors
        need_x, need_other, _, need_bias, need_A, need_B, _ = ctx.needs_input_grad
        grad_x = grad_other = grad_A = grad_B = None
        read = _read(x, other)
        mask = None if kept is None else spread(kept, x)
        if need_B:
            h = F.linear(read, down) if h is None else h  # None only where the sum was formed
            grad_B = (h.T @ grad).T.to(ctx.dtypes[1], memory_format=torch.contiguous_format).mul(ctx.scale)
        grad_h = grad @ up
        if need_A:
            dropped = read if mask is None else masked(read, mask)
            grad_A = (grad_h.T @ dropped).to(ctx.dtypes[0]).mul_(ctx.scale)
            del dropped
        del read
        if need_x or need_other:
            dense = _dense(weight, ctx.stored, grad)
            if ctx.formed:
                grad_x = grad @ torch.addmm(dense, up, down, alpha=ctx.scale)
            elif mask is None:
                grad_x = (grad @ dense).addmm_(grad_h, down, alpha=ctx.scale)
            else:
                grad_x = (grad @ dense).add_(masked(grad_h @ down, mask), alpha=ctx.scale)
            if other is not None:
                grad_other = F.silu(x).mul_(grad_x)
                grad_x = torch.ops.aten.silu_backward(grad_x.mul_(other), x)
        for held in ctx.derived:
            held.drop()
        return grad_x, grad_other, None, grad.sum(0) if need_bias else None, grad_A, grad_B, None


def _differentiable(ctx: Any, grad: Float[Tensor, "N o"]) -> tuple[Tensor | None, ...]:
    """What `backward` gives, as a function of x, other, A, B and the gradient that can be differentiated."""
    x, other, _, weight, _, _, kept, A, B = ctx.saved_tensors
    need_x, need_other, _, need_bias, need_A, need_B, _ = ctx.needs_input_grad
    down, up = A.to(x.dtype), B.to(x.dtype)
    read = x if other is None else F.silu(x) * other
    mask = 1.0 if kept is None else spread(kept, x).ne(0)
    dropped, grad_h = read * mask, grad @ up
    for held in ctx.derived:
        held.drop()
    grad_read = grad @ _dense(weight, ctx.stored, grad) + ctx.scale * (grad_h @ down) * mask
    grad_x = grad_read
    if other is not None:
        slope = torch.sigmoid(x)
        grad_x = grad_read * other * (slope * (1.0 + x * (1.0 - slope)))
    return (
        grad_x if need_x else None,
        grad_read * F.silu(x) if need_other else None,
        None,
        grad.sum(0) if need_bias else None,
        ctx.scale * (grad_h.T @ dropped).to(ctx.dtypes[0]) if need_A else None,
        ctx.scale * (grad.T @ (dropped @ down.T)).to(ctx.dtypes[1]) if need_B else None,
        None,
    )


def _read(x: Float[Tensor, "N n"], other: Float[Tensor, "N n"] | None) -> Float[Tensor, "N n"]:
    """The layer's input."""
    return x if other is None else F.silu(x).mul_(other)


def _down(read: Float[Tensor, "N n"], kept: Tensor | None, down: Float[Tensor, "r n"]) -> Float[Tensor, "N r"]:
    return F.linear(read if kept is None else masked(read, spread(kept, read)), down)


def _dense(weight: Tensor | None, stored: nn.Module | None, like: Tensor) -> Float[Tensor, "o n"]:
    """W, dequantised into the dtype of `like` where it is stored."""
    if stored is not None:
        return dense_weight(stored, like.dtype)
    assert weight is not None
    return weight


def lora_linear(
    x: Float[Tensor, "*batch n"],
    weight: Float[Tensor, "o n"] | nn.Module,
    bias: Float[Tensor, " o"] | None,
    factors: Factors,
    rule: KeepRule | None = None,
    other: Float[Tensor, "*batch n"] | None = None,
) -> Float[Tensor, "*batch o"]:
    """The layer's output, differentiable in x, other, A, B and a trained bias. `rule`: dropout's.

    `weight` must be frozen; a layer stands for one that is stored in 8 or 4 bits. With `other` the layer's input is
    silu(x) * other.
    """
    flat = x.reshape(-1, x.shape[-1])
    flat_other = None if other is None else other.reshape(flat.shape)
    stored, plain = (weight, None) if isinstance(weight, nn.Module) else (None, weight)
    A, B, scale, down, up, h, derived = factors
    kept = None
    if rule is not None:
        kept = kept_entries(flat.numel(), rule, flat.device)
        scale /= rule.probability
    if torch.is_grad_enabled():
        formed = plain is not None and rule is None and forms_sum(flat, plain)
        constants = _Constants(down, up, scale, h, kept, derived, stored, formed)
        y = cast(Tensor, LoraLinear.apply(flat, flat_other, plain, bias, A, B, constants))
    else:
        read = _read(flat, flat_other)
        y = F.linear(read, plain, bias) if plain is not None else cast(nn.Module, stored)(read)  # its own kernels
        y.addmm_(_down(read, kept, down) if h is None else h, up.T, alpha=scale)
    return y.view(*x.shape[:-1], y.shape[-1])
