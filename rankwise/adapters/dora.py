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

from rankwise.adapters.base import AdapterLayer
from rankwise.adapters.layers import ConvolutionKind, LayerKind
from rankwise.adapters.lora import Factors, LayerSettings
from rankwise.errors import RequestError

MAGNITUDE = "lora_magnitude_vector"


@final
class DoraLayer(AdapterLayer):
    """DoRA on a linear layer or an embedding."""

    def __init__(self, base: nn.Module, kind: LayerKind, settings: LayerSettings, name: str) -> None:
        super().__init__(base)
        if isinstance(kind, ConvolutionKind):
            raise RequestError(f"use_dora is for linear layers and embeddings; '{name}' is a convolution: exclude it")
        self.factors = Factors(base, kind, settings, name)
        self.magnitude = nn.Parameter(torch.empty(self.factors.num_outputs, device=self.weight.device))

    def start_(self, settings: LayerSettings, generator: torch.Generator | None = None) -> None:
        """Fills the factors, and the magnitude with the norms, so that their ratio is one."""
        self.factors.start_(self.base, settings, generator)
        with torch.no_grad():
            self.magnitude.copy_(self._norm())

    @property
    @override
    def rank(self) -> int:
        return self.factors.rank

    @property
    @override
    def holds_start(self) -> bool:
        return self.factors.start_A is not None

    def _directed(self) -> Float[Tensor, "o n"]:
        """W + s B A in fp32."""
        return self.factors.kind.matrix(self.weight.detach()).float() + self.factors.delta()

    @torch.no_grad()
    def _norm(self) -> Float[Tensor, " o"]:
        return torch.linalg.vector_norm(self._directed(), dim=1)

    def forward(self, x: Tensor) -> Tensor:
        """base(x) + (g - 1)(base(x) - bias) + g s B A dropout(x), with g = m / ||W + s B A||."""
        y = self.base(x)
        if not self.active:
            return y
        kind = self.factors.kind
        gain = self.magnitude / self._norm()
        unbiased = y if self.bias is None else y - self.bias
        change = self.factors.change(self.base, x, self.training).to(y.dtype)
        return y + kind.spread(gain - 1.0, y) * unbiased + kind.spread(gain, y) * change

    @override
    def delta_weight(self) -> Float[Tensor, "..."]:
        directed = self._directed()
        gain = self.magnitude / torch.linalg.vector_norm(directed, dim=1).detach()
        delta = gain[:, None] * directed - self.factors.kind.matrix(self.weight.detach()).float()
        return self.factors.kind.weight(delta, self.base)

    @override
    def resize_(self, rank: int, generator: torch.Generator | None = None) -> float:
        return self.factors.resize_(rank, generator)

    def low_rank(self) -> None:
        """None: the change is not a low-rank one."""

    @override
    def to_peft(self) -> dict[str, Tensor]:
        return {**self.factors.to_peft(), MAGNITUDE: self.magnitude.detach()}

    @override
    def peft_shapes(self) -> dict[str, tuple[int, ...]]:
        return {**self.factors.peft_shapes(), MAGNITUDE: tuple(self.magnitude.shape)}

    @override
    def from_peft(self, tensors: dict[str, Tensor]) -> None:
        self.factors.from_peft(tensors)
        with torch.no_grad():
            self.magnitude.copy_(tensors[MAGNITUDE])
