"""Preference examples to micro batches: the chosen and the rejected sequence of each pair, one after the other."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from rankwise.data.example import Example
from rankwise.data.packing import collate
from rankwise.models.batch import Batch


@dataclass(frozen=True)
class PreferenceBatch:
    """`sequences`: of 2 x num_examples examples, those of pair i being 2 i (chosen) and 2 i + 1 (rejected)."""

    sequences: Batch

    @property
    def num_examples(self) -> int:
        """Pairs."""
        return self.sequences.num_examples // 2

    @property
    def num_tokens(self) -> int:
        """Tokens of both sequences, without padding."""
        return self.sequences.num_tokens

    @property
    def num_trained(self) -> int:
        """Pairs: each has one loss."""
        return self.num_examples

    def to(self, device: torch.device | str) -> PreferenceBatch:
        """The same batch on another device."""
        return PreferenceBatch(self.sequences.to(device))


def collate_preferences(examples: Sequence[Example], pad_id: int, packing: bool) -> PreferenceBatch:
    """Both sequences of each example, packed (each attends to itself alone) or padded."""
    return PreferenceBatch(collate([part for example in examples for part in _sides(example)], pad_id, packing))


def _sides(example: Example) -> tuple[Example, Example]:
    (cut, _), ids, labels = example.parts, example.input_ids, example.labels
    return (
        dataclasses.replace(example, input_ids=ids[:cut], labels=labels[:cut], parts=()),
        dataclasses.replace(example, input_ids=ids[cut:], labels=labels[cut:], parts=()),
    )
