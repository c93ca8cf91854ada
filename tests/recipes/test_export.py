"""The frame of `rankwise export`, and `--to merged`."""

from __future__ import annotations

import json
import shutil
from collections import namedtuple
from pathlib import Path

import pytest
import torch
import transformers

import rankwise as rw
from rankwise.adapters.config import LoraConfig
from rankwise.adapters.gate_config import GateConfig
from rankwise.attach.checkpoint import save_adapter
from rankwise.attach.inject import adapter_parameters, attach
from rankwise.cli.main import main
from rankwise.errors import RequestError, WorkError
from rankwise.export import certificate as certificates
from rankwise.export.formats import SPARE_BYTES
from rankwise.recipes.export import export
from rankwise.recipes.export_job import num_parameters
from rankwise.recipes.target import find_adapter, find_target, open_target
from tests import tiny
from tests.attach.gate_cases import TASKS, disturbed, saved_adapters
from tests.recipes.trained import save_model, trained_run


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    return trained_run(tmp_path_factory.mktemp("export"))


def to_merged(run, out, **settings):
    return export(str(run), str(out), "merged", settings, device="cpu")


def adapter_folder(root: Path, model, **fields) -> Path:
    """A base in `root/model` and an adapter that changes something in `root/adapter`."""
    save_model(root / "model", model)
    loaded = transformers.AutoModel.from_pretrained if "auto" in fields else type(model).from_pretrained
    base = loaded(root / "model")
    attach(base, LoraConfig(**{"r": 3, "lora_alpha": 6, "task_type": "CAUSAL_LM", **fields}))
    with torch.no_grad():
        for parameter in adapter_parameters(base).values():
            parameter.add_(0.1 * torch.randn(parameter.shape))
    save_adapter(base, root / "adapter")
    return root / "adapter"


def test_the_document_the_report_and_the_folder(run, tmp_path):
    out = tmp_path / "deep" / "merged"
    document = to_merged(run, out)
    assert (document["output"], document["format"], document["probes"]) == (str(out), "merged", "valid.jsonl")
    [row] = document["report"]
    assert row["artifact"] == "model.safetensors" and row["ran"]
    assert row["speedup"] > 0 and "8 tokens behind 24, in turns with the adapter beside its base" in row["note"]
    assert row["kl"] <= row["bounds"]["kl"] == 1e-6 and row["max_abs_diff"] < 1e-4 and row["top1_agreement"] == 1.0
    assert row["bytes"] > 4 * num_parameters(find_adapter(str(run)))
    assert json.loads((out / "export_report.json").read_text()) == document
    names = {file.name for file in out.iterdir()}
    assert {"config.json", "model.safetensors", "tokenizer.json", "merge_certificate.json"} <= names
    model = transformers.AutoModelForCausalLM.from_pretrained(out)
    opened = open_target(find_target(str(run), device="cpu"), "fp32")
    with torch.no_grad():
        assert torch.allclose(model(tiny.token_ids()).logits, opened.model(tiny.token_ids()).logits, atol=1e-5)


def test_shards_and_dtype(run, tmp_path):
    document = to_merged(run, tmp_path / "m", dtype="bf16", max_shard_size="30KB")
    shards = sorted((tmp_path / "m").glob("model-*.safetensors"))
    assert len(shards) > 1 and document["report"][0]["artifact"] == f"{len(shards)} shards"
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "m", dtype="auto")
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    with pytest.raises(RequestError, match=r"--max-shard-size 'big' is no size; write a whole number and a unit"):
        to_merged(run, tmp_path / "n", max_shard_size="big")


@pytest.mark.parametrize("fields", [{"use_dora": True}, {"bias": "all"}, {"modules_to_save": ["lm_head"]}])
def test_kinds_of_adapters_are_folded(tmp_path, fields):
    adapter = adapter_folder(tmp_path, tiny.qwen(), **fields)
    assert to_merged(adapter, tmp_path / "m")["report"][0]["kl"] < 1e-6


def test_an_adapted_tied_embedding_is_untied(tmp_path):
    adapter = adapter_folder(tmp_path, tiny.llama(tied=True), target_modules=["embed_tokens", "v_proj"])
    to_merged(adapter, tmp_path / "m")
    assert json.loads((tmp_path / "m" / "config.json").read_text())["tie_word_embeddings"] is False


def test_a_quantised_base_is_dequantised_and_that_is_said(tmp_path):
    pytest.importorskip("bitsandbytes")
    from rankwise.recipes.finetune import train
    from tests.recipes.trained import run_document

    document = run_document(tmp_path, save_model(tmp_path / "model"), steps=2)
    document["model"]["quantization"] = "8bit"
    train(document, quiet=True)
    [row] = to_merged(tmp_path / "run", tmp_path / "m")["report"]
    assert "the base is stored in 8bit, the merged model is not" in row["note"] and row["kl"] < 1e-6


