"""LoRA: y = base(x) + s B A dropout(x), on every kind of layer in `rankwise.adapters.layers`.

Hu et al. 2021, "LoRA: Low-Rank Adaptation of Large Language Models" (arXiv 2106.09685, equation 3).
"""

from __future__ import annotations

from typing import final

import torch
from jaxtyping import Float
from torch import Tensor, nn
from typing_extensions import override

from rankwise.adapters.base import LowRank
from rankwise.adapters.fused import keep_threshold, lora_linear
from rankwise.adapters.low_rank import LowRankLayer

HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
"""Where a module keeps those who listen to its calls."""


@final
class LoraLayer(LowRankLayer):
    """LoRA on one layer."""

    def forward(self, x: Tensor) -> Tensor:
        """base(x) + s B A dropout(x)."""
        if not self.active:
            return self.base(x)
        if self._can_fuse(x):
            dropout = self.dropout if self.training else 0.0
            return lora_linear(x, self.weight, self.bias, self.lora_A, self.lora_B, self.scale, dropout)
        y = self.base(x)
        return y + self.change(x).to(y.dtype)

    def _can_fuse(self, x: Tensor) -> bool:
        """A plain frozen linear layer that nobody listens to, without a subtracted start, outside of autocast.

        Hooks and forwards replaced on the instance (offloading does both) act only when the base itself is called.
        """
        base = self.base
        return (
            type(base) is nn.Linear
            and x.dtype == self.weight.dtype
            and not self.weight.requires_grad
            and not self.weight.is_meta
            and not any(vars(base)[hooks] for hooks in HOOKS)
            and "forward" not in vars(base)
            and self.start_A is None
            and not (self.training and self.dropout and keep_threshold(self.dropout) is None)
            and not torch.is_autocast_enabled(x.device.type)
        )

    @override
    def delta_weight(self) -> Float[Tensor, "..."]:
        return self.kind.weight(self.delta(), self.base)

    @override
    def low_rank(self) -> LowRank:
        A, B = self.joined()
        return LowRank(A.flatten(1), B.flatten(1), self.scale)
