"""What adapters of rank r have in common: the factors A and B, their scale, and the frozen start where there is one.

Legend: o outputs, n inputs of the layer's matrix view, r rank, s scale (alpha/r, or alpha/sqrt(r) with `use_rslora`).
"""

from __future__ import annotations

import math
from abc import abstractmethod

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int64
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D
from typing_extensions import override

from rankwise.adapters.base import AdapterLayer
from rankwise.adapters.config import LoraConfig, start_iterations, start_name
from rankwise.adapters.dropout import keep_rule
from rankwise.adapters.factored import truncated
from rankwise.adapters.fused import Factors, lora_linear
from rankwise.adapters.layers import LayerKind
from rankwise.adapters.sharing import Derived, Readers
from rankwise.adapters.starts import FROM_DATA, STARTS, TAKEN_FROM_BASE, Directions, StartRequest, zero_table
from rankwise.errors import RequestError
from rankwise.quantized import computes_by_weight, is_quantized

HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
"""Where a module keeps those who listen to its calls."""
FUSED = (nn.Linear, Conv1D)
"""Layers, subclasses excepted, whose forward is known to be x W^T + b."""
DECODED_ROWS, DECODED_PRODUCT = 32, 4096
"""Up to so many rows, and rows times rank, calls cost more than arithmetic, and fp32 products less than bf16 ones: the
shortest way took 0.70 to 0.94 of the time of a whole model that the fused one took (60M and 200M, ranks 1 to 64, one
thread with AVX512-BF16), in fp32 0.91 to 0.96. From 64 rows on they are even."""


def scale_of(alpha: int | float, rank: int, use_rslora: bool) -> float:
    """s: alpha/r, or alpha/sqrt(r) (Kalajdzievski 2023, arXiv 2312.03732, theorem 3.2)."""
    return alpha / math.sqrt(rank) if use_rslora else alpha / rank


