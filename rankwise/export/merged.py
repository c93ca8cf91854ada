"""An attached model as an ordinary Hugging Face folder, verified on the folder that was written.

The merge is computed in fp32 and rounded once to the dtype asked for; the folder is loaded again and compared with the
adapter model on probe texts. Past the bound of `certificate.KL_BOUNDS` nothing is left on disk.

A base in 8 or 4 bits is compared as it is stored, and merged dequantised: what is certified is that the folder is the
model that was trained, not that it is what the unquantised base would have become.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from rankwise import quantized
from rankwise.adapters.base import AdapterLayer
from rankwise.attach.inject import disabled, merge_in
from rankwise.errors import RequestError, WorkError, did_you_mean
from rankwise.export.certificate import Certificate, certify, compare, probe_logits, trim_probes
from rankwise.files import replacing_folder, write_json
from rankwise.models.quiet import quietly

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
CERTIFICATE_FILE = "merge_certificate.json"
MAX_SHARD_SIZE = "5GB"


@dataclass(frozen=True)
class Probes:
    """Token ids of the texts that both models are compared on, and where they came from."""

    ids: Sequence[Sequence[int]]
    source: str


@dataclass(frozen=True)
class Rounding:
    """Relative Frobenius error of the rounded merged weights: of the exact merged weights, and of the update."""

    error: float
    update_error: float


@dataclass(frozen=True)
class Merged:
    """A folder written, and what is known about it."""

    folder: Path
    rounding: Rounding
    certificate: Certificate


def dtype_name(dtype: torch.dtype) -> str:
    """`fp32`, `bf16` or `fp16`.

    Raises: RequestError for any other dtype.
    """
    for name, known in DTYPES.items():
        if known == dtype:
            return name
    raise RequestError(f"can't merge into {dtype}; give one of {', '.join(DTYPES)}")


def merge_to_folder(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    folder: str | Path,
    dtype: str,
    probes: Probes,
) -> Merged:
    """As `write_merged`, into a `folder` that is there whole or not at all.

    Raises: RequestError for a folder that exists, and as `write_merged`.
    """
    target = Path(folder)
    if target.exists():
        raise RequestError(f"output folder '{target}' exists; choose another, or remove it")
    if dtype not in DTYPES:
        raise RequestError(f"unknown dtype '{dtype}'{did_you_mean(dtype, DTYPES)}")
    with replacing_folder(target) as temporary:
        merged = write_merged(model, tokenizer, temporary, dtype, probes)
    return dataclasses.replace(merged, folder=target)


def write_merged(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    folder: Path,
    dtype: str,
    probes: Probes,
    max_shard_size: str = MAX_SHARD_SIZE,
) -> Merged:
    """Folds the adapter of an attached fp32 `model` in, and writes model, tokenizer and certificate to `folder`.

    `model` is used up: afterwards it is the plain merged model in the dtype asked for. `max_shard_size`: of one
    safetensors file, as in `5GB`.

    Raises: RequestError for a model that is not in fp32; WorkError when the folder's model differs from the adapter
    model by more than the bound.
    """
    if model.dtype != torch.float32:
        raise RequestError(f"merging is computed in fp32, but the model is loaded in {model.dtype}; load it in fp32")
    ids = trim_probes(probes.ids)
    storage = quantized.storage_in(model)
    quantized.compute_by_weight(model)  # an 8-bit layer on its own rounds activations too, which no merged weight does
    adapted = probe_logits(model, ids)
    with disabled(model):
        effect = compare(adapted, probe_logits(model, ids))
    rounding = rounding_error(model, DTYPES[dtype])
    merged = merge_in(model, DTYPES[dtype])
    with quietly():
        merged.save_pretrained(folder, max_shard_size=max_shard_size)
        tokenizer.save_pretrained(folder)
        reloaded: Any = type(merged).from_pretrained(folder, dtype=torch.float32)
    again = probe_logits(reloaded.to(merged.device), ids)
    certificate = certify(dtype, compare(adapted, again), effect, probes.source, storage)
    if certificate.verdict != "pass":
        raise WorkError(refusal(certificate))
    write_json(folder / CERTIFICATE_FILE, {**certificate.to_dict(), "error": rounding.error})
    return Merged(folder, rounding, certificate)


def refusal(certificate: Certificate) -> str:
    """Why a merged model is not kept, and what to do."""
    remedy = "merge with --dtype fp32" if certificate.dtype != "fp32" else "report this: an fp32 merge should be exact"
    return (
        f"the merged model in {certificate.dtype} differs from the adapter model by KL {certificate.kl:.3g} nats a "
        f"token, above the bound {certificate.bound:.3g} (the adapter's own effect: "
        f"{certificate.adapter_effect_kl:.3g}); its folder was removed; {remedy}"
    )


def rounding_error(model: PreTrainedModel, dtype: torch.dtype) -> Rounding:
    """What rounding to `dtype` does to the merged weights of all adapted layers taken together.

    Raises: RequestError when the model has no adapted layer.
    """
    layers = [module for module in model.modules() if isinstance(module, AdapterLayer)]
    if not layers:
        raise RequestError("the model has no adapter to merge; load one first")
    lost, exact, update = 0.0, 0.0, 0.0
    with torch.no_grad():
        for layer in layers:
            weight = layer.merged_weight(torch.float32)
            lost += float((weight.to(dtype).float() - weight).double().square().sum())
            exact += float(weight.double().square().sum())
            update += float(layer.delta_weight().double().square().sum())
    return Rounding(_ratio(lost, exact), _ratio(lost, update))


def _ratio(square: float, of_square: float) -> float:
    """Relative error from two sums of squares; nothing lost is 0, whatever it is relative to."""
    if square == 0.0:
        return 0.0
    return math.sqrt(square / of_square) if of_square else math.inf
