"""Loading a base in 8 or 4 bits through transformers and bitsandbytes, and models that are stored in bits already.

What is quantised are the weights in their file's own dtype, whatever the run's precision, so that a run and everything
done with it later (evaluation, merging in fp32) have one and the same base. Embeddings, norms, the output head and a
task's new head stay plain numbers, in the run's precision.

LLM.int8() (Dettmers et al. 2022, arXiv 2208.07339), of which the weights' storage is kept: activations are not rounded;
NF4 with double quantisation (Dettmers et al. 2023, arXiv 2305.14314, section 3). See `rankwise.quantized`.
"""

from __future__ import annotations

import ctypes
import importlib.util
import platform
import sys
from typing import Any

import torch
from torch import nn
from transformers import BitsAndBytesConfig, PretrainedConfig, PreTrainedModel

from rankwise import quantized
from rankwise.errors import RequestError
from rankwise.models.config import ModelConfig

PACKAGE = "bitsandbytes"
KERNELS: dict[str, str] = {
    "gptq": "gptqmodel", "awq": "gptqmodel", "auto-round": "auto_round", "aqlm": "aqlm", "hqq": "hqq", "vptq": "vptq",
    "quanto": "optimum.quanto", "quark": "quark", "compressed-tensors": "compressed_tensors", "eetq": "kernels",
    "fp8": "kernels", "mxfp8": "kernels", "mxfp4": "kernels", "nvfp4": "kernels", "fbgemm_fp8": "fbgemm_gpu",
    "torchao": "torchao", "spqr": "spqr_quant", "higgs": "flute", "fp_quant": "fp_quant",
}  # fmt: skip
"""The package that has the kernels of each way of storing weights that others use."""


def stored_settings(own: PretrainedConfig) -> dict[str, Any]:
    """What a model's configuration says about how its weights are stored; nothing for plain numbers."""
    stored = own.to_dict().get("quantization_config")
    return dict(stored) if stored else {}


def needs_bitsandbytes(config: ModelConfig, own: PretrainedConfig) -> bool:
    """Whether the model will have layers in 8 or 4 bits: asked for, or stored like that.

    Raises: RequestError for a way of storing whose package is missing, and for one where another is asked for.
    """
    stored = stored_settings(own)
    method = str(stored.get("quant_method", ""))
    if not stored:
        if config.is_quantized:
            _check_installed(f"model.quantization={config.quantization}")
        return config.is_quantized
    if method != PACKAGE:
        _check_kernels(config, method)
        return False
    kind = "4bit" if stored.get("load_in_4bit") or stored.get("_load_in_4bit") else "8bit"
    if config.is_quantized:
        raise RequestError(
            f"model.quantization ({config.quantization}) has no effect: the weights of '{config.name}' are stored in "
            f"{kind} already; leave it out"
        )
    _check_installed(f"model '{config.name}', whose weights are stored in {kind},")
    return True


def _check_installed(what: str) -> None:
    if importlib.util.find_spec(PACKAGE) is None:
        raise RequestError(f"{what} needs the package {PACKAGE}; run `pip install 'rankwise[quantized]'`")


def _check_kernels(config: ModelConfig, method: str) -> None:
    if config.is_quantized:
        raise RequestError(
            f"model.quantization ({config.quantization}) can't be had from '{config.name}', whose weights are stored "
            f"as {method} already; name the original model instead"
        )
    package = KERNELS.get(method)
    if package is None or _missing(package):
        reason = f"whose kernels (package {package}) are not installed" if package else "which is not known here"
        raise RequestError(
            f"the weights of model '{config.name}' are stored as {method}, {reason}; name the original model, with "
            "model.quantization=4bit or 8bit where it should be small"
        )


def _missing(package: str) -> bool:
    try:
        return importlib.util.find_spec(package) is None
    except ModuleNotFoundError:  # the package around it is missing
        return True


def bits_settings(config: ModelConfig, dtype: torch.dtype, plain: list[str]) -> BitsAndBytesConfig:
    """Transformers' settings for what `model.quantization` asks for; `plain` names modules that stay as they are."""
    if config.quantization == "8bit":
        return BitsAndBytesConfig(load_in_8bit=True, llm_int8_skip_modules=plain or None)
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=config.four_bit_type,
        bnb_4bit_use_double_quant=config.is_double_quantized,
        bnb_4bit_compute_dtype=dtype,
        llm_int8_skip_modules=plain or None,
    )


def settle(model: PreTrainedModel, dtype: torch.dtype) -> None:
    """Makes a model that was just loaded compute in `dtype`, the same in training, in evaluation and in a batch.

    Its plain weights are cast; 8-bit layers leave activations alone, 4-bit ones keep their weights as they are stored.
    On a CPU plain weights are copied in any case: what is left of the file's mapping would keep all of it resident.
    """
    quantized.compute_by_weight(model)
    quantized.keep_unpacked(model)
    quantized.compute_in(model, dtype)
    kept = set(model._keep_in_fp32_modules_strict or ())
    kept |= set(model._keep_in_fp32_modules or ()) if dtype == torch.float16 else set()
    for name, parameter in model.named_parameters():  # shared ones once
        if type(parameter) is nn.Parameter and parameter.dtype.is_floating_point:  # bitsandbytes' own are in bits
            own = torch.float32 if kept.intersection(name.split(".")) else dtype
            parameter.data = parameter.data.to(own, copy=parameter.device.type == "cpu")
    model.config.dtype = dtype
    give_back_memory()


def give_back_memory() -> None:
    """Returns freed memory to the system, where the C library is glibc, which keeps what loading threads have freed.

    Of the demo's model in 4 bits (125 MiB) up to 290 MiB more stayed resident without it.
    """
    if sys.platform == "linux" and platform.libc_ver()[0] == "glibc":
        ctypes.CDLL("libc.so.6").malloc_trim(0)
