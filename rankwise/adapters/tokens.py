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
from typing_extensions import override

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
            raise RequestError(
                f"trainable_token_indices names '{name}', a {type(base).__name__}; it must be an embedding"
            )
        outside = [index for index in token_indices if not 0 <= index < base.num_embeddings]
        if outside or not token_indices:
            raise RequestError(
                f"trainable_token_indices of '{name}' must lie in 0 to {base.num_embeddings - 1}, "
                f"not {outside or 'an empty list'}"
            )
        if len(set(token_indices)) < len(token_indices):
            twice = next(index for index in token_indices if list(token_indices).count(index) > 1)
            raise RequestError(f"trainable_token_indices of '{name}' has {twice} more than once; drop the repeats")
        self.register_buffer("indices", torch.tensor(list(token_indices), device=base.weight.device))
        self.rows = nn.Parameter(base.weight.detach()[self.token_indices].float().clone())

    @property
    def token_indices(self) -> Tensor:
        """The chosen tokens, [k]."""
        assert isinstance(self.indices, Tensor)
        return self.indices

    @property
    @override
    def rank(self) -> int:
        return 0

    def forward(self, x: Tensor) -> Tensor:
        """The base's embedding, with the chosen tokens' rows put in their place."""
        y = self.base(x)
        return _with_rows(y, x, self.token_indices, self.rows, self.base) if self.active else y

    @override
    def delta_weight(self) -> Float[Tensor, "V d"]:
        weight = self.weight.detach().float()
        return torch.zeros_like(weight).index_copy(0, self.token_indices, self.rows - weight[self.token_indices])

    def merged_weight(self, dtype: torch.dtype | None = None) -> Float[Tensor, "V d"]:
        """The table with the rows copied in, to the last bit."""
        weight = self.weight.detach().to(dtype or self.weight.dtype)
        return weight.index_copy(0, self.token_indices, self.rows.detach().to(weight.dtype))

    @override
    def resize_(self, rank: int, generator: torch.Generator | None = None) -> float:
        raise RequestError(f"trainable token rows have no rank to set to {rank}")

    def low_rank(self) -> None:
        """None: rows are rows."""

    @override
    def to_peft(self) -> dict[str, Tensor]:
        return {ROWS: self.rows.detach()}

    @override
    def peft_shapes(self) -> dict[str, tuple[int, ...]]:
        return {ROWS: tuple(self.rows.shape)}

    @override
    def from_peft(self, tensors: dict[str, Tensor]) -> None:
        with torch.no_grad():
            self.rows.copy_(tensors[ROWS])


def _with_rows(y: Tensor, x: Tensor, indices: Tensor, rows: Tensor, base: nn.Module) -> Tensor:
    """The embeddings `y` of tokens `x`, with `rows` in the place of those in `indices`."""
    chosen = x.unsqueeze(-1) == indices
    new = F.embedding(chosen.int().argmax(-1), rows.to(y.dtype)) * embedding_scale(base)
    return torch.where(chosen.any(-1, keepdim=True), new, y)


@final
class TiedTokenRows(AdapterLayer):
    """A layer that is tied to an embedding with trainable rows (the output head, T5's embeddings): it shares them."""

    def __init__(self, base: nn.Module, source: TokenRows, name: str) -> None:
        super().__init__(base)
        if not isinstance(base, (nn.Linear, nn.Embedding)):
            raise RequestError(f"'{name}' is tied to an embedding with trainable rows but is a {type(base).__name__}")
        self.rows = source.rows
        self.register_buffer("indices", source.token_indices)

    @property
    @override
    def rank(self) -> int:
        return 0

    def forward(self, x: Tensor) -> Tensor:
        """The base's output, with that of the chosen tokens put in its place."""
        y = self.base(x)
        if not self.active:
            return y
        assert isinstance(self.indices, Tensor)
        if isinstance(self.base, nn.Embedding):
            return _with_rows(y, x, self.indices, self.rows, self.base)
        bias = None if self.bias is None else self.bias[self.indices]
        return y.index_copy(-1, self.indices, F.linear(x, self.rows.to(x.dtype), bias).to(y.dtype))

    @override
    def delta_weight(self) -> Float[Tensor, "V d"]:
        weight = self.weight.detach().float()
        assert isinstance(self.indices, Tensor)
        return torch.zeros_like(weight).index_copy(0, self.indices, self.rows - weight[self.indices])

    @override
    def resize_(self, rank: int, generator: torch.Generator | None = None) -> float:
        raise RequestError(f"trainable token rows have no rank to set to {rank}")

    def low_rank(self) -> None:
        """None: rows are rows."""

    def to_peft(self) -> dict[str, Tensor]:
        """Nothing: the embedding saves the rows."""
        return {}

    @override
    def peft_shapes(self) -> dict[str, tuple[int, ...]]:
        return {}

    def from_peft(self, tensors: dict[str, Tensor]) -> None:
        """Nothing to copy: the rows are the embedding's."""
