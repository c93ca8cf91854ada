"""Caches of keys and values made from plain tensors, and plain tensors of caches: key and value of each layer in turn.

Legend: B rows, P tokens in the cache.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor
from transformers import DynamicCache, EncoderDecoderCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer

from rankwise.models.probing import takes


def cache_argument(model: PreTrainedModel) -> str:
    """What the model's forward calls its cache."""
    return "cache" if takes(model, "cache") else "past_key_values"


def cache_tensors(cache: Any) -> list[Tensor]:
    """Key and value [B, heads, P, width] of each layer in turn."""
    return [tensor for layer in cache.layers for tensor in (layer.keys, layer.values)]


def filled_cache(past: Sequence[Tensor]) -> DynamicCache:
    """A cache that holds keys and values [B, heads, P, width], key and value of each layer in turn.

    Sliding windows are the attention mask's business: the cache keeps everything.
    """
    cache = DynamicCache()
    layers = []
    for keys, values in zip(past[::2], past[1::2], strict=True):
        layer = DynamicLayer()
        layer.lazy_initialization(keys, values)
        layer.keys, layer.values = keys, values
        layers.append(layer)
    cache.layers = layers
    return cache


def filled_caches(past: Sequence[Tensor], source: Sequence[Tensor]) -> EncoderDecoderCache:
    """Keys and values of the answer so far, and of the question."""
    cache = EncoderDecoderCache(filled_cache(past), DynamicCache())
    cache.cross_attention_cache = filled_cache(source)
    cache.is_updated = dict.fromkeys(range(len(source) // 2), True)
    return cache
