"""Bases in 8 and 4 bits: loaded from folders, one base whatever the precision, the same function in every mode."""

from __future__ import annotations

import copy
import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from rankwise import quantized
from rankwise.adapters.config import LoraConfig
from rankwise.attach.inject import adapter_parameters, attach
from rankwise.errors import RequestError
from rankwise.models.attention import packing_mode
from rankwise.models.config import ModelConfig
from rankwise.models.load import load_model
from rankwise.models.loss import token_losses
from tests import bits, tiny
from tests.models.batches import packed, padded, rows_of

FORMS = {"8bit": {"quantization": "8bit"}, "nf4": {"quantization": "4bit"},
         "fp4": {"quantization": "4bit", "quantization_type": "fp4"},
         "nf4-single": {"quantization": "4bit", "double_quantization": False}}  # fmt: skip
ROWS = rows_of((9, 5, 12))
forms = pytest.mark.parametrize("form", FORMS)
dtypes = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])


def folder_of(tmp_path: Path, model=None, dtype: torch.dtype = torch.float32) -> str:
    model = tiny.llama(hidden_size=64, intermediate_size=96, initializer_range=0.1) if model is None else model
    model.to(dtype).save_pretrained(tmp_path / "base")
    return str(tmp_path / "base")


def load(folder: str, form: str, dtype: torch.dtype = torch.float32, task: str = "causal-lm"):
    return load_model(ModelConfig(folder, device="cpu", **FORMS[form]), dtype, task)  # type: ignore[arg-type]


def stored_layers(model: nn.Module) -> dict[str, nn.Module]:
    return {name: module for name, module in model.named_modules() if quantized.is_quantized(module)}


def logits(model: nn.Module, ids: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return model(ids).logits


@forms
@dtypes
def test_layers_are_stored_in_bits_and_the_rest_has_the_precision(tmp_path, form, dtype):
    model = load(folder_of(tmp_path), form, dtype)
    layers = stored_layers(model)
    assert len(layers) == 14 and {quantized.storage_of(one) for one in layers.values()} == {
        form.removesuffix("-single")
    }
    assert not any("lm_head" in name or "embed" in name for name in layers)
    plain = [p for p in model.parameters() if p.dtype.is_floating_point]
    assert {p.dtype for p in plain} == {dtype} and model.dtype == model.config.dtype == dtype
    assert not model.training
    if form != "8bit":
        nested = next(iter(layers.values())).weight.quant_state.nested
        assert nested == (form != "nf4-single")


@forms
@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16])
def test_one_base_whatever_the_precision(tmp_path, form, stored):
    folder = folder_of(tmp_path, dtype=stored)
    wide, narrow = stored_layers(load(folder, form)), stored_layers(load(folder, form, torch.bfloat16))
    for name, one in wide.items():
        assert torch.equal(quantized.dense_weight(one), quantized.dense_weight(narrow[name])), name


@forms
def test_quantisation_is_that_of_bitsandbytes(tmp_path, form):
    model = load(folder_of(tmp_path), form)
    storage = form.removesuffix("-single")
    wide = {"hidden_size": 64, "intermediate_size": 96, "initializer_range": 0.1}
    theirs = stored_layers(bits.quantise(tiny.llama(**wide), storage, double=form != "nf4-single"))
    for name, one in stored_layers(model).items():
        assert torch.equal(quantized.dense_weight(one), quantized.dense_weight(theirs[name]))


@forms
@dtypes
def test_the_same_function_in_training_and_in_evaluation_and_beside_others(tmp_path, form, dtype):
    model = load(folder_of(tmp_path), form, dtype)
    ids = tiny.token_ids(rows=3)
    wanted = logits(model, ids)
    assert torch.equal(logits(model.train(), ids), wanted)
    assert torch.equal(logits(model.eval(), ids), wanted)
    bound = 1e-5 if dtype == torch.float32 else 0.05
    assert torch.allclose(logits(model, ids[:1]), wanted[:1], atol=bound)


@forms
def test_it_computes_what_its_dequantised_layers_compute(tmp_path, form):
    model = load(folder_of(tmp_path), form)
    dense = copy.deepcopy(model)
    for name, module in stored_layers(dense).items():
        dense.set_submodule(name, quantized.plain_layer(module, quantized.dense_weight(module)))
    assert torch.allclose(logits(model, tiny.token_ids()), logits(dense, tiny.token_ids()), atol=1e-5)


@forms
def test_evaluation_changes_no_gradient(tmp_path, form):
    model = attach(load(folder_of(tmp_path), form, torch.bfloat16), LoraConfig(r=2, target_modules=["q_proj"]))

    def gradients() -> list[torch.Tensor]:
        model.train().zero_grad()
        token_losses(model, padded(ROWS)).mean().backward()
        return [p.grad.clone() for p in adapter_parameters(model).values()]

    before = gradients()
    logits(model.eval(), tiny.token_ids())
    assert all(torch.equal(a, b) for a, b in zip(before, gradients(), strict=True))


