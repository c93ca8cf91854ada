"""Examples of classifiers and of embeddings to padded micro batches. Legend: B rows, T positions, M texts."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import numpy as np
import torch
from jaxtyping import Int64
from torch import Tensor

from rankwise.data.example import Example
from rankwise.models.batch import IGNORED
from rankwise.models.label_batch import LabelBatch, TextBatch


def collate_classes(examples: Sequence[Example], pad_id: int, packing: bool) -> LabelBatch:
    """Rows with one class each ([B]), or 0 and 1 for each class ([B, L])."""
    assert not packing, "heads read padded rows"
    input_ids, mask = _padded([example.input_ids for example in examples], pad_id)
    targets = torch.tensor([example.targets for example in examples], dtype=torch.int64)
    types = None
    if any(example.token_type_ids for example in examples):
        types, _ = _padded([example.token_type_ids or (0,) * len(example.input_ids) for example in examples], 0)
    return LabelBatch(input_ids, mask, targets.squeeze(1) if targets.shape[1] == 1 else targets, token_type_ids=types)


def collate_tags(examples: Sequence[Example], pad_id: int, packing: bool) -> LabelBatch:
    """Rows with a class for each token, [B, T]."""
    assert not packing, "heads read padded rows"
    input_ids, mask = _padded([example.input_ids for example in examples], pad_id)
    targets, _ = _padded([example.targets for example in examples], IGNORED)
    return LabelBatch(input_ids, mask, targets, is_tagged=True)


def collate_texts(examples: Sequence[Example], pad_id: int, packing: bool) -> TextBatch:
    """Anchors, then positives, then all negatives."""
    assert not packing, "embeddings are of padded texts"
    rows = [_parts(example) for example in examples]
    texts = [row[0] for row in rows] + [row[1] for row in rows] + [text for row in rows for text in row[2:]]
    input_ids, mask = _padded(texts, pad_id)
    keys = torch.tensor([_key(text) for text in texts], dtype=torch.int64)
    return TextBatch(input_ids, mask, keys, len(examples))


def _parts(example: Example) -> list[tuple[int, ...]]:
    found, start = [], 0
    for length in example.parts:
        found.append(example.input_ids[start : start + length])
        start += length
    return found


def _key(ids: Sequence[int]) -> int:
    digest = hashlib.blake2b(np.array(ids, dtype=np.int64).tobytes(), digest_size=8).digest()
    return int.from_bytes(digest, "little", signed=True)


def _padded(rows: Sequence[Sequence[int]], fill: int) -> tuple[Int64[Tensor, "B T"], Int64[Tensor, "B T"]]:
    """Rows filled up on the right, and which positions they have."""
    shape = (len(rows), max(len(row) for row in rows))
    values = torch.full(shape, fill, dtype=torch.int64)
    mask = torch.zeros(shape, dtype=torch.int64)
    for index, row in enumerate(rows):
        values[index, : len(row)] = torch.tensor(row, dtype=torch.int64)
        mask[index, : len(row)] = 1
    return values, mask
