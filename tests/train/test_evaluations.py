from __future__ import annotations

import pytest

from rankwise.train.evaluations import Evaluations


def taken(losses: list[float], min_delta: float = 0.0, keep_best: bool = True) -> Evaluations:
    evaluations = Evaluations()
    for step, loss in enumerate(losses, start=1):
        evaluations.take(step, loss, min_delta, keep_best)
    return evaluations


@pytest.mark.parametrize(
    ("losses", "min_delta", "num_stale"),
    [
        ([3.0, 2.0, 1.0], 0.0, 0),
        ([3.0, 2.0, 2.0], 0.0, 1),
        ([3.0, 2.0, 2.5, 2.5, 1.0], 0.0, 0),
        ([3.0, 2.0, 2.1, 2.2, 2.3], 0.0, 3),
        ([3.0, 2.95, 2.91], 0.1, 2),
        ([3.0, 2.95, 2.91, 2.85], 0.1, 0),  # small gains that add up
        ([3.0, 2.9], 0.125, 1),
    ],
)
def test_patience_counts_evaluations_without_a_lower_loss(
    losses: list[float], min_delta: float, num_stale: int
) -> None:
    evaluations = taken(losses, min_delta)
    assert evaluations.num_stale == num_stale
    assert evaluations.are_stale(num_stale or 1) == bool(num_stale)
    assert not evaluations.are_stale(num_stale + 1) and not evaluations.are_stale(None)


def test_the_best_is_the_lowest_loss_whatever_counts_for_patience() -> None:
    evaluations = taken([3.0, 2.95, 2.91, 2.93], min_delta=0.5)
    assert (evaluations.best, evaluations.best_step, evaluations.num_stale) == (2.91, 3, 3)
    evaluations.forget_best()
    evaluations.take(5, 2.97, 0.0, True)
    assert (evaluations.best, evaluations.best_step) == (2.97, 5)
    assert taken([3.0, 2.0], keep_best=False).best_step is None
