"""Where A and B start. A fresh adapter changes nothing: B A is zero, or the frozen start is subtracted.

Starts that take weight out of the base (PiSSA, OLoRA) leave the base alone; the layer keeps a frozen copy of the start
and adds s (B A - B0 A0), which is zero to the last bit at the start.

Legend: o outputs, n inputs of the layer's matrix view, r rank, s scale.
"""

# torch.linalg has no type stubs.
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from rankwise.errors import RequestError

STABLE_GAMMA = 16
"""LoRA-GA's gamma: the authors' choice, and PEFT's."""


@dataclass(frozen=True)
class Directions:
    """What data say about a layer: leading right singular vectors of its inputs, left and right ones of its gradient.

    Each of as many as were measured (i of the inputs, k of the gradient), the largest first.
    """

    inputs: Float[Tensor, "i n"]
    left: Float[Tensor, "o k"]
    right: Float[Tensor, "k n"]


@dataclass(frozen=True)
class StartRequest:
    """What a start needs: sizes, the scale, the base's matrix (only read when asked for), a source of randomness."""

    num_outputs: int
    num_inputs: int
    rank: int
    scale: float
    matrix: Callable[[], Float[Tensor, "o n"]]
    generator: torch.Generator | None
    iterations: int | None
    layer: str
    directions: Directions | None = None


Start = tuple[Float[Tensor, "r n"], Float[Tensor, "o r"]]


def kaiming(request: StartRequest) -> Start:
    """A uniform in +-1/sqrt(n) (Kaiming with a = sqrt 5, as PEFT), B zero: LoRA's own start up to the distribution."""
    bound = 1.0 / math.sqrt(request.num_inputs)
    A = torch.empty(request.rank, request.num_inputs).uniform_(-bound, bound, generator=request.generator)
    return A, torch.zeros(request.num_outputs, request.rank)


def zero_table(request: StartRequest) -> Start:
    """Embeddings: A (the table) zero, B normal, as PEFT: a token's row starts to move when the token is seen."""
    B = torch.empty(request.num_outputs, request.rank).normal_(generator=request.generator)
    return torch.zeros(request.rank, request.num_inputs), B


def random_b(request: StartRequest) -> Start:
    """`init_lora_weights: false`: both factors random (uniform in +-1/sqrt(fan in)). Not the identity; for tests."""
    A, _ = kaiming(request)
    bound = 1.0 / math.sqrt(request.rank)
    B = torch.empty(request.num_outputs, request.rank).uniform_(-bound, bound, generator=request.generator)
    return A, B


def gaussian(request: StartRequest) -> Start:
    """A normal with standard deviation 1/r, B zero (PEFT's `gaussian`)."""
    A = torch.empty(request.rank, request.num_inputs).normal_(0.0, 1.0 / request.rank, generator=request.generator)
    return A, torch.zeros(request.num_outputs, request.rank)


def orthogonal(request: StartRequest) -> Start:
    """Rows of A and columns of B live in orthogonal halves of the rank space, so that B A = 0 although neither is zero.

    Pathak 2025, "Rethinking LoRA initialisation". The halves are the even and the odd coordinates, for which the
    product is zero to the last bit; a random rotation of the rank space would change nothing else.
    """
    A = torch.zeros(request.rank, request.num_inputs)
    B = torch.zeros(request.num_outputs, request.rank)
    A[0::2] = torch.empty_like(A[0::2]).normal_(0.0, 0.1, generator=request.generator)
    B[:, 1::2] = torch.empty_like(B[:, 1::2]).normal_(0.0, 0.1, generator=request.generator)
    return A, B


def pissa(request: StartRequest) -> Start:
    """The principal singular directions of the base (Meng et al. 2024, arXiv 2404.02948, equations 2 to 4).

    With `pissa_niter_N`, a randomised SVD with N power iterations.
    """
    _needs_rank(request, "pissa")
    W = request.matrix()
    if request.iterations is not None:
        parts = torch.svd_lowrank(W, q=request.rank, niter=request.iterations)
    else:
        left, values, right = torch.linalg.svd(W, full_matrices=False)
        parts = left, values, right.T
    U, S, V = parts
    root = torch.sqrt(S[: request.rank] / request.scale)
    return (V[:, : request.rank] * root).T.contiguous(), U[:, : request.rank] * root


def olora(request: StartRequest) -> Start:
    """B orthonormal, A the matching rows of R in W = Q R (Büyükakyüz 2024, arXiv 2406.01775)."""
    _needs_rank(request, "olora")
    Q, R = torch.linalg.qr(request.matrix())
    return R[: request.rank].contiguous(), Q[:, : request.rank].contiguous()


def eva(request: StartRequest) -> Start:
    """A: the leading directions of what enters the layer; B zero (EVA: Paischer et al. 2024, arXiv 2410.07170)."""
    inputs = _measured(request, "eva").inputs
    if request.rank > len(inputs):
        raise RequestError(_too_few("eva", request, request.rank, len(inputs)))
    return inputs[: request.rank], torch.zeros(request.num_outputs, request.rank)


def lora_ga(request: StartRequest) -> Start:
    """A: the r leading right singular vectors of the gradient, B the left ones after these.

    Both times o^(1/4) / sqrt(STABLE_GAMMA), which keeps outputs of one size whatever the width (LoRA-GA: Wang et al.
    2024, arXiv 2407.05000, algorithm 1).
    """
    found, r = _measured(request, "lora_ga"), request.rank
    if 2 * r > len(found.right):
        raise RequestError(_too_few("lora_ga", request, 2 * r, len(found.right)))
    factor = request.num_outputs**0.25 / math.sqrt(STABLE_GAMMA)
    return found.right[:r] * factor, found.left[:, r : 2 * r] * factor


def _measured(request: StartRequest, name: str) -> Directions:
    if request.directions is None:
        raise RequestError(
            f"init_lora_weights={name!r} starts from data, which a run has: set it in a run file, or give attach the "
            "directions of each layer"
        )
    return request.directions


def _too_few(name: str, request: StartRequest, needed: int, there: int) -> str:
    return (
        f"init_lora_weights={name!r} takes {needed} directions for rank {request.rank} of '{request.layer}', which has "
        f"{there}; lower r or set rank_pattern"
    )


def _needs_rank(request: StartRequest, name: str) -> None:
    most = min(request.num_outputs, request.num_inputs)
    if request.rank > most:
        raise RequestError(
            f"init_lora_weights='{name}' takes r={request.rank} directions from '{request.layer}', which has {most}; "
            f"lower r or set rank_pattern"
        )


STARTS: dict[str, Callable[[StartRequest], Start]] = {
    "kaiming": kaiming,
    "random": random_b,
    "gaussian": gaussian,
    "orthogonal": orthogonal,
    "pissa": pissa,
    "olora": olora,
}
"""Every start that `init_lora_weights` can name."""

FROM_DATA: dict[str, Callable[[StartRequest], Start]] = {"eva": eva, "lora_ga": lora_ga}
"""Those that need directions."""

TAKEN_FROM_BASE = frozenset({"pissa", "olora", "lora_ga"})
"""Starts whose product is not zero: the layer keeps a frozen copy and subtracts it."""
