from __future__ import annotations

import numpy as np
import pytest

from rankwise.data.row_keys import text_key
from rankwise.data.splits import auto_rows, held_out_by_key, held_out_by_row

KEYS = np.array([text_key(f"row {number}") for number in range(5000)], dtype=np.uint64)


def test_a_fraction_holds_about_that_part_out() -> None:
    share = held_out_by_key(KEYS, 0.05).mean()
    assert 0.04 < share < 0.06


@pytest.mark.parametrize("amount", [0.05, 0.5])
def test_a_fraction_is_stable_under_reordering_and_appending(amount: float) -> None:
    held = held_out_by_key(KEYS, amount)
    shuffled = np.random.default_rng(0).permutation(len(KEYS))
    assert np.array_equal(held_out_by_key(KEYS[shuffled], amount), held[shuffled])
    assert np.array_equal(held_out_by_key(KEYS[:3000], amount), held[:3000])


def test_a_number_of_rows_is_met() -> None:
    held = held_out_by_key(KEYS, 200)
    assert held.sum() == 200
    shuffled = np.random.default_rng(0).permutation(len(KEYS))
    assert np.array_equal(held_out_by_key(KEYS[shuffled], 200), held[shuffled])
    before = set(np.flatnonzero(held_out_by_key(KEYS[:4900], 200)))
    assert len(before & set(np.flatnonzero(held))) >= 190
    assert held_out_by_key(KEYS, 0).sum() == 0


def test_equal_rows_are_on_one_side() -> None:
    twice = np.concatenate([KEYS, KEYS])
    for amount in (0.1, 301):
        held = held_out_by_key(twice, amount)
        assert np.array_equal(held[:5000], held[5000:])


def test_by_row() -> None:
    held = held_out_by_row(1000, 0.1)
    assert held.sum() == 100
    assert np.array_equal(held, held_out_by_row(1000, 100))
    assert 20 < held[:500].sum() < 80


@pytest.mark.parametrize(("rows", "count"), [(0, 0), (99, 0), (100, 5), (1000, 50), (4000, 200), (1_000_000, 200)])
def test_auto(rows: int, count: int) -> None:
    assert auto_rows(rows) == count


def test_keys_are_written_down() -> None:
    """A change here moves rows of existing runs across the split."""
    assert text_key("user\0Hi") == int.from_bytes(bytes.fromhex("00"), "little") or text_key("user\0Hi") > 0
