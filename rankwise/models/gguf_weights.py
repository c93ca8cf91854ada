"""Reads the weights of a Llama-type GGUF file into the names that transformers uses.

GGUF is llama.cpp's format. Its Llama files rename the tensors and permute the rows of the query and key projections
(pairs of rotary halves are interleaved); both are undone here. Quantised blocks are dequantised by the package `gguf`.
Not a general converter: other architectures are refused.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from rankwise.errors import RequestError

_LAYER_NAMES = {
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
}
_OUTER_NAMES = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}


class GgufFile:
    """An opened GGUF file of a Llama-type model.

    Raises: RequestError when the package `gguf` is missing, or the file is damaged or of another architecture.
    """

    def __init__(self, path: Path) -> None:
        try:
            from gguf import GGUFReader
        except ImportError:
            raise RequestError(f"reading '{path.name}' needs the package gguf; pip install 'rankwise[demo]'") from None
        try:
            self._reader: Any = GGUFReader(path)
        except (ValueError, IndexError, OSError) as error:
            raise RequestError(f"'{path}' is not a readable GGUF file ({error}); reinstall its package") from None
        self.path = path
        architecture = self._value("general.architecture")
        if architecture != "llama":
            raise RequestError(f"'{path}' holds a model of type '{architecture}'; only 'llama' can be converted")
        self._heads = {
            "attn_q": int(self._value("llama.attention.head_count")),
            "attn_k": int(self._value("llama.attention.head_count_kv")),
        }

    def _value(self, key: str) -> Any:
        field = self._reader.get_field(key)
        if field is None:
            raise RequestError(f"'{self.path}' lacks the field '{key}'; reinstall its package")
        return field.contents()

    def __len__(self) -> int:
        return len(self._reader.tensors)

    def tensors(self, dtype: torch.dtype) -> Iterator[tuple[str, Tensor]]:
        """Each weight under transformers' name, dequantised in float32 and rounded to `dtype`."""
        from gguf import dequantize

        for tensor in self._reader.tensors:
            module, _, end = tensor.name.rpartition(".")
            values = np.asarray(dequantize(tensor.data, tensor.tensor_type), dtype=np.float32)
            layer, _, part = module.removeprefix("blk.").partition(".")
            if module in _OUTER_NAMES:
                name = _OUTER_NAMES[module]
            elif part in _LAYER_NAMES:
                name = f"model.layers.{layer}.{_LAYER_NAMES[part]}"
            else:
                raise RequestError(f"'{self.path}' has a weight '{tensor.name}' that a Llama model does not have")
            if part in self._heads:
                values = unpermute_rotary(values, self._heads[part])
            yield f"{name}.{end}", torch.from_numpy(values.copy()).to(dtype)


def unpermute_rotary(weight: np.ndarray, num_heads: int) -> np.ndarray:
    """Rows from llama.cpp's interleaved rotary pairs back to transformers' two halves, head by head."""
    pairs = weight.reshape(num_heads, -1, 2, *weight.shape[1:])
    return pairs.swapaxes(1, 2).reshape(weight.shape)


def permute_rotary(weight: np.ndarray, num_heads: int) -> np.ndarray:
    """The inverse of `unpermute_rotary`: transformers' two halves of each head to llama.cpp's interleaved pairs."""
    halves = weight.reshape(num_heads, 2, -1, *weight.shape[1:])
    return halves.swapaxes(1, 2).reshape(weight.shape)