@forms
def test_packed_rows_are_apart(tmp_path, form):
    model = load(folder_of(tmp_path), form)
    assert packing_mode(model) == "segments"
    assert torch.allclose(token_losses(model, packed(ROWS)), token_losses(model, padded(ROWS)), atol=1e-4)


@forms
def test_heads_of_a_task_stay_plain(tmp_path, form):
    folder = folder_of(tmp_path, tiny.bert())
    model = load(folder, form, task="sequence-classification")
    assert type(model.classifier) is nn.Linear and stored_layers(model)
    attach(model, LoraConfig(r=2, target_modules=["query"], task_type="SEQ_CLS"))


@forms
def test_gpt2_and_t5(tmp_path, form):
    assert len(stored_layers(load(folder_of(tmp_path / "a", tiny.gpt2()), form))) == 8
    assert stored_layers(load(folder_of(tmp_path / "b", tiny.t5()), form, task="seq2seq-lm"))


@forms
def test_a_folder_that_is_stored_in_bits_loads_as_it_is(tmp_path, form):
    whole = load(folder_of(tmp_path), form, torch.bfloat16)
    wanted = logits(whole, tiny.token_ids())
    whole.save_pretrained(tmp_path / "stored")
    again = load_model(ModelConfig(str(tmp_path / "stored"), device="cpu"), torch.bfloat16)
    assert stored_layers(again).keys() == stored_layers(whole).keys()
    assert torch.equal(logits(again, tiny.token_ids()), wanted)
    assert torch.equal(logits(again.train(), tiny.token_ids()), wanted)
    with pytest.raises(RequestError, match=r"model.quantization \(.bit\) has no effect: .* are stored in .bit already"):
        load(str(tmp_path / "stored"), form)


def test_nothing_is_printed(tmp_path):
    folder = folder_of(tmp_path)
    code = (
        "import torch; from rankwise.models.config import ModelConfig; from rankwise.models.load import load_model\n"
        f"model = load_model(ModelConfig({folder!r}, device='cpu', quantization='4bit'), torch.bfloat16)\n"
        "model(torch.ones(1, 3, dtype=torch.long))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert (done.stdout, done.stderr) == ("", "")


# --- refused -------------------------------------------------------------------------------------------------------


def test_settings_without_effect():
    with pytest.raises(RequestError, match=r"model.quantization can't be 'int8'"):
        ModelConfig(quantization="int8")
    with pytest.raises(RequestError, match=r"model.quantization_type can't be 'nf5'; did you mean 'nf4'"):
        ModelConfig(quantization="4bit", quantization_type="nf5")
    with pytest.raises(
        RequestError, match=r"model.quantization_type \(nf4\) has no effect with .*: 8bit; leave it out"
    ):
        ModelConfig(quantization="8bit", quantization_type="nf4")
    with pytest.raises(RequestError, match=r"model.double_quantization \(False\) has no effect with .*: none"):
        ModelConfig(double_quantization=False)


def stored_as(tmp_path: Path, method: str) -> str:
    folder = folder_of(tmp_path)
    path = Path(folder) / "config.json"
    settings = {"quant_method": method, "bits": 4, "group_size": 128, "sym": True, "desc_act": False}
    path.write_text(json.dumps(json.loads(path.read_text()) | {"quantization_config": settings}))
    return folder


@pytest.mark.parametrize(("method", "package"), [("gptq", "gptqmodel"), ("awq", "gptqmodel"), ("fp8", "kernels")])
def test_folders_stored_for_kernels_that_are_missing(tmp_path, method, package):
    folder = stored_as(tmp_path, method)
    if importlib.util.find_spec(package) is not None:
        pytest.skip(f"{package} is installed")
    message = (
        rf"the weights of model '.*' are stored as {method}, whose kernels \(package {package}\) are not installed; "
    )
    with pytest.raises(RequestError, match=message + "name the original model, with model.quantization=4bit or 8bit"):
        load_model(ModelConfig(folder, device="cpu"), torch.float32)
    with pytest.raises(RequestError, match=rf"\(4bit\) can't be had from '.*', whose weights are stored as {method}"):
        load(folder, "nf4")


def test_folders_stored_in_a_way_that_nobody_knows(tmp_path):
    with pytest.raises(RequestError, match="stored as sometime, which is not known here; name the original model"):
        load_model(ModelConfig(stored_as(tmp_path, "sometime"), device="cpu"), torch.float32)


def test_without_bitsandbytes(tmp_path, monkeypatch):
    folder = folder_of(tmp_path)
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "bitsandbytes" else find(name))
    with pytest.raises(RequestError, match=r"model.quantization=8bit needs the package bitsandbytes; run `pip install"):
        load(folder, "8bit")
    load_model(ModelConfig(folder, device="cpu"), torch.float32)
