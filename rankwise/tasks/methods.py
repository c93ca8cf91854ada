"""Several adapters' changes of one layer made into one: from factors to factors, the dense change is never formed.

What is combined is the weighted sum of the updates, sum of w_i s_i B_i A_i. `cat`, `sum` and `svd` work on that sum:
exact with the ranks added up, exact with the lowest rank, and its best approximation. The others work on the entries of
A and of B, each by itself, as PEFT's `add_weighted_adapter` does (peft 0.21.2): then the result is not that of the
updates, since entries of A and B mean little alone (B A = (B G)(G^-1 A)).

TIES: Yadav et al. 2023, "TIES-Merging: Resolving Interference When Merging Models" (arXiv 2306.01708, algorithm 1).
DARE: Yu et al. 2024, "Language Models are Super Mario" (arXiv 2311.03099, equation 1).

Legend: o outputs, n inputs, r rank; w weight, s scale of an adapter, g = w s; d density.
"""

# torch.linalg has no type stubs.
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from rankwise.adapters.factored import rank_for_energy, singular_values, truncated
from rankwise.errors import RequestError

RELATIVE_ZERO = 2.0**-23
"""A singular value below this share of the norms of what is added up is the rounding of fp32 factors."""
DEFAULT_DENSITY = 0.5

Factors = tuple[Tensor, Tensor]
"""A [r, n] and B [o, r], with scale 1."""


@dataclass(frozen=True)
class Part:
    """One adapter's change of a layer, s B A, and the weight w that it counts with."""

    A: Float[Tensor, "r n"]
    B: Float[Tensor, "o r"]
    scale: float
    weight: float

    @property
    def gain(self) -> float:
        """G = w s."""
        return self.weight * self.scale

    @property
    def rank(self) -> int:
        """R."""
        return self.A.shape[0]


@dataclass(frozen=True)
class Options:
    """What methods take besides the parts; each takes some of it (`Method.takes`).

    Args:
        rank: of the result.
        energy: instead: the share of the squared singular values that stays.
        density: the share of the entries that stays, above 0 and at most 1.
        generator: draws which ones, on the CPU.
    """

    rank: int | None = None
    energy: float | None = None
    density: float = 1.0
    generator: torch.Generator | None = None


# --- the sum of the updates ----------------------------------------------------------------------------------------


def concatenated(parts: Sequence[Part], options: Options) -> Factors:
    """[g_1 B_1, g_2 B_2, ...] and [A_1; A_2; ...]: the sum, of rank sum(r)."""
    return torch.cat([part.A for part in parts]), torch.cat([part.gain * part.B for part in parts], dim=1)


def summed(parts: Sequence[Part], options: Options) -> Factors:
    """The sum, of the lowest rank that it has."""
    A, B = concatenated(parts, options)
    found = truncated(A, B, num_directions(parts))
    return found.A, found.B


def approximated(parts: Sequence[Part], options: Options) -> Factors:
    """The best approximation of the sum, of a rank (by default the highest of the parts), or with a share of energy."""
    A, B = concatenated(parts, options)
    rank = max(part.rank for part in parts) if options.rank is None else options.rank
    if options.energy is not None:
        rank = rank_for_energy(singular_values(A, B), options.energy)
    found = truncated(A, B, min(rank, num_directions(parts)))
    return found.A, found.B


def num_directions(parts: Sequence[Part]) -> int:
    """The rank of the sum; 1 for a sum that is zero."""
    A, B = concatenated(parts, Options())
    return max(1, int((singular_values(A, B) > RELATIVE_ZERO * size_of(parts)).sum()))


def size_of(parts: Sequence[Part]) -> float:
    """The sum of the norms of what is added up."""
    return sum(abs(part.gain) * frobenius(part.A, part.B) for part in parts)


def frobenius(A: Float[Tensor, "r n"], B: Float[Tensor, "o r"]) -> float:
    """The norm of B A, to fp64's rounding, by two thin QR factorisations."""
    _, right = torch.linalg.qr(A.double().T)
    _, left = torch.linalg.qr(B.double())
    return float(torch.linalg.norm(left @ right.T))


def distance(result: Factors, parts: Sequence[Part]) -> tuple[float, float]:
    """Frobenius norms of the result less the sum, and of the sum; 0 for a sum that is rounding."""
    A, B = concatenated(parts, Options())
    new_A, new_B = result[0].double(), result[1].double()
    whole = frobenius(A, B)
    apart = frobenius(torch.cat([A.double(), new_A]), torch.cat([B.double(), -new_B], dim=1))
    return apart, whole if whole > RELATIVE_ZERO * size_of(parts) else 0.0


