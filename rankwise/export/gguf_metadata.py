"""Which models a GGUF file can hold here, and what its metadata says of them. Pure: a configuration in, keys out.

GGUF is llama.cpp's format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md names the keys. The names of the
tensors are the tables of the package `gguf`. Not a general converter: a model is exported where llama.cpp computes what
transformers computes, and refused, with the reason, where it does not.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from transformers import PretrainedConfig

from rankwise.errors import RequestError


@dataclass(frozen=True)
class Architecture:
    """How llama.cpp has one of transformers' model types.

    Args:
        name: llama.cpp's.
        interleaves: whether the rotary pairs of queries and keys lie beside each other in the file, where
            transformers has them in two halves.
    """

    name: str
    interleaves: bool = False


ARCHITECTURES: dict[str, Architecture] = {
    "llama": Architecture("llama", interleaves=True),  # SmolLM2 too
    "mistral": Architecture("llama", interleaves=True),
    "qwen2": Architecture("qwen2"),  # and 2.5
    "qwen3": Architecture("qwen3"),
}
"""By transformers' model type."""

FROM_THE_BASE = ("rope_parameters", "head_dim", "attention_bias", "mlp_bias")
"""Fields of a configuration that transformers does not take from a GGUF file of these architectures."""

Value = int | float | str | bool


def architecture_of(config: PretrainedConfig, to: str) -> Architecture:
    """How llama.cpp has this model; `to` names the format in messages.

    Raises: RequestError for a model that it does not have, or that it would compute otherwise.
    """
    found = ARCHITECTURES.get(config.model_type)
    if found is None:
        raise RequestError(
            f"--to {to} can't hold a model of type '{config.model_type}'; it can hold {', '.join(ARCHITECTURES)} "
            "(SmolLM2 is a llama); --to merged takes any"
        )
    if config.hidden_act not in ("silu", "swish"):
        raise RequestError(
            f"--to {to} can't hold a {config.model_type} with hidden_act '{config.hidden_act}': llama.cpp computes "
            "silu; --to merged takes any"
        )
    rope_scaling(config, to)
    return found


def head_dim(config: PretrainedConfig) -> int:
    """Numbers in one head of the attention."""
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def rope_scaling(config: PretrainedConfig, to: str = "gguf") -> dict[str, Value]:
    """The keys, after `rope.`, of how positions are scaled.

    The type `llama3` has none: it is written as a tensor of factors (`rope_factors`).

    Raises: RequestError for a type that llama.cpp has not, or has otherwise.
    """
    rope = config.rope_parameters
    kind = rope.get("rope_type", "default")
    if rope.get("partial_rotary_factor", 1.0) != 1.0:
        raise RequestError(
            f"--to {to} can't hold partial_rotary_factor {rope['partial_rotary_factor']}; --to merged can"
        )
    if kind in ("default", "llama3"):
        return {}
    if kind == "linear":
        return {"scaling.type": "linear", "scaling.factor": float(rope["factor"])}
    if kind == "yarn" and not {"attention_factor", "mscale", "mscale_all_dim"} & {k for k, v in rope.items() if v}:
        return {
            "scaling.type": "yarn",
            "scaling.factor": float(rope["factor"]),
            "scaling.original_context_length": int(rope["original_max_position_embeddings"]),
            "scaling.yarn_beta_fast": float(rope.get("beta_fast") or 32.0),
            "scaling.yarn_beta_slow": float(rope.get("beta_slow") or 1.0),
        }
    raise RequestError(
        f"--to {to} can't hold rope_type '{kind}' as this model has it ({rope}); it can hold default, linear, llama3, "
        "and yarn without attention factors; --to merged takes any"
    )


def rope_factors(config: PretrainedConfig) -> list[float] | None:
    """What each frequency is divided by, one for each pair of a head, in `llama3` scaling; None for other types.

    Llama 3.1 (Grattafiori et al. 2024, arXiv 2407.21783): wavelengths above the original context over the low factor
    are stretched by `factor`, those below it over the high factor stay, and between them the frequency is mixed.
    """
    rope = config.rope_parameters
    if rope.get("rope_type") != "llama3":
        return None
    width, factor = head_dim(config), float(rope["factor"])
    low, high = float(rope["low_freq_factor"]), float(rope["high_freq_factor"])
    context = float(rope["original_max_position_embeddings"])
    factors = []
    for place in range(0, width, 2):
        wavelength = 2 * math.pi * rope["rope_theta"] ** (place / width)
        share = min(1.0, max(0.0, (context / wavelength - low) / (high - low)))
        factors.append(1.0 / (share + (1.0 - share) / factor))
    return factors


def context_length(config: PretrainedConfig) -> int:
    """The longest text that llama.cpp computes as transformers does: it has no sliding window for these models."""
    window = getattr(config, "sliding_window", None)
    return config.max_position_embeddings if window is None else min(window, config.max_position_embeddings)


def model_metadata(config: PretrainedConfig, architecture: Architecture) -> dict[str, Value]:
    """Sizes and constants of the model, by GGUF's keys."""
    width = head_dim(config)
    keys: dict[str, Value] = {
        "vocab_size": config.vocab_size,
        "context_length": context_length(config),
        "embedding_length": config.hidden_size,
        "block_count": config.num_hidden_layers,
        "feed_forward_length": config.intermediate_size,
        "attention.head_count": config.num_attention_heads,
        "attention.head_count_kv": config.num_key_value_heads or config.num_attention_heads,
        "attention.key_length": width,
        "attention.value_length": width,
        "attention.layer_norm_rms_epsilon": float(config.rms_norm_eps),
        "rope.dimension_count": width,
        "rope.freq_base": float(config.rope_parameters["rope_theta"]),
    }
    keys.update({f"rope.{name}": value for name, value in rope_scaling(config).items()})
    return {f"{architecture.name}.{name}": value for name, value in keys.items()}


def notes_of(config: PretrainedConfig) -> list[str]:
    """What a reader of the file's report has to know of it."""
    notes = []
    window: Any = getattr(config, "sliding_window", None)
    if window is not None and window < config.max_position_embeddings:
        notes.append(f"the context is {window} tokens, the model's sliding window, which llama.cpp does not have")
    if config.rope_parameters.get("rope_type", "default") != "default":
        kind = config.rope_parameters["rope_type"]
        notes.append(f"rope scaling ({kind}) is in the file, but transformers does not read it: taken from the base")
    return notes
