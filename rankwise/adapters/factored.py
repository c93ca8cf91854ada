"""A product B A seen through its factors: spectrum, effective rank and best approximation, never the dense matrix.

B = Q_B R_B and A^T = Q_A R_A are two thin QR factorisations, and B A = Q_B (R_B R_A^T) Q_A^T: what there is to know of
an o x n matrix is in one of r x r. In fp64 throughout.

Legend: o outputs, n inputs, r rank, k the smallest of the three, p <= r the rank after.
"""

# torch.linalg has no type stubs.
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

ENERGY_ROUNDING = 1e-12
"""A share of energy that is short of the wanted one by less is enough: asked for all of it, noise is not kept."""


@dataclass(frozen=True)
class Truncated:
    """Factors of lower rank. `lost` and `whole`: squared Frobenius norms of what is gone and of all there was."""

    A: Float[Tensor, "p n"]
    B: Float[Tensor, "o p"]
    lost: float
    whole: float

    @property
    def error(self) -> float:
        """Relative Frobenius error; 0 where there was nothing."""
        return relative_error(self.lost, self.whole)


def relative_error(lost: float, whole: float) -> float:
    """Relative Frobenius error of squared norms; 0 where there was nothing."""
    return math.sqrt(lost / whole) if whole else 0.0


def singular_values(A: Float[Tensor, "r n"], B: Float[Tensor, "o r"]) -> Float[Tensor, " k"]:
    """Singular values of B A, largest first, in fp64."""
    _, right = torch.linalg.qr(A.double().T)
    _, left = torch.linalg.qr(B.double())
    return torch.linalg.svdvals(left @ right.T)


def effective_rank(values: Float[Tensor, " k"]) -> float:
    """Exp of the entropy of the normalised singular values; 0 for an update that is zero.

    Roy and Vetterli 2007, "The effective rank: a measure of effective dimensionality" (EUSIPCO, section 2).
    """
    total = values.sum()
    if total == 0:
        return 0.0
    shares = values / total
    return float(torch.special.entr(shares).sum().exp())


def rank_for_energy(values: Float[Tensor, " k"], energy: float) -> int:
    """The lowest rank whose squared singular values are at least the share `energy` of all; at least 1."""
    squares = values.square()
    total = squares.sum()
    if total == 0:
        return 1
    reached = squares.cumsum(0) / total >= energy - ENERGY_ROUNDING
    return int(reached.int().argmax()) + 1 if bool(reached.any()) else len(values)


def truncated(A: Float[Tensor, "r n"], B: Float[Tensor, "o r"], rank: int) -> Truncated:
    """The best approximation of B A of rank `rank` (Eckart and Young 1936), in fp64.

    The singular values go into B. The rows of A are orthogonal, and of the size that A's have in the mean, so that
    training can go on from there. Where `rank` is above k (it is at most r), the rest are rows of the old A, and the
    columns of B zero: they can learn.
    """
    old_A = A.double()
    Q_B, R_B = torch.linalg.qr(B.double())
    Q_A, R_A = torch.linalg.qr(old_A.T)
    U, S, Vh = torch.linalg.svd(R_B @ R_A.T, full_matrices=False)
    size = float(torch.linalg.norm(old_A)) / math.sqrt(A.shape[0]) or 1.0
    missing = max(rank - len(S), 0)
    new_A = torch.cat([(Vh[:rank] @ Q_A.T) * size, old_A[:missing]])
    new_B = F.pad((Q_B @ U[:, :rank]) * (S[:rank] / size), (0, missing))
    squares = S.square()
    return Truncated(new_A, new_B, float(squares[rank:].sum()), float(squares.sum()))


def prefix(A: Float[Tensor, "r n"], B: Float[Tensor, "o r"], rank: int, gain: float) -> Truncated:
    """The first `rank` rows of A and columns of B, as they are; the error is that of `gain` times their product.

    `gain` is the ratio of the scales after and before.
    """
    new_A, new_B = A[:rank], B[:, :rank]
    rest = torch.cat([B.double(), -gain * new_B.double()], dim=1)
    both = torch.cat([A.double(), new_A.double()])
    return Truncated(new_A, new_B, *(float(singular_values(*pair).square().sum()) for pair in ((both, rest), (A, B))))