# --- entry by entry ------------------------------------------------------------------------------------------------

Thin = Callable[[Tensor, Options], Tensor]
Merge = Callable[[Sequence[Tensor], Sequence[float]], Tensor]


def all_kept(tensor: Tensor, options: Options) -> Tensor:
    """The tensor as it is."""
    return tensor


def largest_kept(tensor: Tensor, options: Options) -> Tensor:
    """The share d of the entries that is largest by magnitude; zero elsewhere.

    Raises: RequestError where that is not one entry.
    """
    count = int(options.density * tensor.numel())
    if count == tensor.numel():
        return tensor
    if not count:
        raise RequestError(
            f"density {options.density:g} leaves nothing of a factor of {tensor.numel()} entries; ask for more"
        )
    kept = tensor.flatten().abs().topk(count).indices
    mask = torch.zeros(tensor.numel(), dtype=torch.bool)
    mask[kept] = True
    return tensor * mask.reshape(tensor.shape)


def some_kept(tensor: Tensor, options: Options) -> Tensor:
    """Each entry with probability d, divided by d; zero elsewhere (DARE)."""
    if options.density == 1:
        return tensor
    mask = torch.bernoulli(torch.full(tensor.shape, options.density), generator=options.generator)
    return tensor * mask / options.density


def added(tensors: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    """The weighted sum."""
    return torch.stack([weight * tensor for tensor, weight in zip(tensors, weights, strict=True)]).sum(0)


def agreed(tensors: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    """Where signs differ, the sign with the larger sum counts; the mean of the weighted entries that have it (TIES).

    Signs are elected before weights, as in PEFT: a negative weight turns what was elected.
    """
    stacked = torch.stack(list(tensors))
    elected = torch.where(stacked.sum(0) >= 0, 1.0, -1.0).to(stacked)
    agrees = stacked.sign() == elected
    counted = torch.stack([weight * tensor for tensor, weight in zip(tensors, weights, strict=True)]) * agrees
    return counted.sum(0) / agrees.sum(0).clamp(min=1)


def of_factors(thin: Thin, merge: Merge) -> Callable[[Sequence[Part], Options], Factors]:
    """A method that merges the A's and the B's, each weighted with sqrt(|g|), A with the sign of g as well.

    Of lower ranks the missing rows and columns are zero.
    """

    def combine(parts: Sequence[Part], options: Options) -> Factors:
        rank = max(part.rank for part in parts)
        sizes = [math.sqrt(abs(part.gain)) for part in parts]
        signed = [math.copysign(size, part.gain) for size, part in zip(sizes, parts, strict=True)]
        As = [F.pad(thin(part.A, options), (0, 0, 0, rank - part.rank)) for part in parts]
        Bs = [F.pad(thin(part.B, options), (0, rank - part.rank)) for part in parts]
        return merge(As, signed), merge(Bs, sizes)

    return combine


# --- the table -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Method:
    """One way to combine.

    Args:
        combine: from parts (fp64) to A and B, with scale 1.
        takes: names of the `Options` that have an effect.
        most_rank: what the result's rank can be at most, from the parts' ranks.
        is_mean: whether it takes means, so that weights of 1 are the usual ones.
        is_ordered: whether the order of the adapters matters.
    """

    combine: Callable[[Sequence[Part], Options], Factors]
    takes: frozenset[str] = frozenset()
    most_rank: Callable[[Sequence[int], Options], int] = lambda ranks, _: max(ranks)
    is_mean: bool = False
    is_ordered: bool = False


def _most_approximated(ranks: Sequence[int], options: Options) -> int:
    if options.energy is not None:
        return sum(ranks)
    return min(sum(ranks), options.rank or max(ranks))


PRUNES, DRAWS, CUTS = frozenset({"density"}), frozenset({"density", "seed"}), frozenset({"rank", "energy"})

METHODS: dict[str, Method] = {
    "linear": Method(of_factors(all_kept, added)),
    "sum": Method(summed, most_rank=lambda ranks, _: sum(ranks)),
    "cat": Method(concatenated, most_rank=lambda ranks, _: sum(ranks)),
    "svd": Method(approximated, CUTS, most_rank=_most_approximated),
    "ties": Method(of_factors(largest_kept, agreed), PRUNES, is_mean=True),
    "dare_linear": Method(of_factors(some_kept, added), DRAWS, is_ordered=True),
    "dare_ties": Method(of_factors(some_kept, agreed), DRAWS, is_mean=True, is_ordered=True),
    "magnitude_prune": Method(of_factors(largest_kept, added), PRUNES),
}
"""What `--method` can be. Each is held to the same properties by tests/tasks/test_methods.py."""
