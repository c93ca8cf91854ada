"""One autograd function for a LoRA linear layer: y = x W^T + b + s (x A^T) B^T.

Plain autograd keeps the adapter's output, its sum with the base's and casts of A and B alive; this function saves x and
h = x A^T only, and adds the adapter's part into the output of the base's matrix product. Backward writes dx in place too.

Legend: N tokens, n inputs, o outputs, r rank, s scale. Gradients (G = dL/dy): dB = s G^T h, dh = s G B, dA = dh^T x,
dx = G W + dh A. W is frozen and gets none.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor
from torch.autograd.function import once_differentiable


class LoraLinear(torch.autograd.Function):
    """See the module; A and B have been cast to the dtype of x."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Float[Tensor, "N n"],
        weight: Float[Tensor, "o n"],
        bias: Float[Tensor, "o"] | None,
        A: Float[Tensor, "r n"],
        B: Float[Tensor, "o r"],
        scale: float,
    ) -> Float[Tensor, "N o"]:
        """Shapes as in the legend."""
        y = F.linear(x, weight, bias)
        h = F.linear(x, A)
        y.addmm_(h, B.T, alpha=scale)
        ctx.save_for_backward(x, h, weight, A, B)
        ctx.scale = scale
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients of x, A and B; the base gets none."""
        (grad,) = grads
        x, h, weight, A, B = ctx.saved_tensors
        need_x, _, need_bias, need_A, need_B, _ = ctx.needs_input_grad
        grad_x = grad_A = grad_B = grad_bias = None
        if need_B:
            grad_B = (grad.T @ h).mul_(ctx.scale)
        if need_x or need_A:
            grad_h = (grad @ B).mul_(ctx.scale)
            if need_A:
                grad_A = grad_h.T @ x
            if need_x:
                grad_x = (grad @ weight).addmm_(grad_h, A)
        if need_bias:
            grad_bias = grad.sum(0)
        return grad_x, None, grad_bias, grad_A, grad_B, None


def lora_linear(
    x: Float[Tensor, "*batch n"],
    weight: Float[Tensor, "o n"],
    bias: Float[Tensor, "o"] | None,
    A: Float[Tensor, "r n"],
    B: Float[Tensor, "o r"],
    scale: float,
) -> Float[Tensor, "*batch o"]:
    """x W^T + bias + s (x A^T) B^T, with gradients for x, A, B and a trained bias. A and B may be fp32 beside a bf16 x."""
    y = LoraLinear.apply(x.reshape(-1, x.shape[-1]), weight, bias, A.to(x.dtype), B.to(x.dtype), scale)
    return y.view(*x.shape[:-1], weight.shape[0])
