"""The mask of few bits: its probability, its independence, its layout for every width of numbers."""

from __future__ import annotations

import pytest
import torch

from rankwise.adapters.dropout import KeepRule, keep_rule, kept_entries, masked, spread

CPU = torch.device("cpu")


def bits(kept: torch.Tensor, count: int) -> torch.Tensor:
    return spread(kept, torch.ones(1, count))[0].bool()


@pytest.mark.parametrize(
    ("dropout", "rule"),
    [
        (0.5, KeepRule(1, 1)),
        (0.25, KeepRule(3, 2)),
        (0.1, KeepRule(115, 7)),
        (0.05, KeepRule(243, 8)),
        (0.9, KeepRule(13, 7)),
        (0.01, KeepRule(4055, 12)),
        (1e-6, None),
        (1 - 1e-6, None),
    ],
)
def test_the_fewest_places_that_are_close_enough(dropout, rule):
    assert keep_rule(dropout) == rule


@pytest.mark.parametrize("dropout", [0.5, 0.1, 0.25, 0.9, 0.01])
def test_the_mask_has_the_probability_that_it_says(dropout):
    """Within five standard errors, over all entries and over each place of a word."""
    rule, count = keep_rule(dropout), 64 * 8000
    p = rule.probability
    assert abs(1 - p - dropout) <= 0.02 * min(dropout, 1 - dropout)
    kept = bits(kept_entries(count, rule, CPU), count).double().view(64, -1)
    assert (kept.mean(1) - p).abs().max() < 5 * (p * (1 - p) / 8000) ** 0.5
    assert abs(kept.mean() - p) < 5 * (p * (1 - p) / count) ** 0.5


def test_entries_are_independent():
    """The correlation of entries some places apart is that of chance, five standard errors; two draws differ."""
    rule, count = keep_rule(0.1), 64 * 4000
    first, second = (bits(kept_entries(count, rule, CPU), count).double() for _ in range(2))
    for a, b in [(first[:-lag], first[lag:]) for lag in (1, 2, 8, 16, 64, 4000)] + [(first, second)]:
        correlation = torch.corrcoef(torch.stack([a, b]))[0, 1]
        assert abs(correlation) < 5 / count**0.5


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("shape", [(3, 5), (1, 64), (7, 129), (0, 4)], ids=str)
def test_zeros_and_the_very_entries(dtype, shape):
    x = torch.randn(shape).to(dtype) + 3
    kept = kept_entries(x.numel(), keep_rule(0.5), CPU)
    dropped = masked(x, spread(kept, x))
    assert dropped.shape == x.shape and dropped.dtype == dtype
    assert bool(((dropped == x) | (dropped == 0)).all())
    assert torch.equal(dropped, masked(x, spread(kept, x)))
    strided = torch.stack([x, x], -1)[..., 0]
    assert torch.equal(masked(strided, spread(kept, strided)), dropped)


def test_a_mask_costs_a_bit_an_entry():
    assert kept_entries(6400, keep_rule(0.1), CPU).untyped_storage().nbytes() == 800
