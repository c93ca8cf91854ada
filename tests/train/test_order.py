from __future__ import annotations

from collections import Counter

import numpy as np
import pytest

from rankwise.data.mixing import quotas
from rankwise.data.packing import epoch_order
from rankwise.train.order import RowOrder, Share


def stream(order: RowOrder, steps: range) -> list[int]:
    return [row for step in steps for row in order.rows(step)]


def test_every_row_is_seen_once_an_epoch() -> None:
    order = RowOrder(10, batch_size=4, num_rows=30, seed=3)
    seen = stream(order, range(1, 9))
    assert len(seen) == 30
    for epoch in range(3):
        assert sorted(seen[10 * epoch : 10 * epoch + 10]) == list(range(10))
    assert len(order.rows(8)) == 2  # the last step is cut, so that three epochs are three epochs
    assert seen[:10] != seen[10:20]


def test_a_step_can_be_asked_for_on_its_own() -> None:
    whole = RowOrder(7, 3, 100, seed=1)
    steps = [whole.rows(step) for step in range(1, 20)]
    assert RowOrder(7, 3, 100, seed=1).rows(17) == steps[16]
    assert RowOrder(7, 3, 100, seed=2).rows(17) != steps[16]


def test_orders_of_old_runs_stay() -> None:
    """Written down from the first version: a run that was begun with it goes on."""
    assert stream(RowOrder(7, 3, 100, seed=1), range(1, 6)) == [2, 4, 5, 0, 6, 3, 1, 5, 6, 3, 0, 2, 1, 4, 5]


def test_sources_without_weights_are_one_file() -> None:
    alone = RowOrder(12, 5, 60, seed=4)
    mixed = RowOrder([Share(3, 3), Share(9, 9)], 5, 60, seed=4)
    assert stream(alone, range(1, 13)) == stream(mixed, range(1, 13))


def test_a_mix_draws_its_quotas_and_no_row_twice_before_all_once() -> None:
    shares = [Share(10, 5), Share(4, 10), Share(6, 6)]
    order = RowOrder(shares, 7, 21 * 8, seed=0)
    assert order.num_examples == 21
    seen = stream(order, range(1, 25))
    assert len(seen) == 21 * 8
    for epoch in range(8):
        part = seen[21 * epoch : 21 * epoch + 21]
        assert Counter(order.source(row) for row in part) == {0: 5, 1: 10, 2: 6}
    for source, (start, size) in enumerate([(0, 10), (10, 4), (14, 6)]):
        counts = Counter(row for row in seen if order.source(row) == source)
        assert set(counts) == set(range(start, start + size))
        assert max(counts.values()) - min(counts.values()) <= 1


def test_a_mix_is_a_function_of_the_step() -> None:
    shares = [Share(10, 3), Share(4, 9)]
    whole = RowOrder(shares, 5, 200, seed=2)
    steps = {step: whole.rows(step) for step in range(1, 41)}
    for step in (40, 3, 17, 18, 1):
        assert whole.rows(step) == steps[step] == RowOrder(shares, 5, 200, seed=2).rows(step)
    assert RowOrder(shares, 5, 200, seed=3).rows(1) != steps[1]


def test_a_million_rows_take_no_python_lists() -> None:
    order = RowOrder(1_000_000, 16, 3_000_000, seed=0)
    rows = order.rows(62_500) + order.rows(62_501)  # the last of one epoch, the first of the next
    assert len(set(rows[:16])) == 16
    assert isinstance(epoch_order(10, 0, 0), np.ndarray)


@pytest.mark.parametrize(
    ("sizes", "weights", "epochs", "temperature", "expected"),
    [
        ([10, 30], [None, None], [None, None], None, [10, 30]),
        ([10, 30], [None, None], [2.5, None], None, [25, 30]),
        ([10, 30], [3, 1], [None, None], None, [30, 10]),
        ([10, 30], [2, None], [None, None], None, [27, 13]),
        ([10, 30], [None, None], [None, None], 1.0, [10, 30]),
        ([100, 10_000], [None, None], [None, None], 2.0, [918, 9182]),
        ([1, 1_000_000], [None, None], [None, None], 1.0, [1, 1_000_000]),
        ([3, 3], [1e-9, 1], [None, None], None, [1, 6]),
    ],
)
def test_quotas(sizes, weights, epochs, temperature, expected) -> None:
    assert quotas(sizes, weights, epochs, temperature) == expected
