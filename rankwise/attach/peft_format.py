"""PEFT's folder, as data: configuration to and from `adapter_config.json`, names to and from the weights file.

Written after peft 0.21.2 (`LoraConfig`, `get_peft_model_state_dict`). Pure: dicts in, dicts out; no file is touched.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import fields as fields_of
from typing import Any

from torch import Tensor

from rankwise.adapters.config import ALL_LINEAR, LoraConfig
from rankwise.config import build
from rankwise.errors import RequestError

PEFT_VERSION = "0.21.2"
PREFIX = "base_model.model."
CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"
EMBEDDING_NAMES = ("embed_tokens", "lm_head")
"""Modules that PEFT saves whole when they are targets."""

_ABSENT: dict[str, Any] = {
    "alora_invocation_tokens": None, "arrow_config": None, "auto_mapping": None, "corda_config": None,
    "ensure_weight_tying": False, "eva_config": None, "fan_in_fan_out": False, "kasa_config": None,
    "layer_replication": None, "loftq_config": {}, "lora_bias": False, "lora_ga_config": None, "megatron_config": None,
    "megatron_core": "megatron.core", "monteclora_config": None, "qalora_group_size": 16, "target_parameters": None,
    "use_bdlora": None, "use_qalora": False, "velora_config": None,
}  # fmt: skip
"""PEFT's fields that we have no equivalent of, with the value that means "not used"."""

_HARMLESS = frozenset(
    {"auto_mapping", "fan_in_fan_out", "megatron_core", "qalora_group_size", "eva_config", "loftq_config"}
)
"""Those of them whose value does not change what a saved adapter computes."""

_SHARED = tuple(field.name for field in fields_of(LoraConfig) if field.name not in {"kind", "init_scale"})
"""Fields that are ours and PEFT's."""

_MOVED_BASE = ("corda", "lora_ga", "loftq", "pissa_niter_")
"""Starts that change the base by data or random draws that the folder does not hold."""


def config_to_peft(config: LoraConfig) -> dict[str, Any]:
    """`adapter_config.json` of `config`."""
    fields: dict[str, Any] = {**_ABSENT, **{name: getattr(config, name) for name in _SHARED}}
    fields.update(peft_type="LORA", peft_version=PEFT_VERSION, inference_mode=True)
    return dict(sorted(fields.items()))


def doubled(config: LoraConfig) -> LoraConfig:
    """The plain LoRA that weights with a frozen start beside them are: twice the ranks, and alphas that keep the scale.

    Those are twice for alpha/r and sqrt(2) times for alpha/sqrt(r).
    """
    more = 2**0.5 if config.use_rslora else 2
    return config.with_(
        r=2 * config.r,
        lora_alpha=config.lora_alpha * more,
        rank_pattern={name: 2 * rank for name, rank in config.rank_pattern.items()},
        alpha_pattern={name: alpha * more for name, alpha in config.alpha_pattern.items()},
        init_lora_weights=True,
    )


def config_from_peft(fields: Mapping[str, Any], where: str) -> LoraConfig:
    """The LoraConfig that `adapter_config.json` describes; `where` names the folder in messages.

    Raises: RequestError for another method than LoRA, or a variant that would compute something else here.
    """
    method = fields.get("peft_type")
    if method != "LORA":
        raise RequestError(f"'{where}' is a {method!r} adapter; only LORA folders can be read")
    _refuse_variants(fields, where)
    known = {name: fields[name] for name in _SHARED if fields.get(name) not in (None, [])}
    if "target_modules" not in known:
        raise RequestError(f"'{where}' does not say its target_modules; add them to {CONFIG_FILE}")
    start = known.get("init_lora_weights", True)
    if isinstance(start, str):
        if start.lower().startswith(_MOVED_BASE):
            raise RequestError(
                f"'{where}' was saved with init_lora_weights={start!r}, which changes the base in a way that the "
                "folder does not hold; save it from PEFT with path_initial_model_for_weight_conversion"
            )
        if start.lower() not in {"gaussian", "orthogonal", "pissa", "olora"}:
            known["init_lora_weights"] = True  # the other starts leave the base alone; only the weights matter now
    try:
        return build(LoraConfig, known, CONFIG_FILE)
    except RequestError as error:
        raise RequestError(f"'{where}': {error}") from None


def _refuse_variants(fields: Mapping[str, Any], where: str) -> None:
    """Raises: RequestError for a setting that is on and that we don't have, newer versions of PEFT included."""
    tied_rows_only = fields.get("trainable_token_indices") is not None  # then tying is what happens anyway
    for name, value in fields.items():
        if name in _SHARED or name in _HARMLESS or name in {"peft_type", "peft_version", "inference_mode"}:
            continue
        if name == "ensure_weight_tying" and tied_rows_only:
            continue
        if value not in (_ABSENT.get(name), None, False, [], {}):
            raise RequestError(
                f"'{where}' uses {name}={value!r}, which is not supported; merge it with PEFT, or take the line out "
                f"of {CONFIG_FILE} if it does not change the outputs"
            )


def saves_embeddings(config: LoraConfig, module_names: list[str]) -> bool:
    """Whether PEFT saves the whole embeddings because they are targets (and no trainable rows are used)."""
    if config.trainable_token_indices is not None:
        return False
    targets = config.target_modules
    if isinstance(targets, list):
        return any(name in targets for name in EMBEDDING_NAMES)
    named = [n for n in module_names if any(re.match(rf"(.*\.)?{e}$", n) for e in EMBEDDING_NAMES)]
    return targets != ALL_LINEAR and any(re.fullmatch(targets, name) for name in named)


def to_file(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Names relative to the model, as PEFT's file has them."""
    return {PREFIX + name: tensor for name, tensor in tensors.items()}


def from_file(tensors: Mapping[str, Tensor], where: str) -> dict[str, Tensor]:
    """PEFT's file, as names relative to the model.

    Raises: RequestError for a name without PEFT's prefix.
    """
    found: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        if not name.startswith(PREFIX):
            raise RequestError(f"'{where}' holds '{name}', which is not a PEFT name (they start with '{PREFIX}')")
        if ".original_module." in name:
            continue  # with bias="all" PEFT saves a head's frozen bias too, and the trained one twice
        found[name.removeprefix(PREFIX).replace(".modules_to_save.", ".")] = tensor
    return found
