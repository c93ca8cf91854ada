"""How often tasks are drawn."""

from __future__ import annotations

import numpy as np
import pytest

from rankwise.tasks.config import SamplingConfig
from rankwise.tasks.sampling import FLOOR, Draw, Stretch, shares_of, spread, with_replay

SIZES = {"a": 900, "b": 90, "c": 10}


def test_by_size_and_by_temperature() -> None:
    assert shares_of(SamplingConfig(), SIZES) == {"a": 0.9, "b": 0.09, "c": 0.01}
    roots = {name: size**0.5 for name, size in SIZES.items()}
    shares = shares_of(SamplingConfig("temperature", 2.0), SIZES)
    assert shares == pytest.approx({name: root / sum(roots.values()) for name, root in roots.items()})
    one = shares_of(SamplingConfig("temperature", 1.0), SIZES)
    assert one == pytest.approx(shares_of(SamplingConfig(), SIZES))


def test_by_what_is_behind() -> None:
    behind = SamplingConfig("behind", references={"a": 1.0, "b": 2.0, "c": 0.5})
    references = behind.references
    assert shares_of(behind, SIZES) == shares_of(SamplingConfig(), SIZES), "before the first evaluation"
    shares = shares_of(behind, SIZES, {"a": 1.1, "b": 2.6, "c": 0.4}, references)
    gaps = {"a": 0.1, "b": 0.3, "c": 0.0}
    by_size = shares_of(SamplingConfig(), SIZES)
    wanted = {name: (1 - FLOOR) * gap / 0.4 + FLOOR * by_size[name] for name, gap in gaps.items()}
    assert shares == pytest.approx(wanted) and sum(shares.values()) == pytest.approx(1)
    assert shares["c"] > 0
    none = shares_of(behind, SIZES, {"a": 0.9, "b": 2.0, "c": 0.5}, references)
    assert none == by_size, "where none is behind"


def test_replay() -> None:
    shares = with_replay({"c": 1.0}, {"a": 30.0, "b": 10.0}, 0.2)
    assert shares == pytest.approx({"c": 0.8, "a": 0.15, "b": 0.05})
    assert with_replay({"c": 1.0}, {}, 0.2) == {"c": 1.0}


@pytest.mark.parametrize("shares", [[0.9, 0.09, 0.01], [1 / 3] * 3, [0.5, 0.0, 0.5], [0.07] * 14 + [0.02]])
def test_rows_follow_the_shares_to_within_one(shares: list[float]) -> None:
    draw = Draw(7, 7 * 50 - 3, Stretch(1, shares, [0] * len(shares)))
    total = np.zeros(len(shares))
    for step in range(1, 51):
        counts = draw.counts(step)
        assert draw.before(step) == total.tolist()
        assert sum(counts) == (7 if step < 50 else 4) and min(counts) >= 0
        total += counts
        assert (np.abs(total - np.array(shares) * total.sum()) < 1.0 + 1e-9).all(), step
        assert all(not count for count, share in zip(counts, shares, strict=True) if share == 0)


def test_a_new_stretch_goes_on_where_the_old_one_ended() -> None:
    draw = Draw(8, 800, Stretch(1, [0.5, 0.5], [0, 0]))
    assert draw.before(11) == [40, 40]
    draw.begin(Stretch(11, [0.25, 0.75], draw.before(11)))
    assert draw.before(11) == [40, 40] and draw.before(21) == [60, 100]
    again = Draw(8, 800, Stretch(11, [0.25, 0.75], [40, 40]))
    assert [again.counts(step) for step in (11, 17, 30)] == [draw.counts(step) for step in (11, 17, 30)]


def test_rows_of_a_step_are_spread_by_chance() -> None:
    words = np.random.PCG64(0).random_raw(6)
    tasks = spread([1, 2, 3], words)
    assert sorted(tasks) == [0, 1, 1, 2, 2, 2] and tasks != sorted(tasks)
