"""Examples to micro batches, and the order in which rows are seen.

Packed: the examples lie end to end in one row, without padding; positions restart at each, and the models room makes
each attend to itself alone (as in Krell et al. 2021, arXiv 2107.02027, but without bin packing: a micro batch is a
number of rows, so packing changes the time that a step takes and never which rows are in it). Padded: one example a
row, padding on the right.

The order is a permutation from raw PCG64 words, whose stream numpy keeps the same across versions and platforms.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import torch

from rankwise.data.example import Example
from rankwise.models.batch import IGNORED, Batch


def collate(examples: Sequence[Example], pad_id: int, packing: bool) -> Batch:
    """One micro batch: [1, N] packed, N all tokens; or [B, T] padded, T the longest example.

    `pad_id` fills input_ids where a padded batch has no token; such positions have no label and are masked.
    """
    assert examples, "a batch needs an example"
    return _packed(examples) if packing else _padded(examples, pad_id)


def _packed(examples: Sequence[Example]) -> Batch:
    lengths = tuple(len(example.input_ids) for example in examples)
    ids = np.concatenate([np.array(example.input_ids, dtype=np.int64) for example in examples])
    labels = np.concatenate([np.array(example.labels, dtype=np.int64) for example in examples])
    starts = np.cumsum([0, *lengths[:-1]])
    labels[starts] = IGNORED
    return Batch(
        input_ids=_row(ids),
        labels=_row(labels),
        example_index=_row(np.repeat(np.arange(len(lengths)), lengths)),
        num_examples=len(examples),
        position_ids=_row(np.arange(len(ids)) - np.repeat(starts, lengths)),
        segment_lengths=lengths,
        weights=_weights(examples, (1, len(ids)), [(0, int(start)) for start in starts]),
    )


def _padded(examples: Sequence[Example], pad_id: int) -> Batch:
    shape = (len(examples), max(len(example.input_ids) for example in examples))
    input_ids = torch.full(shape, pad_id, dtype=torch.int64)
    labels = torch.full(shape, IGNORED, dtype=torch.int64)
    attention_mask = torch.zeros(shape, dtype=torch.int64)
    for index, example in enumerate(examples):
        length = len(example.input_ids)
        input_ids[index, :length] = torch.tensor(example.input_ids)
        labels[index, :length] = torch.tensor(example.labels)
        attention_mask[index, :length] = 1
    rows = torch.arange(shape[0], dtype=torch.int64)[:, None].expand(shape).contiguous()
    return Batch(
        input_ids=input_ids,
        labels=labels,
        example_index=rows,
        num_examples=len(examples),
        attention_mask=attention_mask,
        weights=_weights(examples, shape, [(index, 0) for index in range(len(examples))]),
    )


def _weights(
    examples: Sequence[Example], shape: tuple[int, int], starts: Sequence[tuple[int, int]]
) -> torch.Tensor | None:
    """How much each position counts; None where all count once. `starts`: row and place where each example begins."""
    if not any(example.weights for example in examples):
        return None
    weights = torch.ones(shape)
    for example, (row, start) in zip(examples, starts, strict=True):
        for first, last, weight in example.weights:
            weights[row, start + first : start + last] = weight
    return weights


def _row(values: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(values)[None]


def epoch_order(num_examples: int, seed: int, epoch: int, stream: int = 0) -> np.ndarray:
    """A permutation of the row numbers, [num_examples], the same on every machine for the same seed (>= 0) and epoch.

    `stream`: another one gives another permutation for the same seed and epoch (0: none but these two count).
    """
    entropy = [seed, epoch, stream] if stream else [seed, epoch]
    words = np.random.PCG64(np.random.SeedSequence(entropy)).random_raw(num_examples)
    return np.argsort(words, kind="stable")


def batches_of(order: Sequence[int], batch_size: int) -> Iterator[list[int]]:
    """The order in batches; what is left at the end is a smaller batch and comes last."""
    for start in range(0, len(order), batch_size):
        yield list(order[start : start + batch_size])
