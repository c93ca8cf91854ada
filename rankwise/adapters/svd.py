"""The leading singular values and vectors of a large matrix: exact where it is small, by subspace iteration else.

Halko, Martinsson and Tropp 2011, "Finding structure with randomness" (arXiv 0909.4061, algorithms 4.4 and 5.1), with
OVERSAMPLING more columns than asked for and POWER_ITERATIONS passes over the matrix and its transpose.
"""

# torch.linalg has no type stubs; Q, U and S are the source's names.
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false
# pyright: reportConstantRedefinition=false

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

OVERSAMPLING = 8
POWER_ITERATIONS = 3
EXACT_UP_TO = 128
"""A matrix whose smaller side is at most this is decomposed exactly."""


def leading_svd(
    matrix: Float[Tensor, "o n"], k: int, generator: torch.Generator | None = None
) -> tuple[Float[Tensor, "o k"], Float[Tensor, " k"], Float[Tensor, "k n"]]:
    """U, S and V^T of the `k` largest singular values (fewer where there are fewer), largest first, in fp32.

    `generator` (on the CPU) draws the first subspace; the same one gives the same result.
    """
    matrix = matrix.float()
    k = min(k, *matrix.shape)
    width = k + OVERSAMPLING
    if min(matrix.shape) <= max(EXACT_UP_TO, width):
        U, S, Vh = torch.linalg.svd(matrix, full_matrices=False)
        return U[:, :k], S[:k], Vh[:k]
    first = torch.empty(matrix.shape[1], width).normal_(generator=generator).to(matrix.device)
    Q, _ = torch.linalg.qr(matrix @ first)
    for _ in range(POWER_ITERATIONS):
        Z, _ = torch.linalg.qr(matrix.T @ Q)
        Q, _ = torch.linalg.qr(matrix @ Z)
    U, S, Vh = torch.linalg.svd(Q.T @ matrix, full_matrices=False)
    return Q @ U[:, :k], S[:k], Vh[:k]
