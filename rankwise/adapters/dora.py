"""DoRA: W' = m * (W + s B A) / ||W + s B A||, the norm over inputs, one magnitude m for each output.

Liu et al. 2024, "DoRA: Weight-Decomposed Low-Rank Adaptation" (arXiv 2402.09353, equation 5); the norm is a constant in
the backward pass (section 4.3). Dropout acts on the low-rank path only.
"""

# torch.linalg has no type stubs.
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false

from __future__ import annotations

from typing import final

import torch
from jaxtyping import Float
from torch import Tensor, nn
from typing_extensions import override

from rankwise.adapters.config import LoraConfig
from rankwise.adapters.layers import ConvolutionKind, LayerKind
from rankwise.adapters.low_rank import LowRankLayer
from rankwise.errors import RequestError


@final
class DoraLayer(LowRankLayer):
    """DoRA on a linear layer or an embedding."""

    def __init__(self, base: nn.Module, kind: LayerKind, config: LoraConfig, name: str) -> None:
        super().__init__(base, kind, config, name)
        if isinstance(kind, ConvolutionKind):
            raise RequestError(f"use_dora is for linear layers and embeddings; '{name}' is a convolution: exclude it")
        self.magnitude = nn.Parameter(torch.empty(self.lora_B.shape[0], device=self.weight.device))

    @override
    def start_(self, config: LoraConfig, generator: torch.Generator | None = None) -> None:
        """Fills the factors, and the magnitude with the norms, so that their ratio is one."""
        super().start_(config, generator)
        with torch.no_grad():
            self.magnitude.copy_(self._norm())

    def _directed(self) -> Float[Tensor, "o n"]:
        """W + s B A in fp32."""
        return self.kind.matrix(self.base_weight()).float() + self.delta()

    @torch.no_grad()
    def _norm(self) -> Float[Tensor, " o"]:
        return torch.linalg.vector_norm(self._directed(), dim=1)

    def forward(self, x: Tensor) -> Tensor:
        """base(x) + (g - 1)(base(x) - bias) + g s B A dropout(x), with g = m / ||W + s B A||."""
        y = self.base(x)
        if not self.active:
            return y
        gain = self.magnitude / self._norm()
        unbiased = y if self.bias is None else y - self.bias
        return y + (gain - 1.0).to(y.dtype) * unbiased + gain.to(y.dtype) * self.change(x).to(y.dtype)

    @override
    def delta_weight(self) -> Float[Tensor, "..."]:
        gain = self.magnitude / self._norm()
        delta = gain[:, None] * self._directed() - self.kind.matrix(self.base_weight()).float()
        return self.kind.weight(delta, self.base)

    @override
    def peft_parameters(self) -> dict[str, nn.Parameter]:
        return {**super().peft_parameters(), "lora_magnitude_vector": self.magnitude}