class LowRankLayer(AdapterLayer):
    """A layer with factors A and B. What is done with s B A, less the start that is subtracted, is the subclass's.

    `config` is the adapter's, with this layer's own `r` and `lora_alpha`.
    """

    lora_A: nn.Parameter  # noqa: N815 (the paper's names, and PEFT's)
    lora_B: nn.Parameter  # noqa: N815
    start_A: Tensor | None  # noqa: N815
    start_B: Tensor | None  # noqa: N815

    def __init__(self, base: nn.Module, kind: LayerKind, config: LoraConfig, name: str) -> None:
        super().__init__(base)
        self.kind = kind
        self.alpha = config.lora_alpha
        self.use_rslora = config.use_rslora
        self.dropout = config.lora_dropout
        self.keep_rule = keep_rule(config.lora_dropout) if config.lora_dropout else None
        self.readers: Readers | None = None
        """Those who read the same input, this layer among them."""
        self._derived = Derived(), Derived()
        self.prefix: int | None = None
        """While set, the layer is the adapter of this rank that its first rows of A and columns of B are."""
        shape_A, shape_B = kind.factor_shapes(base, config.r)
        self.lora_A = nn.Parameter(torch.empty(shape_A, device=self.weight.device))
        self.lora_B = nn.Parameter(torch.empty(shape_B, device=self.weight.device))
        self.register_buffer("start_A", None)
        self.register_buffer("start_B", None)
        self._name = name

    @property
    @override
    def rank(self) -> int:
        return self.lora_A.shape[0]

    @property
    def scale(self) -> float:
        """The scale, s."""
        return scale_of(self.alpha, self.prefix or self.rank, self.use_rslora)

    def used(self) -> tuple[Tensor, Tensor]:
        """A and B, or the first rows and columns of them (see `prefix`)."""
        if self.prefix is None:
            return self.lora_A, self.lora_B
        return self.lora_A[: self.prefix], self.lora_B[:, : self.prefix]

    def terms(self) -> list[tuple[Tensor, Tensor]]:
        """The pairs (A, B) whose products add up to the change: the trained one, and A0 with -B0 of a frozen start."""
        if self.start_A is None or self.start_B is None:
            return [self.used()]
        return [self.used(), (self.start_A, -self.start_B)]

    def start_(
        self, config: LoraConfig, generator: torch.Generator | None = None, directions: Directions | None = None
    ) -> None:
        """Fills A and B as `init_lora_weights` says. The base is read, never written. `directions`: for FROM_DATA."""
        name = start_name(config.init_lora_weights)
        request = StartRequest(
            self.lora_B.shape[0], self.lora_A[0].numel(), self.rank, self.scale,
            matrix=lambda: self.kind.matrix(self.base_weight()).float(),
            generator=generator, iterations=start_iterations(config.init_lora_weights), layer=self._name,
            directions=directions,
        )  # fmt: skip
        start = {**STARTS, **FROM_DATA}[name]
        if not self.kind.drops_input and name in {"kaiming", "gaussian"}:
            start = zero_table
        A, B = start(request)
        with torch.no_grad():
            self.lora_A.copy_(A.reshape(self.lora_A.shape))
            self.lora_B.copy_(B.reshape(self.lora_B.shape))
            (self.lora_B if start is zero_table else self.lora_A).mul_(math.sqrt(config.init_scale))
        if name in TAKEN_FROM_BASE:
            self.start_A, self.start_B = self.lora_A.detach().clone(), self.lora_B.detach().clone()

    def forward(self, x: Tensor) -> Tensor:
        """The base with the change, or the base alone while not active."""
        return self.adapted(x) if self.active else self.base(x)

    @abstractmethod
    def adapted(self, x: Tensor, other: Tensor | None = None) -> Tensor:
        """The base with the change. With `other` the input is silu(x) * other, which is not kept for backward."""

    def added(self, x: Tensor, other: Tensor | None = None) -> Tensor:
        """base(x) + s B A dropout(x), less the frozen start; `other` as in `adapted`."""
        if not torch.is_grad_enabled() and self._decodes(x):
            return self._decoded(x if other is None else F.silu(x) * other)
        if not self._can_fuse(x):
            if other is not None:
                x = F.silu(x) * other
            y = self.base(x)
            return y + self.change(x).to(y.dtype)
        rule = self.keep_rule if self.training else None
        factors = self._factors(x, shared=rule is None and other is None and self.prefix is None)
        if is_quantized(self.base):
            bias = None if self.bias is None else self.bias.to(x.dtype)
            return lora_linear(x, self.base, bias, factors, rule, other)
        return lora_linear(x, self.kind.matrix(self.weight), self.bias, factors, rule, other)

    def _decodes(self, x: Tensor) -> bool:
        """Whether x has few rows to evaluate, and the base's output can be written to: its own code, no listener.

        A token through a large model calls hundreds of layers: what is looked up here is what must be, past
        `nn.Module`'s slow attributes.
        """
        base, A = self._modules["base"], self._parameters.get("lora_A")
        assert base is not None
        return (
            A is not None  # as a parameter: a replica of nn.DataParallel has none
            and (rows := x.numel() // A.shape[-1]) <= DECODED_ROWS
            and rows * A.shape[0] <= DECODED_PRODUCT
            and self.prefix is None
            and (type(base) in FUSED or is_quantized(base))
            and x.element_size() <= A.element_size()
            and not base._forward_hooks  # pyright: ignore[reportUnknownMemberType]
            and not self.training  # reentrant checkpointing computes without gradients what it computes again with
            and self._buffers["start_A"] is None
            and "forward" not in vars(base)
            and not torch.is_autocast_enabled(x.device.type)
        )

    def _decoded(self, x: Tensor) -> Tensor:
        """Casting x costs less than casting A and B, and fp32 products of a few rows less than bf16 ones.

        Of one row, products of a matrix and a vector cost a third less still: most of it is calls.
        """
        A, B = self._parameters["lora_A"], self._parameters["lora_B"]
        assert A is not None and B is not None
        y = self.base(x)
        scale = scale_of(self.alpha, A.shape[0], self.use_rslora)
        if x.numel() == A.shape[1] and y.is_contiguous():
            y.view(-1).add_(torch.mv(B, torch.mv(A, x.reshape(-1).to(A.dtype))), alpha=scale)
            return y
        return y.add_(F.linear(F.linear(x.to(A.dtype), A), B), alpha=scale)

    def _factors(self, x: Tensor, shared: bool) -> Factors:
        """The factors, cast and with x A^T where another layer has computed it. A compiler shares by itself."""
        A, B = self.used()
        if torch.compiler.is_compiling():
            return Factors(A, B, self.scale, A.detach().to(x.dtype), B.detach().to(x.dtype))
        of_A, of_B = self._derived
        up = of_B.stacked((B,), x.dtype)
        read = self.readers.read(self, x) if shared and self.readers is not None else None
        # all that may hold a copy is dropped, whichever is used now: dropout uses the one, evaluation the other
        derived = self._derived if self.readers is None else (*self._derived, self.readers.derived)
        if read is None:
            return Factors(A, B, self.scale, of_A.stacked((A,), x.dtype), up, derived=derived)
        down, h = read
        return Factors(A, B, self.scale, down, up, h, derived)

    def _can_fuse(self, x: Tensor) -> bool:
        """A plain or quantised frozen linear layer that nobody listens to, without a subtracted start or autocast.

        Hooks and forwards replaced on the instance (offloading does both) act only when the base itself is called. A
        compiler draws random numbers its own way: there dropout takes the plain path; so do quantised layers.
        """
        base = self.base
        drops = self.training and self.dropout > 0
        if is_quantized(base):
            is_known = computes_by_weight(base, x) and not torch.compiler.is_compiling()
        else:
            is_known = type(base) in FUSED and x.dtype == self.weight.dtype and "forward" not in vars(base)
        return (
            is_known
            and not self.weight.requires_grad
            and not self.weight.is_meta
            and not any(vars(base)[hooks] for hooks in HOOKS)
            and self.start_A is None
            and not (drops and (self.keep_rule is None or torch.compiler.is_compiling()))
            and not torch.is_autocast_enabled(x.device.type)
        )

    def change(self, x: Tensor) -> Tensor:
        """The change s B A dropout(x), less the frozen start, in the dtype of the base's output."""
        dtype = x.dtype if self.kind.drops_input else self.weight.dtype
        if self.kind.drops_input:
            x = F.dropout(x, self.dropout, self.training)
        first, *start = [
            self.kind.up(self.base, self.kind.down(self.base, x, A.to(dtype)) * self.scale, B.to(dtype))
            for A, B in self.terms()
        ]
        return first + start[0] if start else first

    def delta(self) -> Float[Tensor, "o n"]:
        """The change as a matrix, in fp32."""
        with torch.autocast(self.lora_A.device.type, enabled=False):
            first, *start = [B.flatten(1) @ A.flatten(1) for A, B in self.terms()]
            return (first + start[0] if start else first) * self.scale

    def joined(self) -> tuple[Tensor, Tensor]:
        """One A and one B that mean the whole change: [A; A0] and [B, -B0] (PEFT's conversion of PiSSA to LoRA)."""
        every_A, every_B = zip(*self.terms(), strict=True)
        return torch.cat(every_A), torch.cat(every_B, dim=1)

    @override
    def peft_parameters(self) -> dict[str, nn.Parameter]:
        return {self.kind.a_key: self.lora_A, self.kind.b_key: self.lora_B}

    @override
    def to_peft(self) -> dict[str, Tensor]:
        A, B = self.joined()
        return {**super().to_peft(), self.kind.a_key: A.detach(), self.kind.b_key: B.detach()}

    @override
    def resize_(
        self,
        rank: int,
        generator: torch.Generator | None = None,
        rows: Float[Tensor, "k n"] | None = None,
        alpha: float | None = None,
    ) -> float:
        """See `AdapterLayer.resize_`. The parameters are replaced: an optimiser must be told (`rw.set_ranks`).

        A growth takes new rows of A from `rows`, and random ones where those are too few. `alpha`: from now on (the
        present one by default). The error is that of the whole change, relative to its norm; a frozen start becomes
        part of what is approximated, and is zero afterwards.
        """
        if rank <= 0:
            raise RequestError(f"rank of '{self._name}' must be a positive whole number, not {rank!r}")
        alpha = self.alpha if alpha is None else alpha
        ratio = self.scale / scale_of(alpha, rank, self.use_rslora)
        with torch.no_grad():
            grows = rank >= self.rank
            A, B, error = self._grown(rank, ratio, generator, rows) if grows else self._shrunk(rank, ratio)
            if self.start_B is not None and grows:
                self.start_B = self.start_B * ratio
            elif self.start_B is not None:
                self.start_A, self.start_B = A.clone(), torch.zeros_like(B)
        self.alpha = alpha
        self.lora_A = nn.Parameter(A, requires_grad=self.lora_A.requires_grad)
        self.lora_B = nn.Parameter(B, requires_grad=self.lora_B.requires_grad)
        return error

    @torch.no_grad()
    def select_(self, chosen: Int64[Tensor, " p"]) -> None:
        """Keeps the chosen rows of A and columns of B, rescaled; parameters are replaced as by `resize_`."""
        ratio = self.scale / scale_of(self.alpha, len(chosen), self.use_rslora)
        if self.start_B is not None:
            self.start_B = self.start_B * ratio
        A, B = self.lora_A[chosen], self.lora_B[:, chosen] * ratio
        self.lora_A = nn.Parameter(A, requires_grad=self.lora_A.requires_grad)
        self.lora_B = nn.Parameter(B, requires_grad=self.lora_B.requires_grad)

    def _grown(
        self, rank: int, ratio: float, generator: torch.Generator | None, rows: Tensor | None
    ) -> tuple[Tensor, Tensor, float]:
        """New rows of A given or random, new columns of B zero, old columns rescaled by the ratio of the scales."""
        shape_A, shape_B = self.kind.factor_shapes(self.base, rank - self.rank)
        bound = 1.0 / math.sqrt(self.lora_A[0].numel())
        new = torch.empty(shape_A).uniform_(-bound, bound, generator=generator).to(self.lora_A)
        if rows is not None:
            new[: len(rows)] = rows.reshape(-1, *shape_A[1:]).to(new)
        columns = self.lora_B.new_zeros(shape_B)
        return torch.cat([self.lora_A, new]), torch.cat([self.lora_B * ratio, columns], dim=1), 0.0

    def _shrunk(self, rank: int, ratio: float) -> tuple[Tensor, Tensor, float]:
        """The best rank-`rank` approximation of the change (see `rankwise.adapters.factored.truncated`)."""
        joined_A, joined_B = self.joined()
        found = truncated(joined_A.flatten(1), joined_B.flatten(1), rank)
        shape_A, shape_B = self.kind.factor_shapes(self.base, rank)
        return (
            found.A.reshape(shape_A).to(self.lora_A), (found.B * ratio).reshape(shape_B).to(self.lora_B), found.error
        )  # fmt: skip
