"""Tiny models in 8 and 4 bits, loaded through transformers as users do; skipped where bitsandbytes is missing."""

from __future__ import annotations

import tempfile
from typing import Any

import pytest
import torch
from transformers import BitsAndBytesConfig, PreTrainedModel

from tests import tiny

bitsandbytes = pytest.importorskip("bitsandbytes", reason="needs bitsandbytes: pip install 'rankwise[quantized]'")

STORAGES = ("8bit", "nf4", "fp4")


def settings(
    storage: str, compute: torch.dtype = torch.float32, double: bool = True, plain: list[str] | None = None
) -> BitsAndBytesConfig:
    if storage == "8bit":
        return BitsAndBytesConfig(load_in_8bit=True, llm_int8_skip_modules=plain)
    return BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type=storage, bnb_4bit_use_double_quant=double,
        bnb_4bit_compute_dtype=compute, llm_int8_skip_modules=plain,
    )  # fmt: skip


def quantise(
    model: PreTrainedModel, storage: str, dtype: torch.dtype = torch.float32, double: bool = True,
    plain: list[str] | None = None,
) -> PreTrainedModel:  # fmt: skip
    """The model as transformers loads it with bitsandbytes, on the CPU, in evaluation mode; `plain` stays as it is."""
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        loaded: Any = type(model).from_pretrained(
            folder, quantization_config=settings(storage, dtype, double, plain), device_map={"": "cpu"}, dtype=dtype
        )
    return loaded.eval()


def llama(storage: str, dtype: torch.dtype = torch.float32, **more: Any) -> PreTrainedModel:
    """Wide enough for the layout that bitsandbytes packs for CPUs: 64 inputs, 32 outputs and multiples of them."""
    wide = {"hidden_size": 64, "intermediate_size": 128, "initializer_range": 0.1, **more}
    return quantise(tiny.llama(**wide), storage, dtype)


def packs_for_cpu() -> bool:
    """Whether bitsandbytes repacks 4-bit weights on this machine."""
    return bool(bitsandbytes.functional.has_avx512bf16())


def gpt2(storage: str) -> PreTrainedModel:
    return quantise(tiny.gpt2(), storage)


def bert_classifier(storage: str) -> PreTrainedModel:
    return quantise(tiny.bert_classifier(), storage, plain=["classifier"])


def t5(storage: str) -> PreTrainedModel:
    return quantise(tiny.t5(), storage)