def test_past_the_bound_nothing_is_left(run, tmp_path, monkeypatch):
    monkeypatch.setitem(certificates.KL_BOUNDS, "bf16", 1e-12)
    with pytest.raises(WorkError, match=r"above the bound 1e-06"):
        to_merged(run, tmp_path / "in" / "m", dtype="bf16")
    assert list((tmp_path / "in").iterdir()) == []


def test_too_little_room_is_said_before_weights_are_loaded(run, tmp_path, monkeypatch):
    usage = namedtuple("usage", "total used free")
    num_bytes = 4 * num_parameters(find_adapter(str(run)))
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(10**9, 0, SPARE_BYTES + num_bytes - 1))
    with pytest.raises(WorkError, match=r"needs about 16 MB, and its disk has 16 MB free; free space or choose"):
        to_merged(run, tmp_path / "m")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(10**9, 0, SPARE_BYTES + num_bytes))
    to_merged(run, tmp_path / "m")


def test_what_a_kill_left_is_named(run, tmp_path, capsys):
    (tmp_path / ".m.abc.tmp").mkdir()
    to_merged(run, tmp_path / "m")
    assert ".m.abc.tmp' was left by an export that was killed" in capsys.readouterr().err


def test_bad_requests(run, tmp_path):
    (tmp_path / "there").mkdir()
    (tmp_path / "file").touch()
    with pytest.raises(RequestError, match=r"output folder .*there' exists; choose another"):
        to_merged(run, tmp_path / "there")
    with pytest.raises(RequestError, match=r"can't be made: '.*/file' is not a folder"):
        to_merged(run, tmp_path / "file" / "m")
    with pytest.raises(RequestError, match="is a model without an adapter"):
        to_merged(run.parent / "model", tmp_path / "m")
    with pytest.raises(RequestError, match="there is no run or adapter folder"):
        to_merged(tmp_path / "nothing", tmp_path / "m")
    assert not (tmp_path / "m").exists()


def test_a_gate_is_folded_first(tmp_path):
    """What comes out is the model with the chosen task's adapter; without one a hard gate has nothing to export."""
    base = save_model(tmp_path / "model", tiny.llama())
    model = disturbed(rw.attach_gate(tiny.llama(), saved_adapters(tmp_path / "adapters"), GateConfig()), 7)
    rw.save_adapter(model, tmp_path / "gate")
    out, gate = tmp_path / "m", str(tmp_path / "gate")
    export(gate, str(out), "merged", {}, base=base, device="cpu", task=TASKS[1])
    again = transformers.AutoModelForCausalLM.from_pretrained(out)
    with torch.no_grad(), rw.on_task(model, TASKS[1]):
        assert torch.allclose(again(tiny.token_ids()).logits, model(tiny.token_ids()).logits, atol=1e-4)
    with pytest.raises(RequestError, match="hard gate"):
        export(gate, str(tmp_path / "n"), "merged", {}, base=base, device="cpu")
    with pytest.raises(RequestError, match="has no task 'x'"):
        export(gate, str(tmp_path / "n"), "merged", {}, base=base, device="cpu", task="x")
    assert not (tmp_path / "n").exists()


def test_a_learned_mixture_is_exported_as_it_answers(tmp_path):
    base = save_model(tmp_path / "model", tiny.llama())
    gate = GateConfig("soft", per="layer")
    model = disturbed(rw.attach_gate(tiny.llama(), saved_adapters(tmp_path / "adapters"), gate), 7)
    rw.save_adapter(model, tmp_path / "gate")
    export(str(tmp_path / "gate"), str(tmp_path / "m"), "merged", {}, base=base, device="cpu")
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "m")
    with torch.no_grad():
        unmerged = model(tiny.token_ids()).logits
        assert torch.allclose(again(tiny.token_ids()).logits, unmerged, atol=1e-4)
        with rw.on_task(model, dict.fromkeys(TASKS, 1 / len(TASKS))):
            assert not torch.allclose(model(tiny.token_ids()).logits, unmerged, atol=1e-3), "equal shares are others"


def test_a_torn_adapter_leaves_nothing(tmp_path):
    adapter = adapter_folder(tmp_path, tiny.llama())
    weights = adapter / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(RequestError, match=r"adapter_model\.safetensors"):
        to_merged(adapter, tmp_path / "in" / "m")
    assert not (tmp_path / "in").exists() or list((tmp_path / "in").iterdir()) == []


def test_the_command(run, tmp_path, capsys):
    line = ["export", str(run), "--to", "merged", "--device", "cpu", "--out"]
    assert main([*line, str(tmp_path / "a"), "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert {"output", "format", "settings", "probes", "report"} == set(document)
    assert main([*line, str(tmp_path / "b")]) == 0
    text = capsys.readouterr().out
    assert "model.safetensors" in text and "compared with torch on valid.jsonl" in text and "yes" in text
    assert main([*line, str(tmp_path / "b"), "--json"]) == 2
    assert "exists" in json.loads(capsys.readouterr().out)["error"]["message"]
