"""Runs on a base in 8 and 4 bits, from the run file to a merged folder."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
import yaml

from rankwise import quantized
from rankwise.errors import RequestError
from rankwise.recipes.evaluate import EvaluateConfig, evaluate
from rankwise.recipes.finetune import train
from rankwise.recipes.generate import open_session
from rankwise.recipes.inspect import inspect_adapter
from rankwise.recipes.merge import merge
from rankwise.recipes.target import find_target, open_target
from rankwise.train.interrupt import Interrupted
from tests import bits, tiny
from tests.recipes.runs import adapter_bytes, interrupting, metrics, settings, unmeasured
from tests.recipes.trained import figures, run_document, save_model

BITS = {"8bit": "8bit", "4bit": "nf4"}
assert bits.bitsandbytes  # or the whole file is skipped
every = pytest.mark.parametrize("kind", BITS)


def in_bits(files: Path, output: Path, kind: str, **sections: dict[str, Any]) -> dict[str, Any]:
    return settings(files, output, **{**sections, "model": {"quantization": kind, **sections.get("model", {})}})


@pytest.fixture(scope="module", params=BITS)
def run(request, tmp_path_factory) -> Path:
    """A finished run; its base is `model` beside it, stored in bf16."""
    root = tmp_path_factory.mktemp(request.param)
    document = run_document(root, save_model(root / "model", tiny.llama(initializer_range=0.2).bfloat16()))
    document["model"]["quantization"] = request.param
    train(document, quiet=True)
    return root / "run"


@every
def test_going_on_gives_the_bytes_of_the_straight_run(files: Path, tmp_path: Path, kind: str) -> None:
    straight, stopped = tmp_path / "straight", tmp_path / "stopped"
    train(in_bits(files, straight, kind, train={"precision": "bf16"}), quiet=True)
    run = in_bits(files, stopped, kind, train={"precision": "bf16"})
    with pytest.raises(Interrupted):
        train(run, on_step=interrupting(7), quiet=True)
    assert train(run, resume=True, quiet=True)["resumed_from"] == 7
    assert adapter_bytes(stopped) == adapter_bytes(straight)
    assert unmeasured(metrics(stopped)) == unmeasured(metrics(straight))
    evaluations = [line["valid_loss"] for line in metrics(straight) if "valid_loss" in line]
    assert evaluations[-1] < evaluations[0]


@every
def test_evaluation_changes_no_training_result(files: Path, tmp_path: Path, kind: str) -> None:
    train(in_bits(files, tmp_path / "with", kind), quiet=True)
    never = in_bits(files, tmp_path / "without", kind, train={"evaluate_every": None, "samples": None})
    del never["data"]["valid"], never["train"]["evaluate_every"], never["train"]["sample_tokens"]
    train(never, quiet=True)
    assert adapter_bytes(tmp_path / "with") == adapter_bytes(tmp_path / "without")


@every
def test_micro_batches_are_one_batch(files: Path, tmp_path: Path, kind: str) -> None:
    losses = {}
    for rows_at_once in (1, 8):
        output = tmp_path / str(rows_at_once)
        run = in_bits(files, output, kind, adapter={"lora_dropout": 0.0}, train={"micro_batch_size": rows_at_once})
        train(run, quiet=True)
        losses[rows_at_once] = [line["loss"] for line in metrics(output)]
    assert losses[1] == pytest.approx(losses[8], rel=1e-4)


def test_where_it_comes_from_and_what_was_said(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    storage = BITS[run.parent.name.removesuffix("0")]
    record = json.loads((run / "provenance.json").read_text())
    assert record["base"]["stored_in"] == storage and "bitsandbytes" in record["versions"]
    assert yaml.safe_load((run / "run.yaml").read_text())["model"]["quantization"] == run.parent.name.removesuffix("0")
    document = yaml.safe_load((run / "run.yaml").read_text()) | {"output": str(run.parent / "said")}
    train(document | {"train": document["train"] | {"steps": 1}})
    assert f"its layers are stored in {storage}" in capsys.readouterr().err


def test_a_run_folder_has_its_base(run: Path) -> None:
    opened = open_target(find_target(str(run), device="cpu"), "fp32")
    assert quantized.storage_in(opened.model) == BITS[run.parent.name.removesuffix("0")]
    both = EvaluateConfig(data=str(run.parent / "valid.jsonl"), precision="fp32", max_new_tokens=5)
    base, adapter = evaluate(str(run), both, device="cpu")["results"]
    assert adapter["loss"] < base["loss"] - 0.1
    inside = evaluate(str(run / "adapter"), both, device="cpu")["results"]
    assert [figures(row) for row in inside] == [figures(row) for row in (base, adapter)]


def test_it_answers_and_is_inspected(run: Path) -> None:
    session = open_session(str(run), device="cpu", precision="bf16")
    assert quantized.storage_in(session.opened.model) == BITS[run.parent.name.removesuffix("0")]
    assert len(session.answer_all(["Capitals: oak elm"], None, 8, 1)) == 1
    found = inspect_adapter(str(run))
    assert found["base"] == str(run.parent / "model") and set(found["ranks"].values()) == {4}


@pytest.mark.parametrize("dtype", ["fp32", "bf16", None])
def test_merged_is_a_plain_folder_that_answers_the_same(run: Path, tmp_path: Path, dtype: str | None) -> None:
    out = tmp_path / "merged"
    stated = merge(str(run), str(out), dtype=dtype, device="cpu")["certificate"]
    assert stated["dequantised_from"] == BITS[run.parent.name.removesuffix("0")]
    assert stated["dtype"] == (dtype or "bf16") and stated["verdict"] == "pass"
    if dtype == "fp32":
        assert stated["kl"] <= stated["bound"] == 1e-6 and stated["adapter_effect_kl"] > 0.1
    config = json.loads((out / "config.json").read_text())
    assert "quantization_config" not in config and config["dtype"] == {"fp32": "float32"}.get(str(dtype), "bfloat16")
    model = transformers.AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32)
    opened = open_target(find_target(str(run), device="cpu"), "fp32")
    with torch.no_grad():
        wanted, found = opened.model(tiny.token_ids()).logits, model(tiny.token_ids()).logits
    assert torch.allclose(found, wanted, atol=1e-4 if dtype == "fp32" else 0.3)


@every
def test_a_checkpoints_adapter_has_the_base_of_its_run(files: Path, tmp_path: Path, kind: str) -> None:
    with pytest.raises(Interrupted):
        train(in_bits(files, tmp_path / "out", kind), on_step=interrupting(3), quiet=True)
    target = find_target(str(tmp_path / "out" / "checkpoints" / "step-3" / "adapter"), device="cpu")
    assert (target.kind, target.model.quantization) == ("adapter", kind) and target.data is not None
    assert quantized.storage_in(open_target(target).model) == BITS[kind]


@every
def test_going_on_with_another_storage_is_refused(files: Path, tmp_path: Path, kind: str) -> None:
    run = in_bits(files, tmp_path / "out", kind)
    with pytest.raises(Interrupted):
        train(run, on_step=interrupting(3), quiet=True)
    other = in_bits(files, tmp_path / "out", "none")
    with pytest.raises(RequestError, match=rf"model.quantization was '{kind}' when the run began and is now 'none'"):
        train(other, resume=True, quiet=True)


@every
@pytest.mark.parametrize("adapter", [{"use_dora": True}, {"init_lora_weights": "pissa"}], ids=["dora", "pissa"])
def test_other_adapters_and_checkpointing(files: Path, tmp_path: Path, kind: str, adapter: dict[str, Any]) -> None:
    run = in_bits(files, tmp_path / "out", kind, adapter=adapter, train={"gradient_checkpointing": True, "steps": 6})
    summary = train(run, quiet=True)
    lines = metrics(tmp_path / "out")
    assert summary["steps"] == 6 and lines[-1]["loss"] < lines[0]["loss"]


@every
def test_an_adapter_goes_on_on_a_base_in_bits(files: Path, straight: Path, tmp_path: Path, kind: str) -> None:
    run = in_bits(files, tmp_path / "out", kind, train={"steps": 2})
    train(run | {"adapter": {"from": str(straight / "adapter")}}, quiet=True)


def test_a_whole_module_in_bits_is_refused_with_the_setting(files: Path, tmp_path: Path) -> None:
    run = in_bits(files, tmp_path / "out", "8bit", adapter={"modules_to_save": ["mlp"]})
    with pytest.raises(RequestError, match=r"modules_to_save names 'model.layers.0.mlp', .* is stored in 8bit"):
        train(run, quiet=True)
    assert not (tmp_path / "out").exists()
