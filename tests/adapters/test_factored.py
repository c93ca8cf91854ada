"""Factors against the dense product in float64."""

from __future__ import annotations

import pytest
import torch

from rankwise.adapters.factored import rank_for_energy, singular_values, truncated


def factors(rank: int, inputs: int, outputs: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(rank)
    return torch.randn(rank, inputs, generator=generator), torch.randn(outputs, rank, generator=generator)


@pytest.mark.parametrize(("inputs", "outputs"), [(12, 20), (20, 12), (5, 20), (20, 5)])
@pytest.mark.parametrize("rank", [1, 3, 7])
def test_truncation_is_the_dense_svds(inputs, outputs, rank):
    A, B = factors(8, inputs, outputs)
    dense = B.double() @ A.double()
    U, S, Vh = torch.linalg.svd(dense, full_matrices=False)
    best = (U * S)[:, :rank] @ Vh[:rank]
    found = truncated(A, B, rank)
    assert found.A.shape == (rank, inputs) and found.B.shape == (outputs, rank)
    assert torch.allclose(found.B @ found.A, best, atol=1e-12)
    assert found.error == pytest.approx(float((dense - best).norm() / dense.norm()), abs=1e-12)
    values = singular_values(A, B)
    assert len(values) == min(8, inputs, outputs) and torch.allclose(values, S[: len(values)], atol=1e-12)


def test_nothing_stays_nothing_and_can_learn():
    A, B = factors(8, 12, 20)
    found = truncated(A, torch.zeros_like(B), 3)
    assert not found.B.any() and found.error == 0
    assert (found.A.norm(dim=1) > 0.1).all()


def test_energy():
    values = torch.tensor([4.0, 2.0, 1.0, 0.0])  # squares 16, 4, 1 of 21
    found = {share: rank_for_energy(values, share) for share in (0.1, 16 / 21, 0.77, 20 / 21, 0.96, 1.0)}
    assert list(found.values()) == [1, 1, 2, 2, 3, 3]
    assert rank_for_energy(torch.zeros(4), 1.0) == 1


def test_a_rank_above_the_smaller_side_is_filled_with_what_can_learn():
    A, B = factors(8, 5, 20)
    found = truncated(A, B, 7)
    assert torch.allclose(found.B @ found.A, B.double() @ A.double(), atol=1e-12) and found.error < 1e-12
    assert torch.equal(found.A[5:], A[:2].double()) and not found.B[:, 5:].any()
