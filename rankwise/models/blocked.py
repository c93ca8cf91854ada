"""Attention on CPUs with bf16 instructions: the products of matrices in bf16, a block of queries at a time.

torch's flash attention on CPUs works on bf16 in small tiles that it converts to and fro, and its backward pass is the
slowest part of a step on rows of a few hundred tokens: 2 to 5 times what it takes here (docs/performance.md). What is
held is one block's scores, never the square of a row (Rabe & Staats 2021, "Self-attention does not need O(n^2) memory",
arXiv 2112.05682); the backward pass computes them again. Scores and softmax are float32, as flash attention has them:
what is rounded to bf16 are the probabilities and the gradient of the scores, before their products.

Legend: B rows, h query heads, k key heads, L tokens, d head dimension, e that of values, g = h / k, N = B * k.
"""

from __future__ import annotations

import functools
import math
import threading
from collections.abc import Iterator
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.autograd.function import once_differentiable

BLOCK = 128
"""Queries in a block."""

SCORES = 1 << 18
"""Scores that are held at a time, 1 MiB of them: what a core's second cache holds. More where one head has more."""

_scratch = threading.local()
"""Each thread's memory for one block: fresh memory would cost more than what is computed in it."""

LONGEST = 4096
"""Tokens up to which this was faster than flash attention."""


@functools.cache
def has_bf16_products() -> bool:
    """Whether this CPU multiplies bf16 matrices in one instruction; others emulate it, slower than float32."""
    able = torch.cpu.get_capabilities()
    return bool(able.get("avx512_bf16") or able.get("amx_bf16"))


