"""The range test: a pass, its divergence, the curve and the pick."""

from __future__ import annotations

import itertools
import math

import pytest

from rankwise.errors import RequestError, WorkError
from rankwise.train.range_test import LEAST_STEPS, PART_OF_LOWEST, RangeTest, one_pass, read_curve


def valley(rate: float, best: float = 1e-2) -> float:
    """A change of loss that falls to -0.5 at `best` (a decade around it) and rises beyond."""
    distance = math.log10(rate / best)
    return -0.5 * math.exp(-(distance**2)) + max(0.0, distance) ** 2


def test_rates_grow_by_a_constant_factor():
    rates = RangeTest(1e-5, 1.0, 11).rates
    assert rates[0] == 1e-5 and rates[-1] == pytest.approx(1.0) and len(rates) == 11
    assert all(b / a == pytest.approx(10**0.5) for a, b in itertools.pairwise(rates))
    assert len(RangeTest().rates) == LEAST_STEPS


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"lowest": 0.0}, "must grow from above 0"),
        ({"lowest": 1e-2, "highest": 1e-3}, "0.01 to 0.001"),
        ({"highest": math.inf}, "must grow"),
        ({"num_steps": 9}, "9 steps"),
        ({"num_restarts": 0}, "not 0"),
    ],
)
def test_impossible_ranges(settings, message):
    with pytest.raises(RequestError, match=message):
        RangeTest(**settings)


def test_a_pass_is_the_change_against_the_untrained_model_on_the_same_rows():
    before = [2.0, 5.0, 3.0]  # rows differ far more than training changes them
    assert one_pass([1.0, 2.0, 3.0], before, lambda number, rate: before[number] - 0.1 * rate) == pytest.approx(
        [-0.1, -0.2, -0.3]
    )


def test_a_pass_ends_where_it_diverges():
    def rising(number: int, rate: float) -> float:
        return 2.0 if number < 5 else 9.0

    assert len(one_pass([1.0] * 20, [2.0] * 20, rising)) == 6

    def broken(number: int, rate: float) -> float:
        if number == 7:
            raise WorkError("step 8: the loss is nan")
        return 2.0

    assert len(one_pass([1.0] * 20, [2.0] * 20, broken)) == 7
    assert len(one_pass([1.0] * 20, [2.0] * 20, lambda number, rate: math.nan if number == 3 else 2.0)) == 3


def test_what_fails_before_anything_is_trained_is_not_a_divergence():
    def fails(number: int, rate: float) -> float:
        raise WorkError("nothing is attached")

    with pytest.raises(WorkError, match="nothing is attached"):
        one_pass([1.0], [2.0], fails)


@pytest.mark.parametrize("best", [1e-3, 1e-2, 1e-1])
def test_the_pick_follows_the_valley(best):
    rates = RangeTest().rates
    found = read_curve(rates, [[valley(rate, best) for rate in rates]] * 2, before=2.0)
    assert abs(math.log10(found.lowest_at / best)) < 0.35
    assert found.lr == pytest.approx(found.lowest_at * PART_OF_LOWEST, rel=0.05)
    assert [lr for lr, _ in found.curve] == rates
    assert min(loss for _, loss in found.curve) == pytest.approx(2.0 - 0.5, abs=0.15)


def test_one_restart_that_diverges_early_ends_the_curve():
    rates = RangeTest().rates
    whole = [valley(rate, 1e-2) for rate in rates]
    found = read_curve(rates, [whole, whole[:20]], before=2.0)
    assert len(found.curve) == 20 and found.lowest_at <= rates[19]


def test_curves_that_say_nothing():
    rates = RangeTest().rates
    with pytest.raises(WorkError, match="does not fall at any rate from 1e-05 to 1"):
        read_curve(rates, [[0.0] * len(rates)], before=2.0)
    with pytest.raises(WorkError, match="still falls at the highest rate, 1; raise it with --highest"):
        read_curve(rates, [[-0.01 * place for place in range(len(rates))]], before=2.0)
    with pytest.raises(WorkError, match="diverges from the lowest rate on, 1e-05"):
        read_curve(rates, [[0.1, 3.0]], before=2.0)
