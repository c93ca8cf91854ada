"""Rows of several tasks: each task's own passes, whatever the shares."""

from __future__ import annotations

from collections import Counter

from rankwise.tasks.sampling import Draw, Stretch
from rankwise.train.task_order import TaskOrder

SIZES = (30, 1, 9)


def order(shares: list[float], seed: int = 0, stretch: Stretch | None = None) -> TaskOrder:
    return TaskOrder(SIZES, Draw(8, 8 * 40, stretch or Stretch(1, shares, [0, 0, 0])), seed)


def test_no_row_of_a_task_is_seen_twice_more_than_another() -> None:
    rows = order([0.5, 0.2, 0.3])
    seen: Counter[int] = Counter()
    for step in range(1, 41):
        chosen = rows.rows(step)
        assert len(chosen) == 8
        seen.update(chosen)
        for first, size in ((0, 30), (30, 1), (31, 9)):
            counts = [seen[row] for row in range(first, first + size)]
            assert max(counts) - min(counts) <= 1
    assert [rows.task(row) for row in (0, 29, 30, 31, 39)] == [0, 0, 1, 2, 2]


def test_a_function_of_seed_and_step() -> None:
    shares = [0.5, 0.2, 0.3]
    one, other = order(shares), order(shares)
    backwards = {step: other.rows(step) for step in range(20, 0, -1)}
    assert all(one.rows(step) == backwards[step] for step in range(1, 21))
    assert order(shares, seed=1).rows(3) != one.rows(3)


def test_it_goes_on_from_a_stretch() -> None:
    straight = order([0.5, 0.2, 0.3])
    ends = straight.draw.before(11)
    straight.draw.begin(Stretch(11, [0.1, 0.1, 0.8], ends))
    resumed = order([], stretch=Stretch(11, [0.1, 0.1, 0.8], ends))
    assert [resumed.rows(step) for step in range(15, 40)] == [straight.rows(step) for step in range(15, 40)]