def fits(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> bool:
    """Whether `blocked_attention` takes these [B, heads, tokens, _], and is faster than stock attention."""
    tensors = (query, key, value)
    return (
        all(part.dtype == torch.bfloat16 and part.device.type == "cpu" for part in tensors)
        and has_bf16_products()
        and query.shape[2] == key.shape[2] == value.shape[2]
        and 1 < query.shape[2] <= LONGEST
        and query.shape[0] == key.shape[0]
        and query.shape[1] % key.shape[1] == 0
        and (mask is None or _same_for_all_heads(mask, query))
        and not (torch.compiler.is_compiling() or torch.jit.is_tracing())
    )


def _room(name: str, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Memory of this thread for a tensor of `shape`, to be written; the next call with `name` gives the same."""
    size = math.prod(shape)
    held = vars(_scratch).get(name)
    if held is None or len(held) < size:
        with torch.inference_mode(mode=False):  # else training could not write to it afterwards
            held = vars(_scratch)[name] = torch.empty(max(size, SCORES), dtype=dtype)
    return held[:size].view(shape)


def _same_for_all_heads(mask: Tensor, query: Tensor) -> bool:
    rows, length = query.shape[0], query.shape[2]
    return (
        mask.ndim == 4
        and mask.shape[0] in (1, rows)
        and mask.shape[1] == 1
        and mask.shape[2] in (1, length)
        and mask.shape[3] == length
        and not mask.requires_grad
    )


def blocked_attention(
    query: Float[Tensor, "B h L d"],
    key: Float[Tensor, "B k L d"],
    value: Float[Tensor, "B k L e"],
    mask: Bool[Tensor, "_ 1 _ L"] | Float[Tensor, "_ 1 _ L"] | None,
    causal: bool,
    scale: float | None,
) -> Float[Tensor, "B L h e"]:
    """softmax(scale * query @ key^T + mask) @ value, as torch's scaled_dot_product_attention of tensors that `fits`.

    Args:
        query: of each token, in bf16.
        key: the same; the i-th head serves the queries' heads from i * g on.
        value: the same.
        mask: true where a query may see a key, or what is added to its score; the same for all heads.
        causal: tokens see none behind them; not beside a mask.
        scale: 1 / sqrt(d) if None.

    A query that may see nothing gets zeros.
    """
    if mask is not None:
        mask = mask.expand(query.shape[0], 1, query.shape[2], query.shape[2])
    return _Blocked.apply(query, key, value, mask, causal, query.shape[-1] ** -0.5 if scale is None else scale)


class _Heads:
    """Query, key and value by key head, [N, g, L, d], [N, L, d], [N, L, e], and the blocks of scores between them."""

    def __init__(self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, causal: bool) -> None:
        self.num_keys, self.length = key.shape[1], key.shape[2]
        self.group = query.shape[1] // self.num_keys
        self.query = self.by_key(query)
        self.key, self.value = key.flatten(0, 1), value.flatten(0, 1)
        self.exact_key = self.key.float()
        self.mask, self.causal = mask, causal
        self.blind = None if mask is None else _blind(mask)

    def by_key(self, part: Tensor) -> Tensor:
        """[B, h, L, _] as [N, g, L, _]."""
        return part.reshape(-1, self.group, self.length, part.shape[-1])

    def blocks(self) -> Iterator[tuple[slice, slice, slice]]:
        """Key heads (of N), queries, and the keys that those see."""
        for start in range(0, self.length, BLOCK):
            stop = min(self.length, start + BLOCK)
            seen = stop if self.causal else self.length
            at_once = max(1, SCORES // (self.group * (stop - start) * seen))
            for head in range(0, self.key.shape[0], at_once):
                yield slice(head, head + at_once), slice(start, stop), slice(0, seen)

    def rows(self, part: Tensor, heads: slice, queries: slice) -> Tensor:
        """The block's rows of `part` [N, g, L, _], as [heads, g * queries, _]."""
        return part[heads, :, queries].flatten(1, 2)

    def probabilities(self, rows: Tensor, heads: slice, queries: slice, keys: slice, scale: float) -> Tensor:
        """Of the block, in float32: [heads, g * queries, keys], until the next block's are asked for."""
        seen = self.exact_key[heads, keys]
        scores = _room("scores", (*rows.shape[:2], seen.shape[1]), torch.float32)
        torch.bmm(rows.float().mul_(scale), seen.transpose(1, 2), out=scores)
        by_query = scores.unflatten(1, (self.group, -1))
        if self.causal:
            size = queries.stop - queries.start
            by_query[..., queries].add_(_ahead(BLOCK)[:size, :size])
        if self.mask is None:
            return torch.softmax(scores, dim=-1, out=scores)
        of_rows = torch.arange(heads.start, heads.start + len(scores)) // self.num_keys
        mask = self.mask[of_rows, :, queries, keys]
        if mask.dtype == torch.bool:
            by_query.masked_fill_(~mask, -torch.inf)
        else:
            by_query.add_(mask)
        torch.softmax(scores, dim=-1, out=scores)
        if self.blind is not None:
            by_query.masked_fill_(self.blind[of_rows, :, queries], 0.0)
        return scores


@functools.cache
def _ahead(size: int) -> Tensor:
    """What is added to scores of a query and a key behind it."""
    return torch.full((size, size), -torch.inf).triu(1)


def _halved(scores: Tensor) -> Tensor:
    """Rounded to bf16, until the next call."""
    return _room("rounded", tuple(scores.shape), torch.bfloat16).copy_(scores)


def _blind(mask: Tensor) -> Tensor | None:
    """Which queries see nothing, [B, 1, L, 1]; None if all see something."""
    seen = mask if mask.dtype == torch.bool else mask != -torch.inf
    blind = ~seen.any(dim=-1, keepdim=True)
    return blind if bool(blind.any()) else None


_library = torch.library.Library("rankwise", "DEF")
_library.define(
    "blocked_attention(Tensor query, Tensor key, Tensor value, Tensor? mask, bool causal, float scale) -> Tensor"
)


@torch.library.impl(_library, "blocked_attention", "CPU")
def _forward(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, causal: bool, scale: float) -> Tensor:
    """`blocked_attention` as one operation, so that gradient checkpointing can keep its result."""
    at = _Heads(query, key, value, mask, causal)
    outputs = value.new_empty(*at.query.shape[:3], value.shape[-1])
    with torch.autocast("cpu", enabled=False):
        for heads, queries, keys in at.blocks():
            probabilities = at.probabilities(at.rows(at.query, heads, queries), heads, queries, keys, scale)
            found = torch.bmm(_halved(probabilities), at.value[heads, keys])
            outputs[heads, :, queries] = found.unflatten(1, (at.group, -1))
    return outputs.view(*query.shape[:3], -1).transpose(1, 2).contiguous()


def _backward(
    gradient: Tensor, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, causal: bool, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of query, key and value; of the forward pass nothing was kept but its inputs."""
    at = _Heads(query, key, value, mask, causal)
    of_outputs = at.by_key(gradient.transpose(1, 2))
    of_query = torch.empty_like(at.query, memory_format=torch.contiguous_format)
    # what is added up over blocks of queries is added up in float32
    exact = query.dtype if at.length <= BLOCK else torch.float32
    of_key, of_value = (torch.zeros(part.shape, dtype=exact) for part in (at.key, at.value))
    with torch.autocast("cpu", enabled=False):
        for heads, queries, keys in at.blocks():
            rows, of_rows = at.rows(at.query, heads, queries), at.rows(of_outputs, heads, queries)
            probabilities = at.probabilities(rows, heads, queries, keys, scale)
            of_value[heads, keys] += torch.bmm(_halved(probabilities).transpose(1, 2), of_rows)
            wanted = _room("products", tuple(probabilities.shape), torch.bfloat16)
            torch.bmm(of_rows, at.value[heads, keys].transpose(1, 2), out=wanted)
            exactly = _room("of scores", tuple(probabilities.shape), torch.float32).copy_(wanted)
            torch.ops.aten._softmax_backward_data.out(exactly, probabilities, -1, torch.float32, grad_input=exactly)
            of_scores = _halved(exactly.mul_(scale))
            found = torch.bmm(of_scores, at.key[heads, keys])
            of_query[heads, :, queries] = found.unflatten(1, (at.group, -1))
            of_key[heads, keys] += torch.bmm(of_scores.transpose(1, 2), rows)
    return (
        of_query.view(query.shape), of_key.to(key.dtype).view(key.shape), of_value.to(value.dtype).view(value.shape),
    )  # fmt: skip


class _Blocked(torch.autograd.Function):
    """`blocked_attention`, of which nothing but its inputs is kept."""

    @staticmethod
    def forward(
        ctx: Any, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, causal: bool, scale: float
    ) -> Tensor:
        ctx.save_for_backward(query, key, value, mask)
        ctx.causal, ctx.scale = causal, scale
        return torch.ops.rankwise.blocked_attention(query, key, value, mask, causal, scale)

    @staticmethod
    @once_differentiable  # which hides the argument names from the type checker
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, gradient: Tensor
    ) -> tuple[Tensor | None, ...]:
        query, key, value, mask = ctx.saved_tensors
        return (*_backward(gradient, query, key, value, mask, ctx.causal, ctx.scale), None, None, None)
