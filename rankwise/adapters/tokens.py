"""Whole rows of an embedding as trainable numbers: PEFT's `trainable_token_indices`, and what is tied to it.

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
    """The rows of `indices` in the embedding `base` are replaced by trainable ones.

    With `source`, `base` is tied to that embedding (the output head, T5's embeddings) and shares its rows.
    """

    indices: Tensor

    def __init__(
        self, base: nn.Module, token_indices: Sequence[int], name: str, source: TokenRows | None = None
    ) -> None:
        super().__init__(base)
        self.is_tied = source is not None
        if source is None:
            _check(base, token_indices, name)
        elif not isinstance(base, (nn.Linear, nn.Embedding)):
            raise RequestError(f"'{name}' is tied to an embedding with trainable rows but is a {type(base).__name__}")
        indices = torch.tensor(list(token_indices), device=self.weight.device)
        self.register_buffer("indices", indices, persistent=not self.is_tied)
        self.rows = source.rows if source else nn.Parameter(self.weight.detach()[indices].float().clone())

    def forward(self, x: Tensor) -> Tensor:
        """The base's output, with that of the chosen tokens put in its place."""
        y = self.base(x)
        if not self.active:
            return y
        if isinstance(self.base, nn.Embedding):
            chosen = x.unsqueeze(-1) == self.indices
            new = F.embedding(chosen.int().argmax(-1), self.rows.to(y.dtype)) * embedding_scale(self.base)
            return torch.where(chosen.any(-1, keepdim=True), new, y)
        bias = None if self.bias is None else self.bias[self.indices]
        return y.index_copy(-1, self.indices, F.linear(x, self.rows.to(x.dtype), bias).to(y.dtype))

    @override
    def delta_weight(self) -> Float[Tensor, "V d"]:
        weight = self.weight.detach().float()
        return torch.zeros_like(weight).index_copy(0, self.indices, self.rows - weight[self.indices])

    @override
    def merged_weight(self, dtype: torch.dtype | None = None) -> Float[Tensor, "V d"]:
        """The table with the rows copied in, to the last bit."""
        weight = self.weight.detach().to(dtype or self.weight.dtype)
        return weight.index_copy(0, self.indices, self.rows.detach().to(weight.dtype))

    @override
    def peft_parameters(self) -> dict[str, nn.Parameter]:
        """None where the rows are those of another embedding, which saves them."""
        return {} if self.is_tied else {ROWS: self.rows}


def _check(base: nn.Module, token_indices: Sequence[int], name: str) -> None:
    if not isinstance(base, nn.Embedding):
        raise RequestError(f"trainable_token_indices names '{name}', a {type(base).__name__}; it must be an embedding")
    outside = [index for index in token_indices if not 0 <= index < base.num_embeddings]
    if outside or not token_indices:
        raise RequestError(
            f"trainable_token_indices of '{name}' must lie in 0 to {base.num_embeddings - 1}, "
            f"not {outside or 'an empty list'}"
        )
    twice = [index for index in token_indices if list(token_indices).count(index) > 1]
    if twice:
        raise RequestError(f"trainable_token_indices of '{name}' has {twice[0]} more than once; drop the repeats")
