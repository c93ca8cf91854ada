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
from rankwise.adapters.sharing import Derived
from rankwise.adapters.starts import Directions
from rankwise.errors import RequestError


@final
class DoraLayer(LowRankLayer):
    """DoRA on a linear layer or an embedding."""

    def __init__(self, base: nn.Module, kind: LayerKind, config: LoraConfig, name: str) -> None:
        super().__init__(base, kind, config, name)
        if isinstance(kind, ConvolutionKind):
            raise RequestError(f"use_dora is for linear layers and embeddings; '{name}' is a convolution: exclude it")
        self._norms = Derived()
        self.magnitude = nn.Parameter(torch.empty(self.lora_B.shape[0], device=self.weight.device))

    @override
    def start_(
        self, config: LoraConfig, generator: torch.Generator | None = None, directions: Directions | None = None
    ) -> None:
        """Fills the factors, and the magnitude with the norms, so that their ratio is one."""
        super().start_(config, generator, directions)
        with torch.no_grad():
            self.magnitude.copy_(self._norm())

    def _directed(self) -> Float[Tensor, "o n"]:
        """W + s B A in fp32."""
        return self.kind.matrix(self.base_weight()).float() + self.delta()

    @torch.no_grad()
    def _norm(self) -> Float[Tensor, " o"]:
        return torch.linalg.vector_norm(self._directed(), dim=1)

    def _divisor(self) -> Float[Tensor, " o"]:
        """The norm, and 1 for an output whose weights are all zero: it has no direction, m = 0, and stays zero."""
        norm = self._norm()
        return torch.where(norm == 0, 1.0, norm)

    def _gain(self) -> Float[Tensor, " o"]:
        """The gain g = m / ||W + s B A||; the norm is computed again when W, A or B has changed."""
        if torch.compiler.is_compiling():
            return self.magnitude / self._divisor()
        # a base that is borrowed anew each time is frozen all the same: its address says nothing
        sources = (*self.used(), *(() if self.borrows_base else (self.weight,)))
        gain = self.magnitude / self._norms.of(sources, self._divisor)
        if gain.requires_grad:
            gain.register_hook(self._forget_norm)
        return gain

    def _forget_norm(self, grad: Tensor) -> None:
        self._norms.drop()

    @override
    def adapted(self, x: Tensor, other: Tensor | None = None) -> Tensor:
        """The sum bias + g (t - bias), with t = base(x) + s B A dropout(x) and g = m / ||W + s B A||.

        In bf16 g is the sum of two numbers, so that a g near 1 is not rounded to steps of 1/256. With g = 1 the output
        is t to the last bit.
        """
        t = self.added(x, other)
        gain = self._gain()
        most = gain.detach().to(t.dtype)
        y = t * most if self.bias is None else torch.addcmul(((1.0 - gain) * self.bias).to(t.dtype), t, most)
        return torch.addcmul(y, t, (gain - most).to(t.dtype))

    @override
    def delta_weight(self) -> Float[Tensor, "..."]:
        delta = self._gain()[:, None] * self._directed() - self.kind.matrix(self.base_weight()).float()
        return self.kind.weight(delta, self.base)

    @override
    def peft_parameters(self) -> dict[str, nn.Parameter]:
        return {**super().peft_parameters(), "lora_magnitude_vector": self.magnitude}
