"""LoRA: y = base(x) + s B A dropout(x), on every kind of layer in `rankwise.adapters.layers`.

Hu et al. 2021, "LoRA: Low-Rank Adaptation of Large Language Models" (arXiv 2106.09685, equation 3).
"""

from __future__ import annotations

from typing import final

from jaxtyping import Float
from torch import Tensor
from typing_extensions import override

from rankwise.adapters.base import LowRank
from rankwise.adapters.low_rank import LowRankLayer


@final
class LoraLayer(LowRankLayer):
    """LoRA on one layer."""

    @override
    def adapted(self, x: Tensor, other: Tensor | None = None) -> Tensor:
        return self.added(x, other)

    @override
    def delta_weight(self) -> Float[Tensor, "..."]:
        return self.kind.weight(self.delta(), self.base)

    @override
    def low_rank(self) -> LowRank:
        A, B = self.joined()
        return LowRank(A.flatten(1), B.flatten(1), self.scale)
