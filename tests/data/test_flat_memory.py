"""Memory does not grow with the rows: neither encoding them nor training's way through them."""

from __future__ import annotations

import tracemalloc

import pytest

from rankwise.data.config import DataConfig
from rankwise.data.loader import load_examples
from rankwise.train.order import RowOrder
from tests import tiny
from tests.data.builders import write_rows

FEW, MANY = 400, 2800
INDEX_BYTES_A_ROW = 8 + 8 + 48
"""An epoch's order and the words that it is sorted by, and the index line, should it be copied."""


def peak_bytes(folder, count: int) -> int:
    row = {"prompt": "What is the number of this row, please?", "completion": "It is not known. " * 6}
    path = write_rows(folder / f"{count}.jsonl", [row] * count)
    tokenizer, config = tiny.tiny_tokenizer(), DataConfig(train=path, cache="off", workers=1)
    load_examples(path, tokenizer, config)  # what is made once: templates, imports
    tracemalloc.start()
    loaded = load_examples(path, tokenizer, config)
    order = RowOrder(count, 8, count, seed=0)
    seen = sum(len(loaded.examples[row].input_ids) for step in range(1, count // 8 + 1) for row in order.rows(step))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert seen > 100 * count
    return peak


@pytest.mark.slow
def test_memory_is_flat(tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rankwise.data.workers.CHUNK_ROWS", 100)
    monkeypatch.setattr("rankwise.data.rows.DETECT_ROWS", 100)
    few, many = peak_bytes(tmp_path, FEW), peak_bytes(tmp_path, MANY)
    assert many - few < (MANY - FEW) * INDEX_BYTES_A_ROW + 200_000, (few, many)


@pytest.mark.slow
def test_memory_is_flat_over_many_chunks(tmp_path) -> None:
    few, many = peak_bytes(tmp_path, 2_000), peak_bytes(tmp_path, 50_000)
    assert many - few < 48_000 * INDEX_BYTES_A_ROW + 200_000, (few, many)
