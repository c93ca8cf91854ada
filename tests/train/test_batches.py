from __future__ import annotations

from collections import Counter

import pytest
import torch

from rankwise.train.batches import MicroBatches
from rankwise.train.objectives import TOKENS
from rankwise.train.order import RowOrder
from tests.train.rows import examples


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
