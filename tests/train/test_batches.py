from __future__ import annotations

from collections import Counter

import pytest
import torch

from rankwise.train.batches import MicroBatches, RowOrder
from rankwise.train.objectives import TOKENS
from tests.train.rows import examples


def test_every_row_is_seen_once_an_epoch() -> None:
    order = RowOrder(num_examples=10, batch_size=4, num_rows=30, seed=3)
    seen = [row for step in range(1, 9) for row in order.rows(step)]
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


@pytest.mark.parametrize("packing", [True, False])
def test_micro_batches_hold_the_rows_of_the_step(packing: bool) -> None:
    rows = examples(9)
    batches = MicroBatches(TOKENS, rows, RowOrder(9, 8, 16, seed=0), 3, 259, packing, torch.device("cpu"))
    made = batches(1)
    assert [batch.num_examples for batch in made] == [3, 3, 2]
    expected = [rows[row] for row in batches.order.rows(1)]
    assert sum(batch.num_tokens for batch in made) == sum(len(e.input_ids) for e in expected)
    assert sum(batch.num_trained for batch in made) == sum(e.num_trained for e in expected)
    tokens = Counter(token for e in expected for token in e.input_ids)
    found = Counter(token for batch in made for token in batch.input_ids.flatten().tolist())
    found.pop(259, None)
    assert found == tokens


def test_padded_rows_of_like_length_share_a_batch() -> None:
    rows = examples(40)
    order = RowOrder(40, 32, 64, seed=0)
    made = MicroBatches(TOKENS, rows, order, 4, 259, False, torch.device("cpu"))(1)
    sorted_ = sum(batch.input_ids.numel() for batch in made)
    lengths = [len(rows[row].input_ids) for row in order.rows(1)]
    as_they_come = sum(4 * max(lengths[start : start + 4]) for start in range(0, 32, 4))
    assert sorted_ < as_they_come
