"""LoRA: y = base(x) + s B A dropout(x), on every kind of layer in `rankwise.adapters.layers`.

Hu et al. 2021, "LoRA: Low-Rank Adaptation of Large Language Models" (arXiv 2106.09685, equation 3).
Legend: o outputs, n inputs of the layer's matrix view, r rank, s scale (alpha/r, or alpha/sqrt(r) with `use_rslora`).
"""

# torch.linalg has no type stubs.
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import final

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn
from typing_extensions import override

from rankwise.adapters.base import AdapterLayer, LowRank
from rankwise.adapters.config import LoraConfig, start_iterations, start_name
from rankwise.adapters.fused import lora_linear
from rankwise.adapters.layers import LayerKind
from rankwise.adapters.starts import STARTS, TAKEN_FROM_BASE, StartRequest, zero_table
from rankwise.errors import RequestError


@dataclass(frozen=True)
class LayerSettings:
    """What one layer is given: its own rank and alpha, and the shared settings."""

    r: int
    lora_alpha: int | float
    use_rslora: bool = False
    lora_dropout: float = 0.0
    init_lora_weights: bool | str = True
    init_scale: float = 1.0

    @staticmethod
    def of(config: LoraConfig, r: int, lora_alpha: int | float) -> LayerSettings:
        """The settings of one layer under `config`."""
        return LayerSettings(
            r, lora_alpha, config.use_rslora, config.lora_dropout, config.init_lora_weights, config.init_scale
        )


def scale_of(alpha: int | float, rank: int, use_rslora: bool) -> float:
    """s: alpha/r, or alpha/sqrt(r) (Kalajdzievski 2023, arXiv 2312.03732, theorem 3.2)."""
    return alpha / math.sqrt(rank) if use_rslora else alpha / rank


