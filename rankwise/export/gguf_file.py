"""Writes a plain model as a GGUF file, and reads one back through transformers.

The package `gguf` writes and quantises; `gguf_metadata` and `gguf_tokenizer` say what is written. Tensors are written
one at a time. q8_0 is blocks of 32 weights of a row with one fp16 scale; what has rows of another length stays f16, and
vectors are f32, as llama.cpp's own files have them.
"""

from __future__ import annotations

import contextlib
import io
import unicodedata
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PretrainedConfig, PreTrainedModel

from rankwise.errors import RequestError, WorkError
from rankwise.export.gguf_metadata import (
    FROM_THE_BASE,
    Architecture,
    Value,
    architecture_of,
    model_metadata,
    rope_factors,
)
from rankwise.export.gguf_tokenizer import HARD_TEXTS, Vocabulary
from rankwise.models.gguf_weights import permute_rotary
from rankwise.models.quiet import quietly

FILE_TYPES = {"f32": 0, "f16": 1, "q8_0": 7}
"""`general.file_type` of a file whose matrices are mostly of a dtype."""
BITS = {"f32": 32.0, "f16": 16.0, "q8_0": 8.5}
"""For each weight."""
FACTORS = "rope_freqs.weight"


@dataclass(frozen=True)
class Written:
    """What a file holds: tensors of each type, by its name (`Q8_0`)."""

    types: Mapping[str, int]


def tensor_names(config: PretrainedConfig, architecture: Architecture) -> Any:
    """Gguf's table of this model's tensors: transformers' name without its last part, to GGUF's."""
    import gguf

    kinds = {name: kind for kind, name in gguf.MODEL_ARCH_NAMES.items()}
    return gguf.get_tensor_name_map(kinds[architecture.name], config.num_hidden_layers)


def file_tensor_name(names: Any, name: str) -> str:
    """GGUF's name of the tensor that transformers calls `name`. Raises: RequestError where it has none."""
    module, _, end = name.rpartition(".")
    found = names.get_name(module)
    if found is None:
        raise RequestError(f"--to gguf has no place for the weight '{name}'; --to merged takes any")
    return f"{found}.{end}"


def turned(values: np.ndarray, name: str, config: PretrainedConfig, architecture: Architecture) -> np.ndarray:
    """The rows of a query's or key's matrix (or bias, or B) in the file's order; others as they are.

    `name` is GGUF's.
    """
    if not architecture.interleaves:
        return values
    heads = {"attn_q": config.num_attention_heads, "attn_k": config.num_key_value_heads or config.num_attention_heads}
    part = name.split(".")[2] if name.startswith("blk.") else ""
    return permute_rotary(values, heads[part]) if part in heads else values


def write_gguf(model: PreTrainedModel, vocabulary: Vocabulary, path: Path, dtype: str, name: str) -> Written:
    """Writes the plain `model` to `path`; `name` is what the file calls itself.

    Raises: RequestError for a model that the format can't hold; OSError when the disk is full.
    """
    import gguf

    config = model.config
    architecture = architecture_of(config, "gguf")
    names = tensor_names(config, architecture)
    writer = gguf.GGUFWriter(path, architecture.name)
    writer.add_type(gguf.GGUFType.MODEL)
    writer.add_name(name)
    writer.add_file_type(FILE_TYPES[dtype])
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    for key, value in model_metadata(config, architecture).items():
        add_value(writer, key, value)
    add_vocabulary(writer, vocabulary)
    stored = {file_tensor_name(names, own): own for own in _own_names(model)}
    state = model.state_dict()
    types = {place: tensor_type(state[own], dtype) for place, own in stored.items()}
    factors = rope_factors(config)
    if factors is not None:
        writer.add_tensor_info(FACTORS, [len(factors)], np.dtype(np.float32), 4 * len(factors))
    for place, own in stored.items():
        _announce(writer, place, state[own], types[place])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    if factors is not None:
        writer.write_tensor_data(np.array(factors, dtype=np.float32))
    for place, own in stored.items():
        values = turned(state[own].detach().float().cpu().numpy(), place, config, architecture)
        writer.write_tensor_data(gguf.quantize(np.ascontiguousarray(values), types[place]))
    writer.close()
    counted = [kind.name for kind in types.values()]
    return Written({kind: counted.count(kind) for kind in dict.fromkeys(counted)})


def _own_names(model: PreTrainedModel) -> list[str]:
    """Names of the weights; of a tied pair, the embedding's only."""
    tied = "lm_head.weight" if model.config.tie_word_embeddings else None
    return [name for name in model.state_dict() if name != tied]


def tensor_type(tensor: Tensor, dtype: str) -> Any:
    """Gguf's type that a tensor is stored in."""
    import gguf

    kinds = gguf.GGMLQuantizationType
    if tensor.dim() < 2 or dtype == "f32":
        return kinds.F32
    block, _ = gguf.GGML_QUANT_SIZES[kinds.Q8_0]
    return kinds.Q8_0 if dtype == "q8_0" and tensor.shape[-1] % block == 0 else kinds.F16


