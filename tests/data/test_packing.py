from __future__ import annotations

import pytest
import torch

from rankwise.data.example import Example
from rankwise.data.packing import batches_of, collate, epoch_order

LENGTHS = (5, 2, 9, 3)


def example(length: int, seed: int, first_trained: bool = True) -> Example:
    ids = torch.randint(0, 256, (length,), generator=torch.Generator().manual_seed(seed)).tolist()
    trained = [first_trained, *(index % 2 == 1 for index in range(1, length))]
    labels = tuple(token if on else -100 for token, on in zip(ids, trained, strict=True))
    return Example(tuple(ids), labels, "", (), (), "", "")


EXAMPLES = [example(length, seed) for seed, length in enumerate(LENGTHS)]


def test_packed_rows_lie_end_to_end():
    batch = collate(EXAMPLES, pad_id=259, packing=True)
    assert batch.is_packed
    assert batch.segment_lengths == LENGTHS
    assert batch.input_ids.shape == batch.labels.shape == batch.example_index.shape == (1, sum(LENGTHS))
    assert batch.attention_mask is None
    assert batch.position_ids is not None
    start = 0
    for index, (item, length) in enumerate(zip(EXAMPLES, LENGTHS, strict=True)):
        part = slice(start, start + length)
        assert batch.input_ids[0, part].tolist() == list(item.input_ids)
        assert batch.labels[0, start] == -100
        assert batch.labels[0, start + 1 : start + length].tolist() == list(item.labels[1:])
        assert batch.position_ids[0, part].tolist() == list(range(length))
        assert set(batch.example_index[0, part].tolist()) == {index}
        start += length
    assert (batch.num_examples, batch.num_tokens) == (4, sum(LENGTHS))


def test_padded_rows_are_filled_on_the_right():
    batch = collate(EXAMPLES, pad_id=259, packing=False)
    assert not batch.is_packed
    assert batch.input_ids.shape == (4, 9)
    assert batch.attention_mask is not None
    assert batch.position_ids is None
    for index, (item, length) in enumerate(zip(EXAMPLES, LENGTHS, strict=True)):
        assert batch.input_ids[index].tolist() == [*item.input_ids, *[259] * (9 - length)]
        assert batch.labels[index].tolist() == [*item.labels, *[-100] * (9 - length)]
        assert batch.attention_mask[index].tolist() == [1] * length + [0] * (9 - length)
        assert set(batch.example_index[index].tolist()) == {index}
    assert (batch.num_examples, batch.num_tokens) == (4, sum(LENGTHS))


@pytest.mark.parametrize("packing", [True, False])
def test_both_train_on_as_many_tokens(packing):
    batch = collate(EXAMPLES, pad_id=0, packing=packing)
    assert batch.num_trained == sum(item.num_trained for item in EXAMPLES)
    for tensor in (batch.input_ids, batch.labels, batch.example_index):
        assert tensor.dtype == torch.int64


def test_an_order_is_a_permutation():
    for size in (0, 1, 2, 1000):
        assert sorted(epoch_order(size, seed=3, epoch=0)) == list(range(size))


def test_orders_are_the_same_everywhere():
    """Written down: a change here changes every run's order of rows."""
    assert epoch_order(10, seed=0, epoch=0).tolist() == [3, 2, 1, 8, 6, 0, 7, 4, 5, 9]
    assert epoch_order(10, seed=0, epoch=1).tolist() == [7, 4, 5, 1, 9, 8, 6, 2, 0, 3]
    assert epoch_order(10, seed=2**63 - 1, epoch=0).tolist() == epoch_order(10, seed=2**63 - 1, epoch=0).tolist()


def test_orders_differ_by_seed_and_epoch():
    orders = {tuple(epoch_order(50, seed, epoch)) for seed in range(4) for epoch in range(4)}
    assert len(orders) == 16


def test_every_place_is_as_likely():
    firsts = torch.tensor([epoch_order(4, seed, 0)[0] for seed in range(2000)])
    assert all(abs(int((firsts == row).sum()) - 500) < 100 for row in range(4))


def test_the_last_batch_is_what_is_left():
    assert list(batches_of([3, 1, 2, 0, 4], 2)) == [[3, 1], [2, 0], [4]]
    assert list(batches_of([], 2)) == []
    assert list(batches_of([0], 8)) == [[0]]