class Factors(nn.Module):
    """A and B of one layer with their scale, and the frozen start that is subtracted, if there is one."""

    lora_A: nn.Parameter  # noqa: N815 (the paper's names, and PEFT's)
    lora_B: nn.Parameter  # noqa: N815
    start_A: Tensor | None  # noqa: N815
    start_B: Tensor | None  # noqa: N815

    def __init__(self, base: nn.Module, kind: LayerKind, settings: LayerSettings, name: str) -> None:
        super().__init__()
        self.kind = kind
        self.alpha = settings.lora_alpha
        self.use_rslora = settings.use_rslora
        self.dropout = settings.lora_dropout
        self.num_outputs, self.a_tail, self.b_tail = kind.sizes(base)
        assert isinstance(base.weight, Tensor)
        device = base.weight.device
        A = torch.empty(settings.r, *self.a_tail, device=device)
        B = torch.empty(self.num_outputs, settings.r, *self.b_tail, device=device)
        self.lora_A, self.lora_B = nn.Parameter(A), nn.Parameter(B)
        self.register_buffer("start_A", None)
        self.register_buffer("start_B", None)
        self._name = name

    @property
    def rank(self) -> int:
        """The rank, r."""
        return self.lora_A.shape[0]

    @property
    def scale(self) -> float:
        """The scale, s."""
        return scale_of(self.alpha, self.rank, self.use_rslora)

    def start_(self, base: nn.Module, settings: LayerSettings, generator: torch.Generator | None = None) -> None:
        """Fills A and B as `settings.init_lora_weights` says. The base is read, never written."""
        name = start_name(settings.init_lora_weights)
        weight = base.weight
        assert isinstance(weight, Tensor)
        request = StartRequest(
            self.num_outputs, math.prod(self.a_tail), self.rank, self.scale,
            matrix=lambda: self.kind.matrix(weight.detach()).float(),
            generator=generator, iterations=start_iterations(settings.init_lora_weights), layer=self._name,
        )  # fmt: skip
        start = STARTS[name]
        if not self.kind.drops_input and name in {"kaiming", "gaussian"}:
            start = zero_table
        A, B = start(request)
        with torch.no_grad():
            self.lora_A.copy_(A.reshape(self.lora_A.shape))
            self.lora_B.copy_(B.reshape(self.lora_B.shape))
            (self.lora_B if start is zero_table else self.lora_A).mul_(math.sqrt(settings.init_scale))
        if name in TAKEN_FROM_BASE:
            self.start_A, self.start_B = self.lora_A.detach().clone(), self.lora_B.detach().clone()

    def change(self, base: nn.Module, x: Tensor, training: bool) -> Tensor:
        """The change s B A dropout(x), less the frozen start, in the dtype of the base's output."""
        if self.kind.drops_input:
            x = F.dropout(x, self.dropout, training)
            dtype = x.dtype
        else:
            assert isinstance(base.weight, Tensor)
            dtype = base.weight.dtype
        y = self._through(base, x, self.lora_A.to(dtype), self.lora_B.to(dtype))
        if self.start_A is not None and self.start_B is not None:
            y = y - self._through(base, x, self.start_A.to(dtype), self.start_B.to(dtype))
        return y

    def _through(self, base: nn.Module, x: Tensor, A: Tensor, B: Tensor) -> Tensor:
        return self.kind.up(base, self.kind.down(base, x, A) * self.scale, B)

    def low_rank(self) -> LowRank:
        """Both factors as matrices; a frozen start doubles the rank (PEFT's conversion of PiSSA to LoRA)."""
        A, B = self.saved_factors()
        return LowRank(A.flatten(1), B.flatten(1), self.scale)

    def saved_factors(self) -> tuple[Tensor, Tensor]:
        """A and B that mean the whole change at scale s: [A; A0] and [B, -B0] where a start is subtracted."""
        if self.start_A is None or self.start_B is None:
            return self.lora_A, self.lora_B
        return torch.cat([self.lora_A, self.start_A]), torch.cat([self.lora_B, -self.start_B], dim=1)

    def delta(self) -> Float[Tensor, "o n"]:
        """The change s B A as a matrix, in fp32."""
        with torch.autocast(self.lora_A.device.type, enabled=False):
            delta = self.lora_B.flatten(1) @ self.lora_A.flatten(1)
            if self.start_A is not None and self.start_B is not None:
                delta = delta - self.start_B.flatten(1) @ self.start_A.flatten(1)
            return delta * self.scale

    def resize_(self, rank: int, generator: torch.Generator | None = None) -> float:
        """See `AdapterLayer.resize_`. The parameters are replaced: an optimiser must be told (`rw.set_ranks`)."""
        if rank <= 0:
            raise RequestError(f"rank of '{self._name}' must be a positive whole number, not {rank!r}")
        old_scale, new_scale = self.scale, scale_of(self.alpha, rank, self.use_rslora)
        with torch.no_grad():
            ratio, grows = old_scale / new_scale, rank >= self.rank
            A, B, error = self._grown(rank, ratio, generator) if grows else self._shrunk(rank, ratio)
            if self.start_B is not None:
                self.start_B = self.start_B * ratio
        self.lora_A = nn.Parameter(A, requires_grad=self.lora_A.requires_grad)
        self.lora_B = nn.Parameter(B, requires_grad=self.lora_B.requires_grad)
        return error

    def _grown(self, rank: int, ratio: float, generator: torch.Generator | None) -> tuple[Tensor, Tensor, float]:
        """New rows of A random, new columns of B zero, old columns rescaled by the ratio of the scales."""
        more = rank - self.rank
        bound = 1.0 / math.sqrt(math.prod(self.a_tail))
        rows = torch.empty(more, *self.a_tail).uniform_(-bound, bound, generator=generator).to(self.lora_A)
        columns = self.lora_B.new_zeros(self.num_outputs, more, *self.b_tail)
        return torch.cat([self.lora_A, rows]), torch.cat([self.lora_B * ratio, columns], dim=1), 0.0

    def _shrunk(self, rank: int, ratio: float) -> tuple[Tensor, Tensor, float]:
        """The best rank-`rank` approximation of B A, by QR of the factors and an r x r SVD.

        The singular values go into B and A keeps its size, so that a layer whose B is zero can still learn.
        """
        B, A = self.lora_B.flatten(1).double(), self.lora_A.flatten(1).double()
        Qb, Rb = torch.linalg.qr(B)
        Qa, Ra = torch.linalg.qr(A.T)
        U, S, Vh = torch.linalg.svd(Rb @ Ra.T)
        row_norm = float(torch.linalg.norm(A) / math.sqrt(A.shape[0])) or 1.0
        new_A = (Vh[:rank] @ Qa.T) * row_norm
        new_B = (Qb @ U[:, :rank]) * S[:rank] * (ratio / row_norm)
        whole = float(torch.linalg.norm(S))
        error = float(torch.linalg.norm(S[rank:])) / whole if whole else 0.0
        shape_A, shape_B = (rank, *self.a_tail), (self.num_outputs, rank, *self.b_tail)
        return new_A.reshape(shape_A).to(self.lora_A), new_B.reshape(shape_B).to(self.lora_B), error

    def to_peft(self) -> dict[str, Tensor]:
        """Tensors under PEFT's names."""
        A, B = self.saved_factors()
        return {self.kind.a_key: A.detach(), self.kind.b_key: B.detach()}

    def peft_shapes(self) -> dict[str, tuple[int, ...]]:
        """Shapes that `from_peft` needs."""
        return {self.kind.a_key: tuple(self.lora_A.shape), self.kind.b_key: tuple(self.lora_B.shape)}

    def from_peft(self, tensors: dict[str, Tensor]) -> None:
        """Copies A and B in; a frozen start stays."""
        with torch.no_grad():
            self.lora_A.copy_(tensors[self.kind.a_key])
            self.lora_B.copy_(tensors[self.kind.b_key])


