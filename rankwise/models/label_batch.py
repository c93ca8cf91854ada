"""Padded rows for heads: rows with their classes, and texts to be compared. Legend: B rows, T positions, L classes."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from jaxtyping import Int64
from torch import Tensor

from rankwise.models.batch import IGNORED


@dataclass(frozen=True)
class LabelBatch:
    """Rows and what a head is to say of them.

    `targets`: [B] a class for each row; or [B, L] 0 or 1 for each class of each row; or [B, T] a class for each token
    (`is_tagged`), IGNORED where there is none.
    """

    input_ids: Int64[Tensor, "B T"]
    attention_mask: Int64[Tensor, "B T"]
    """1 for tokens, 0 for padding."""
    targets: Int64[Tensor, "B ..."]
    is_tagged: bool = False
    token_type_ids: Int64[Tensor, "B T"] | None = None
    """For models that tell the two texts of a row apart by it: 1 in the second."""

    @property
    def num_examples(self) -> int:
        """Rows."""
        return self.input_ids.shape[0]

    @property
    def num_tokens(self) -> int:
        """Tokens without padding."""
        return int(self.attention_mask.sum())

    @property
    def num_trained(self) -> int:
        """Losses: rows, or pairs of row and class, or tagged tokens."""
        return int((self.targets != IGNORED).sum())

    def to(self, device: torch.device | str) -> LabelBatch:
        """The same batch on another device."""
        moved = {name: value.to(device) for name, value in vars(self).items() if isinstance(value, Tensor)}
        return replace(self, **moved)


@dataclass(frozen=True)
class TextBatch:
    """Texts of B rows: first the anchors, then the positives, then all negatives: M texts in all.

    `keys` [M]: equal for texts that are the same, token by token.
    """

    input_ids: Int64[Tensor, "M T"]
    attention_mask: Int64[Tensor, "M T"]
    keys: Int64[Tensor, " M"]
    num_examples: int

    @property
    def num_tokens(self) -> int:
        """Tokens without padding."""
        return int(self.attention_mask.sum())

    @property
    def num_trained(self) -> int:
        """Losses: one for each row."""
        return self.num_examples

    def to(self, device: torch.device | str) -> TextBatch:
        """The same batch on another device."""
        moved = {name: value.to(device) for name, value in vars(self).items() if isinstance(value, Tensor)}
        return replace(self, **moved)