def _announce(writer: Any, name: str, tensor: Tensor, kind: Any) -> None:
    """The tensor's place in the file, before its data."""
    import gguf

    block, block_bytes = gguf.GGML_QUANT_SIZES[kind]
    num_bytes = tensor.numel() // block * block_bytes
    plain = np.dtype(np.float16 if kind == gguf.GGMLQuantizationType.F16 else np.float32)
    writer.add_tensor_info(name, list(tensor.shape), plain, num_bytes, raw_dtype=kind)


def add_value(writer: Any, key: str, value: Value) -> None:
    """One key, in the type that llama.cpp reads numbers in."""
    if isinstance(value, bool):
        writer.add_bool(key, value)
    elif isinstance(value, int):
        writer.add_uint32(key, value)
    elif isinstance(value, float):
        writer.add_float32(key, value)
    else:
        writer.add_string(key, value)


def add_vocabulary(writer: Any, vocabulary: Vocabulary) -> None:
    """The tokenizer's keys."""
    writer.add_tokenizer_model(vocabulary.model)
    writer.add_tokenizer_pre(vocabulary.pre)
    writer.add_token_list(vocabulary.tokens)
    writer.add_token_types(vocabulary.types)
    if vocabulary.scores:
        writer.add_token_scores(vocabulary.scores)
        writer.add_add_space_prefix(vocabulary.adds_space)
    if vocabulary.merges:
        writer.add_token_merges(vocabulary.merges)
    for name, index in vocabulary.special.items():
        writer.add_uint32(f"tokenizer.ggml.{name}_token_id", index)
    writer.add_add_bos_token(vocabulary.add_bos)
    writer.add_add_eos_token(vocabulary.add_eos)
    if vocabulary.chat_template is not None:
        writer.add_chat_template(vocabulary.chat_template)


# --- reading back --------------------------------------------------------------------------------------------------


def read_config(path: Path, base: PretrainedConfig) -> PretrainedConfig:
    """The configuration by the file, with those fields of `base` that transformers does not take from it.

    Raises: WorkError when the file says something else than `base`.
    """
    with quietly():
        config = AutoConfig.from_pretrained(path.parent, gguf_file=path.name)
    same = {
        "vocab_size": base.vocab_size,
        "hidden_size": base.hidden_size,
        "intermediate_size": base.intermediate_size,
        "num_hidden_layers": base.num_hidden_layers,
        "num_attention_heads": base.num_attention_heads,
        "num_key_value_heads": base.num_key_value_heads or base.num_attention_heads,
        "rms_norm_eps": base.rms_norm_eps,
        "rope_theta": base.rope_parameters["rope_theta"],
        "tie_word_embeddings": base.tie_word_embeddings,
    }
    for name, expected in same.items():
        found = config.rope_parameters[name] if name == "rope_theta" else getattr(config, name)
        if not np.isclose(found, expected, rtol=1e-6, atol=0):
            raise WorkError(f"the file says {name} {found} where the model has {expected}; report this")
    for name in FROM_THE_BASE:
        value = getattr(base, name, None)
        if value is not None:
            setattr(config, name, value)
    return config


def read_model(path: Path, base: PretrainedConfig) -> PreTrainedModel:
    """The model that transformers reads from the file, in fp32. Raises: WorkError, as `read_config`."""
    config = read_config(path, base)
    with quietly(), _without_bars():
        return AutoModelForCausalLM.from_pretrained(
            path.parent, gguf_file=path.name, config=config, dtype=torch.float32
        ).eval()


def check_tokenizer(path: Path, tokenizer: Any, normalises: bool) -> int:
    """How many hard texts, and chats, the tokenizer that transformers reads from the file cuts as `tokenizer` does.

    `normalises`: whether `tokenizer` brings texts into NFC; the file can't say that, so they are in it before.

    Raises: WorkError for one that it cuts otherwise.
    """
    with quietly():
        again = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    special = [text for text in tokenizer.all_special_tokens if isinstance(text, str)]
    texts = [*HARD_TEXTS, *(f"a{text}\nb{text}" for text in special)]
    for hard in texts:
        text = unicodedata.normalize("NFC", hard) if normalises else hard
        wanted = tokenizer(text, add_special_tokens=False)["input_ids"]
        found = again(text, add_special_tokens=False)["input_ids"]
        if found != wanted:
            raise WorkError(
                f"the tokenizer read back from the file cuts {text!r} into {found[:12]}, where the model's own has "
                f"{wanted[:12]}; nothing was kept; --to merged keeps the tokenizer's own files"
            )
    return len(texts)


@contextlib.contextmanager
def _without_bars() -> Iterator[None]:
    """Transformers' reader of GGUF draws a bar of its own, whatever it was told of bars."""
    with contextlib.redirect_stderr(io.StringIO()):
        yield
