"""Several adapters on one layer, as one adapter layer: y = base(x) + sum_i s_i ((x A_i^T) * c_i) B_i^T.

The base counts once. The factors of all adapters lie side by side, A of R = sum r_i rows and B of R columns, and each
column has a coefficient: of a gate, the share of its adapter, which may differ by row or by token (one product for a
batch of mixed tasks); of a task embedding, the task's vector, B diag(e_t) A. What the shares are, a `Mixture` says.

What there is like it, and how this differs: X-LoRA (Buehler and Buehler 2024, arXiv 2402.07148) and mixtures of LoRA
experts compute shares from the input of each token, and can't be folded into one adapter; Poly (Ponti et al. 2022,
arXiv 2202.13914) learns shares by task. The vector that scales a rank space is that of LoRA's SVD form in AdaLoRA
(Zhang et al. 2023, arXiv 2303.10512, equation 3), one for each task.

Legend: R columns of all adapters, r_i of adapter i, b rows, or rows and tokens, T tasks.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import final

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int64
from torch import Tensor, nn
from typing_extensions import override

from rankwise.adapters.base import AdapterLayer, LowRank
from rankwise.adapters.layers import ConvolutionKind, LayerKind, LinearKind
from rankwise.adapters.mixture import Mixture
from rankwise.adapters.sharing import Derived
from rankwise.errors import RequestError

TOKENS_BY_ROW = 16
"""Tokens of a row from which on its own adapter alone costs less than all adapters side by side."""
ALWAYS = -1
"""In place of a task's number: the adapter takes part whatever the task is."""


@dataclass(frozen=True)
class Member:
    """One adapter of a gate on one layer. `task`: the number of its task, or ALWAYS."""

    name: str
    task: int
    A: Tensor
    B: Tensor
    scale: float
    dropout: float = 0.0