@final
class LoraLayer(AdapterLayer):
    """LoRA on one layer."""

    def __init__(self, base: nn.Module, kind: LayerKind, settings: LayerSettings, name: str) -> None:
        super().__init__(base)
        self.factors = Factors(base, kind, settings, name)

    def start_(self, settings: LayerSettings, generator: torch.Generator | None = None) -> None:
        """Fills the factors; see `Factors.start_`."""
        self.factors.start_(self.base, settings, generator)

    @property
    @override
    def rank(self) -> int:
        return self.factors.rank

    @property
    @override
    def holds_start(self) -> bool:
        return self.factors.start_A is not None

    def forward(self, x: Tensor) -> Tensor:
        """base(x) + s B A dropout(x)."""
        if not self.active:
            return self.base(x)
        if self._can_fuse(x):
            factors = self.factors
            return lora_linear(x, self.weight, self.bias, factors.lora_A, factors.lora_B, factors.scale)
        y = self.base(x)
        return y + self.factors.change(self.base, x, self.training).to(y.dtype)

    def _can_fuse(self, x: Tensor) -> bool:
        """A plain frozen linear layer without dropout or a subtracted start, outside of autocast."""
        return (
            type(self.base) is nn.Linear
            and x.dtype == self.weight.dtype
            and not self.weight.requires_grad
            and not self.holds_start
            and not (self.training and self.factors.dropout)
            and not torch.is_autocast_enabled(x.device.type)
        )

    @override
    def delta_weight(self) -> Float[Tensor, "..."]:
        return self.factors.kind.weight(self.factors.delta(), self.base)

    @override
    def resize_(self, rank: int, generator: torch.Generator | None = None) -> float:
        return self.factors.resize_(rank, generator)

    @override
    def low_rank(self) -> LowRank:
        return self.factors.low_rank()

    @override
    def to_peft(self) -> dict[str, Tensor]:
        return self.factors.to_peft()

    @override
    def peft_shapes(self) -> dict[str, tuple[int, ...]]:
        return self.factors.peft_shapes()

    @override
    def from_peft(self, tensors: dict[str, Tensor]) -> None:
        self.factors.from_peft(tensors)
