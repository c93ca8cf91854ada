from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import transformers

from rankwise.errors import RequestError, WorkError
from rankwise.export import certificate as certificates
from rankwise.recipes.evaluate import EvaluateConfig, evaluate
from rankwise.recipes.merge import BUILT_IN, merge
from rankwise.recipes.target import find_target, open_target
from tests import tiny
from tests.recipes.trained import figures, trained_run


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    return trained_run(tmp_path_factory.mktemp("merge"))


def test_a_file_in_the_way_is_said_before_anything_is_read(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(RequestError, match=r"can't be made: '.*/file' is not a folder; choose another"):
        merge("never looked at", str(tmp_path / "file" / "merged"))


def test_the_document_and_the_folder(run, tmp_path):
    out = tmp_path / "merged"
    result = merge(str(run), str(out), device="cpu")
    assert result["output"] == str(out) and result["error"] == 0.0
    stated = result["certificate"]
    assert stated["dtype"] == "fp32", "the base's own"
    assert stated["kl"] <= stated["bound"] == 1e-6 and stated["max_abs_diff"] < 1e-4
    assert 0 <= stated["mean_abs_diff"] <= stated["max_abs_diff"]
    assert (stated["verdict"], stated["probes"]) == ("pass", "valid.jsonl")
    assert stated["num_probe_tokens"] > 50 and stated["adapter_effect_kl"] > 0.1
    assert json.loads((out / "merge_certificate.json").read_text()) == {**stated, "error": 0.0}
    names = {file.name for file in out.iterdir()}
    assert {"config.json", "model.safetensors", "tokenizer.json", "generation_config.json"} <= names
    assert "adapter_config.json" not in names


def test_the_folder_answers_as_the_adapter_does(run, tmp_path):
    out = tmp_path / "merged"
    merge(str(run / "adapter"), str(out), device="cpu")
    model = transformers.AutoModelForCausalLM.from_pretrained(out)
    opened = open_target(find_target(str(run), device="cpu"), "fp32")
    ids = tiny.token_ids()
    with torch.no_grad():
        assert torch.allclose(model(ids).logits, opened.model(ids).logits, atol=1e-5)
    settings = EvaluateConfig(data=str(run.parent / "valid.jsonl"), precision="fp32", max_new_tokens=5)
    of_folder = evaluate(str(out), settings, device="cpu")["results"][0]
    of_adapter = evaluate(str(run), settings, device="cpu")["results"][1]
    assert figures(of_folder) == pytest.approx(figures(of_adapter), rel=1e-4)


@pytest.mark.parametrize(
    "dtype, torch_dtype", [("bf16", torch.bfloat16), ("fp16", torch.float16), ("fp32", torch.float32)]
)
def test_dtypes(run, tmp_path, dtype, torch_dtype):
    result = merge(str(run), str(tmp_path / "m"), dtype=dtype, device="cpu")
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "m", dtype="auto")
    assert {parameter.dtype for parameter in model.parameters()} == {torch_dtype} and model.config.dtype == torch_dtype
    assert result["certificate"]["dtype"] == dtype
    low, high = {"fp32": (0.0, 0.0), "fp16": (1e-5, 5e-4), "bf16": (1e-4, 4e-3)}[dtype]
    assert low <= result["error"] <= high
    assert result["update_error"] >= result["error"]


def test_the_bases_own_dtype_is_the_default(tmp_path):
    run = trained_run(tmp_path, tiny.llama().bfloat16())
    assert merge(str(run), str(tmp_path / "m"), device="cpu")["certificate"]["dtype"] == "bf16"


def test_past_the_bound_nothing_is_left(run, tmp_path, monkeypatch):
    monkeypatch.setitem(certificates.KL_BOUNDS, "bf16", 1e-12)
    out = tmp_path / "deep" / "merged"
    with pytest.raises(WorkError, match=r"above the bound 1e-06 .*its folder was removed; merge with --dtype fp32"):
        merge(str(run), str(out), dtype="bf16", device="cpu")
    assert list(out.parent.iterdir()) == []


def test_an_adapter_alone_is_probed_with_built_in_texts(run, tmp_path):
    adapter = tmp_path / "mine"
    adapter.mkdir()
    for file in (run / "adapter").iterdir():
        (adapter / file.name).write_bytes(file.read_bytes())
    stated = merge(str(adapter), str(tmp_path / "m"), device="cpu")["certificate"]
    assert (stated["probes"], stated["num_probe_tokens"]) == (BUILT_IN, 512)


def test_a_run_whose_data_is_gone_is_probed_with_built_in_texts(tmp_path):
    run = trained_run(tmp_path)
    (tmp_path / "valid.jsonl").unlink()
    assert merge(str(run), str(tmp_path / "m"), device="cpu")["certificate"]["probes"] == "train.jsonl"
    (tmp_path / "train.jsonl").unlink()
    assert merge(str(run), str(tmp_path / "n"), device="cpu")["certificate"]["probes"] == BUILT_IN


def test_bad_requests(run, tmp_path):
    (tmp_path / "there").mkdir()
    with pytest.raises(RequestError, match=r"output folder .*there' exists; choose another"):
        merge(str(run), str(tmp_path / "there"))
    with pytest.raises(RequestError, match="unknown dtype 'bf61'; did you mean 'bf16'"):
        merge(str(run), str(tmp_path / "m"), dtype="bf61")
    with pytest.raises(RequestError, match="is a model without an adapter"):
        merge(str(run.parent / "model"), str(tmp_path / "m"))
    assert not (tmp_path / "m").exists()
