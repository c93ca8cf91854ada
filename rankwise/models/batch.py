"""One micro batch, padded or packed: what the data room builds, and what models and losses read.

Legend: B rows, T positions in a row, N positions in all. Padded: one example a row. Packed: one row (B = 1) that holds
the examples end to end; `segment_lengths` are their lengths and sum to T.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from jaxtyping import Float32, Int64
from torch import Tensor

IGNORED = -100
"""The label of a position that is not trained on (torch's and transformers' convention)."""


@dataclass(frozen=True)
class Batch:
    """Token ids with their labels (unshifted: the label of a position is its own token, or IGNORED).

    In a packed batch the label of each segment's first position is IGNORED: nothing before it predicts it.
    """

    input_ids: Int64[Tensor, "B T"]
    labels: Int64[Tensor, "B T"]
    example_index: Int64[Tensor, "B T"]
    """Which example of the batch a position belongs to, 0 to num_examples - 1 (padding: the row's own example)."""
    num_examples: int
    attention_mask: Int64[Tensor, "B T"] | None = None
    """Padded batches: 1 for tokens, 0 for padding."""
    position_ids: Int64[Tensor, "B T"] | None = None
    """Packed batches: restarts at 0 in each segment."""
    segment_lengths: tuple[int, ...] | None = None
    weights: Float32[Tensor, "B T"] | None = None
    """How much each position's label counts in the loss; None: all count once."""

    @property
    def is_packed(self) -> bool:
        """Whether several examples lie end to end in one row."""
        return self.segment_lengths is not None

    @property
    def num_tokens(self) -> int:
        """Tokens without padding."""
        return int(self.input_ids.numel() if self.attention_mask is None else self.attention_mask.sum())

    @property
    def num_trained(self) -> int:
        """Positions that carry a label that some earlier position predicts."""
        return int((self.labels[:, 1:] != IGNORED).sum())

    def label_weights(self) -> Float32[Tensor, " n"] | None:
        """How much each trained position counts, in reading order; None: all count once."""
        return None if self.weights is None else self.weights[:, 1:][self.labels[:, 1:] != IGNORED]

    def to(self, device: torch.device | str) -> Batch:
        """The same batch on another device."""
        moved = {name: value.to(device) for name, value in vars(self).items() if isinstance(value, Tensor)}
        return replace(self, **moved)