@final
class GateLayer(AdapterLayer):
    """The layer `base` with the adapters `members`, in the shares that `mixture` says.

    Args:
        group: which logits of the mixture are this layer's.
        entries: for a task embedding: where this layer's part of the vectors begins.
    """

    columns: Tensor
    scales: Tensor

    def __init__(
        self,
        base: nn.Module,
        kind: LayerKind,
        name: str,
        members: Sequence[Member],
        mixture: Mixture,
        group: int = 0,
        entries: int = 0,
    ) -> None:
        super().__init__(base)
        assert members and (mixture.embedding is None or len(members) == 1)
        self.kind = kind
        self.names = tuple(member.name for member in members)
        self.owners = tuple(member.task for member in members)
        self.member_scales = tuple(member.scale for member in members)
        self.dropout = max(member.dropout for member in members)
        self.group = group
        self.entries = entries
        self._name = name
        self._mixture = (mixture,)  # in a tuple, it is no submodule: it belongs to the model
        self._derived = Derived(), Derived()
        self._stacked = Derived(), Derived()
        self._spread: tuple[Tensor, Tensor] | None = None
        """Shares that were asked for last, and their coefficients."""
        ends = [0, *accumulate(member.A.shape[0] for member in members)]
        self._places = [slice(*pair) for pair in pairwise(ends)]
        """Where each member's columns are."""
        self.lora_A = nn.ParameterList([nn.Parameter(member.A) for member in members])
        self.lora_B = nn.ParameterList([nn.Parameter(member.B) for member in members])
        last = len(mixture.tasks)
        owners = [last if member.task == ALWAYS else member.task for member in members]
        ranks = [member.A.shape[0] for member in members]
        device = self.weight.device
        columns = torch.tensor(owners).repeat_interleave(torch.tensor(ranks))
        scales = torch.tensor(self.member_scales).repeat_interleave(torch.tensor(ranks))
        self.register_buffer("columns", columns.to(device), persistent=False)
        self.register_buffer("scales", scales.to(device), persistent=False)

    @property
    def mixture(self) -> Mixture:
        """What says the shares."""
        return self._mixture[0]

    @property
    @override
    def rank(self) -> int:
        return len(self.scales)

    def forward(self, x: Tensor) -> Tensor:
        """The base with the adapters' shares, or the base alone while not active.

        Raises: RequestError when no task is given and one is needed, or ids don't fit the rows of `x`.
        """
        y = self.base(x)
        if not self.active:
            return y
        dtype = x.dtype if self.kind.drops_input else self.weight.dtype
        if self.kind.drops_input and self.dropout:
            x = F.dropout(x, self.dropout, self.training)
        if (rows := self._rows(x)) is not None:
            return y + self._row_by_row(x, rows, dtype).to(y.dtype)
        members, coefficients = self._chosen()
        if not members:
            return y
        A, B = self._joined(members, dtype)
        h = self.kind.down(self.base, x, A)
        h = h * self._over(coefficients, h).to(h.dtype)
        return y + self.kind.up(self.base, h, B).to(y.dtype)

    def _rows(self, x: Tensor) -> Int64[Tensor, " B"] | None:
        """The task of each row of `x`, where that is cheaper than all adapters for all rows: rows of several tokens."""
        mixture = self.mixture
        if mixture.embedding is not None or not isinstance(self.kind, LinearKind) or x.dim() != 3:
            return None
        rows = mixture.rows() if x.shape[1] >= TOKENS_BY_ROW else None
        if rows is None or x.shape[0] % len(rows):
            return None
        return rows.to(x.device).repeat_interleave(x.shape[0] // len(rows))

    def _row_by_row(self, x: Float[Tensor, "B T n"], rows: Int64[Tensor, " B"], dtype: torch.dtype) -> Tensor:
        """Each row through the factors of its own task."""
        A, B = tuple(self.lora_A), tuple(self.lora_B)
        if torch.is_grad_enabled() or torch.compiler.is_compiling():
            down, up = self._by_task(0, dtype), self._by_task(1, dtype)
        else:
            of_A, of_B = self._stacked
            down, up = of_A.of(A, lambda: self._by_task(0, dtype)), of_B.of(B, lambda: self._by_task(1, dtype))
            if down.dtype != dtype:  # made for other arithmetic
                down, up = down.to(dtype), up.to(dtype)
        h = torch.bmm(x, down.index_select(0, rows).transpose(1, 2))
        return torch.bmm(h, up.index_select(0, rows).transpose(1, 2))

    def _by_task(self, dim: int, dtype: torch.dtype) -> Float[Tensor, "T ..."]:
        """A (dim 0) or s B (dim 1) of each task's adapters, padded with zeros to the highest rank."""
        factors = (
            list(self.lora_A) if dim == 0 else [B * s for B, s in zip(self.lora_B, self.member_scales, strict=True)]
        )
        none = factors[0].narrow(dim, 0, 0)
        of_tasks = [
            torch.cat([none, *(factors[i] for i, owner in enumerate(self.owners) if owner in (task, ALWAYS))], dim)
            for task in range(len(self.mixture.tasks))
        ]
        most = max(one.shape[dim] for one in of_tasks)
        before = (0, 0) if dim == 0 else ()  # of the dimensions behind the one that is padded
        return torch.stack([F.pad(one, (*before, 0, most - one.shape[dim])) for one in of_tasks]).to(dtype)

    def _chosen(self) -> tuple[list[int], Float[Tensor, "*b R"]]:
        """The members that may take part, and the coefficients of their columns, scale included."""
        mixture = self.mixture
        chosen = mixture.chosen(self.group)
        every = list(range(len(self.owners)))
        if mixture.embedding is not None:
            return every, mixture.scaling(chosen, self.entries, self.entries + self.rank) * self.scales
        if isinstance(chosen, int):
            members = [i for i in every if self.owners[i] in (chosen, ALWAYS)]
            if len(members) == len(every):
                return every, self.scales
            parts = [self.scales[self._places[i]] for i in members]
            return members, parts[0] if len(parts) == 1 else torch.cat([*parts, self.scales[:0]])
        if self._spread is not None and self._spread[0] is chosen:
            return every, self._spread[1]
        moved = chosen.to(self.columns.device)
        shares = torch.cat([moved, moved.new_ones(*moved.shape[:-1], 1)], dim=-1)
        coefficients = shares[..., self.columns] * self.scales
        self._spread = None if coefficients.requires_grad else (chosen, coefficients)
        return every, coefficients

    def _joined(self, members: Sequence[int], dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """A and B of these members side by side, in `dtype`; kept between calls where no gradient is wanted."""
        A, B = tuple(self.lora_A[i] for i in members), tuple(self.lora_B[i] for i in members)
        if torch.is_grad_enabled() and any(factor.requires_grad for factor in (*A, *B)):
            return torch.cat([a.to(dtype) for a in A]), torch.cat([b.to(dtype) for b in B], dim=1)
        if torch.compiler.is_compiling():
            return _side_by_side(A, 0, dtype), _side_by_side(B, 1, dtype)
        of_A, of_B = self._derived
        kept = of_A.of(A, lambda: _side_by_side(A, 0, dtype)), of_B.of(B, lambda: _side_by_side(B, 1, dtype))
        if kept[0].dtype != dtype:  # made for other arithmetic
            return _side_by_side(A, 0, dtype), _side_by_side(B, 1, dtype)
        return kept

    def _over(self, coefficients: Float[Tensor, "*b R"], h: Tensor) -> Tensor:
        """The coefficients in a shape that multiplies h: [rows, ..., R], of a convolution [rows, R, ...].

        Rows that a search or sampling has multiplied stand side by side, and so do the tokens of a row that a model
        lays end to end: each row's coefficients are repeated.
        """
        is_convolution = isinstance(self.kind, ConvolutionKind)
        lead = coefficients.shape[:-1]
        if len(lead) == 2 and not is_convolution:
            if h.shape[:2] == lead and h.dim() == 3:
                return coefficients
            if h.dim() == 2 and h.shape[0] == lead[0] * lead[1]:
                return coefficients.flatten(0, 1)
        if len(lead) == 2:
            raise RequestError(
                f"tasks of {lead[0]} x {lead[1]} tokens don't fit what '{self._name}' reads, {list(h.shape[:-1])}; "
                "give one task for each row instead"
            )
        if len(lead) == 1:
            if h.shape[0] % lead[0]:
                raise RequestError(
                    f"{lead[0]} rows have a task where '{self._name}' reads {h.shape[0]}; give one task for each row"
                )
            coefficients = coefficients.repeat_interleave(h.shape[0] // lead[0], dim=0)
        between = [1] * (h.dim() - 2)
        shape = [*coefficients.shape, *between] if is_convolution else [*coefficients.shape[:-1], *between, -1]
        return coefficients.view(shape) if lead or is_convolution else coefficients

    def _whole(self) -> tuple[Tensor, Tensor, Float[Tensor, " R"]]:
        """A, B and coefficients of the change, where it is one for all inputs.

        Raises: RequestError where it is not.
        """
        members, coefficients = self._chosen()
        if coefficients.dim() > 1:
            raise RequestError("tasks differ by row, so there is no one change of the weights; choose one task")
        A = torch.cat([self.lora_A[0][:0], *(self.lora_A[i] for i in members)])
        B = torch.cat([self.lora_B[0][:, :0], *(self.lora_B[i] for i in members)], dim=1)
        return A, B, coefficients

    @override
    def low_rank(self) -> LowRank:
        """See `AdapterLayer.low_rank`; of the task that is given, or of a learned gate.

        Raises: RequestError when tasks differ by input and none is given.
        """
        A, B, coefficients = self._whole()
        return LowRank(A.flatten(1), B.flatten(1) * coefficients, 1.0)

    @override
    def delta_weight(self) -> Float[Tensor, "..."]:
        """See `AdapterLayer.delta_weight`. Raises: as `low_rank`."""
        with torch.autocast(self.scales.device.type, enabled=False):
            change = self.low_rank()
            return self.kind.weight(change.B @ change.A, self.base)

    @override
    def peft_parameters(self) -> dict[str, nn.Parameter]:
        """Those of each adapter behind its name: `movies.lora_A.weight`."""
        found: dict[str, nn.Parameter] = {}
        for name, A, B in zip(self.names, self.lora_A, self.lora_B, strict=True):
            found |= {f"{name}.{self.kind.a_key}": A, f"{name}.{self.kind.b_key}": B}
        return found

    @override
    def resize_(self, rank: int, generator: torch.Generator | None = None) -> float:
        """Raises: RequestError always: each adapter has its own rank."""
        raise RequestError(
            f"'{self._name}' holds {len(self.names)} adapters ({', '.join(self.names)}), each with its own rank; set "
            "their ranks before they are put together, or fold them into one"
        )


@torch.no_grad()
def _side_by_side(factors: Sequence[Tensor], dim: int, dtype: torch.dtype) -> Tensor:
    return torch.cat([factor.to(dtype) for factor in factors], dim)
