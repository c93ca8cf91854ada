"""Whole rows of an embedding as trainable numbers: PEFT's `trainable_token_indices`, and the head tied to it.

Legend: k chosen tokens, d width of the embedding, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import final

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from rankwise.adapters.base import AdapterLayer
from rankwise.adapters.layers import embedding_scale
from rankwise.errors import RequestError

ROWS = "token_adapter.trainable_tokens_delta"
"""PEFT's name. Despite it, the tensor holds the rows themselves."""


@final
class TokenRows(AdapterLayer):
    """The rows of `token_indices` in the embedding `base` are replaced by trainable ones."""

    def __init__(self, base: nn.Module, token_indices: Sequence[int], name: str) -> None:
        super().__init__(base)
        if not isinstance(base, nn.Embedding):
            raise RequestError(f"trainable_token_indices names '{name}', a {type(base).__name__}; it must be an embedding")
        indices = sorted(set(token_indices))
        if not indices or indices[0] < 0 or indices[-1] >= base.num_embeddings:
            raise RequestError(
                f"trainable_token_indices of '{name}' must lie in 0 to {base.num_embeddings - 1}, not {list(token_indices)}"
            )
        self.register_buffer("indices", torch.tensor(list(token_indices), device=base.weight.device))
        self.rows = nn.Parameter(base.weight.detach()[self.token_indices].float().clone())

    @property
    def token_indices(self) -> Tensor:
        """The chosen tokens, [k]."""
        assert isinstance(self.indices, Tensor)
        return self.indices

    @property
    def rank(self) -> int:
        return 0

    def forward(self, x: Tensor) -> Tensor:
        """The base's embedding, with the chosen tokens' rows put in their place."""
        y = self.base(x)
        if not self.active:
            return y
        chosen = x.unsqueeze(-1) == self.token_indices
        rows = F.embedding(chosen.int().argmax(-1), self.rows.to(y.dtype)) * embedding_scale(self.base)
        return torch.where(chosen.any(-1, keepdim=True), rows, y)

    def delta_weight(self) -> Float[Tensor, "V d"]:
        weight = self.weight.detach().float()
        return torch.zeros_like(weight).index_copy(0, self.token_indices, self.rows - weight[self.token_indices])

    def merged_weight(self, dtype: torch.dtype | None = None) -> Float[Tensor, "V d"]:
        """The table with the rows copied in, to the last bit."""
        weight = self.weight.detach().to(dtype or self.weight.dtype)
        return weight.index_copy(0, self.token_indices, self.rows.detach().to(weight.dtype))

    def resize_(self, rank: int, generator: torch.Generator | None = None) -> float:
        raise RequestError(f"trainable token rows have no rank to set to {rank}")

    def low_rank(self) -> None:
        """None: rows are rows."""

    def to_peft(self) -> dict[str, Tensor]:
        return {ROWS: self.rows.detach()}

    def peft_shapes(self) -> dict[str, tuple[int, ...]]:
        return {ROWS: tuple(self.rows.shape)}

    def from_peft(self, tensors: dict[str, Tensor]) -> None:
        with torch.no_grad():
            self.rows.copy_(tensors[ROWS])


@final
class TiedTokenRows(AdapterLayer):
    """The output head that is tied to an embedding with trainable rows: it shares them."""

    def __init__(self, base: nn.Module, source: TokenRows, name: str) -> None:
        super().__init__(base)
        if not isinstance(base, nn.Linear):
            raise RequestError(f"'{name}' is tied to an embedding with trainable rows but is a {type(base).__name__}")
        self.rows = source.rows
        self.register_buffer("indices", source.token_indices)

    @property
    def rank(self) -> int:
        return 0

    def forward(self, x: Tensor) -> Tensor:
        """The base's logits, with those of the chosen tokens put in their place."""
        y = self.base(x)
        if not self.active:
            return y
        assert isinstance(self.indices, Tensor)
        bias = None if self.bias is None else self.bias[self.indices]
        return y.index_copy(-1, self.indices, F.linear(x, self.rows.to(x.dtype), bias).to(y.dtype))

    def delta_weight(self) -> Float[Tensor, "V d"]:
        weight = self.weight.detach().float()
        assert isinstance(self.indices, Tensor)
        return torch.zeros_like(weight).index_copy(0, self.indices, self.rows - weight[self.indices])

    def resize_(self, rank: int, generator: torch.Generator | None = None) -> float:
        raise RequestError(f"trainable token rows have no rank to set to {rank}")

    def low_rank(self) -> None:
        """None: rows are rows."""

    def to_peft(self) -> dict[str, Tensor]:
        """Nothing: the embedding saves the rows."""
        return {}

    def peft_shapes(self) -> dict[str, tuple[int, ...]]:
        return {}

    def from_peft(self, tensors: dict[str, Tensor]) -> None:
        """Nothing to copy: the rows are the embedding's."""
