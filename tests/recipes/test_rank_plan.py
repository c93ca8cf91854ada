"""Runs whose ranks are chosen before training: what is trained, saved as plain PEFT, and gone on with."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM

from rankwise.attach.checkpoint import load_adapter
from rankwise.attach.inject import ranks
from rankwise.errors import RequestError
from rankwise.recipes.finetune import train
from rankwise.recipes.run import read_run
from rankwise.train.interrupt import Interrupted
from tests import tiny
from tests.recipes.runs import adapter_bytes, interrupting, metrics, settings, unmeasured

PLAN = {r"layers\.0\.mlp\..*": 0, "q_proj": 7, "(k|v)_proj": 2}
SHORT = {"steps": 4, "evaluate_every": 4, "save_every": 2, "samples": 0, "sample_tokens": None}


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(tiny.token_ids(seed=9)).logits


@pytest.mark.parametrize("policy", [{"plan": PLAN}, {"budget": "40 kB", "depth": "up"}], ids=["plan", "budget"])
@pytest.mark.parametrize("adapter", [{}, {"use_rslora": True, "use_dora": True}], ids=["lora", "dora"])
def test_the_result_is_plain_peft(files: Path, tmp_path: Path, policy: dict[str, Any], adapter: dict[str, Any]) -> None:
    run = settings(files, tmp_path / "out", train=SHORT, adapter=adapter, ranks={"policy": "layered", **policy})
    summary = train(run, quiet=True)
    base = lambda: AutoModelForCausalLM.from_pretrained(files / "model", dtype=torch.float32)  # noqa: E731
    ours = load_adapter(base(), tmp_path / "out" / "adapter")
    theirs = peft.PeftModel.from_pretrained(base(), tmp_path / "out" / "adapter").eval()
    assert len(set(ranks(ours).values())) > 1
    assert (logits(ours) - logits(theirs)).abs().max() < 1e-5
    if "budget" in policy:
        assert (tmp_path / "out" / "adapter" / "adapter_model.safetensors").stat().st_size <= 40_000
    else:
        assert not any("layers.0.mlp" in name for name in ranks(ours))
    assert summary["trainable_parameters"] == sum(p.numel() for n, p in theirs.named_parameters() if "lora_" in n)


def test_going_on_ends_in_the_same_bytes(files: Path, tmp_path: Path) -> None:
    planned = {"policy": "layered", "plan": PLAN, "budget": 4000}
    straight = settings(files, tmp_path / "straight", ranks=planned, train=SHORT)
    train(straight, quiet=True)
    stopped = settings(files, tmp_path / "stopped", ranks=planned, train=SHORT)
    with pytest.raises(Interrupted):
        train(stopped, on_step=interrupting(3), quiet=True)
    train(tmp_path / "stopped" / "run.yaml", resume=True, quiet=True)
    assert adapter_bytes(tmp_path / "stopped") == adapter_bytes(tmp_path / "straight")
    assert unmeasured(metrics(tmp_path / "stopped")) == unmeasured(metrics(tmp_path / "straight"))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"ranks": {"policy": "layered", "plan": {"query": 4}}}, r"ranks\.plan\['query'\] fits no adapted layer"),
        ({"ranks": {"policy": "layered", "budget": 10}}, r"ranks\.budget \(10\) is below"),
        (
            {"ranks": {"policy": "layered", "depth": "up"}, "adapter": {"rank_pattern": {"q_proj": 2}}},
            r"adapter\.rank_pattern has no effect with ranks\.policy: layered",
        ),
    ],
)
def test_refused_before_anything_is_written(files: Path, tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(RequestError, match=message):
        train(settings(files, tmp_path / "out", train=SHORT, **changes), quiet=True)
    assert list(tmp_path.iterdir()) == []


def test_an_adapter_that_exists_has_its_ranks(files: Path, tmp_path: Path) -> None:
    train(settings(files, tmp_path / "out", train=SHORT), quiet=True)
    run = settings(files, tmp_path / "on", train=SHORT, ranks={"policy": "layered", "depth": "up"})
    with pytest.raises(RequestError, match=r"ranks\.policy: layered has no effect with adapter\.from"):
        train({**run, "adapter": {"from": str(tmp_path / "out" / "adapter")}}, quiet=True)


def same_as_peft(files: Path, output: Path) -> None:
    base = lambda: AutoModelForCausalLM.from_pretrained(files / "model", dtype=torch.float32)  # noqa: E731
    ours = load_adapter(base(), output / "adapter")
    theirs = peft.PeftModel.from_pretrained(base(), output / "adapter").eval()
    assert (logits(ours) - logits(theirs)).abs().max() < 1e-5


# --- from data -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("measure", ["gradient", "activation"])
def test_spectrum_shares_out_a_budget_and_repeats_exactly(files: Path, tmp_path: Path, measure: str) -> None:
    wanted = {"policy": "spectrum", "budget": 6000, "measure": measure, "batches": 1}
    adapter = {"init_lora_weights": {"gradient": "lora_ga", "activation": "eva"}.get(measure, True)}
    summary = train(settings(files, tmp_path / "a", ranks=wanted, train=SHORT, adapter=adapter), quiet=True)
    plan = yaml.safe_load((tmp_path / "a" / "run.yaml").read_text())["ranks"]["plan"]
    assert (
        6000 - 80 < summary["trainable_parameters"] <= 6000 and len(set(plan.values())) > 1 and min(plan.values()) >= 1
    )
    same_as_peft(files, tmp_path / "a")
    if measure == "activation":
        return
    train(read_run(tmp_path / "a" / "run.yaml", [f"output={tmp_path / 'b'}"]), quiet=True)
    assert adapter_bytes(tmp_path / "a") == adapter_bytes(tmp_path / "b")
    with pytest.raises(Interrupted):
        stopped = settings(files, tmp_path / "c", ranks=wanted, train=SHORT, adapter=adapter)
        train(stopped, on_step=interrupting(3), quiet=True)
    train(stopped, resume=True, quiet=True)
    assert adapter_bytes(tmp_path / "a") == adapter_bytes(tmp_path / "c")


def test_what_is_measured_is_said(files: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    train(settings(files, tmp_path / "a", ranks={"policy": "spectrum", "budget": "30 kB"}, train=SHORT))
    said = capsys.readouterr().err
    assert "measured on 16 rows in" in said and "of 30,000 bytes of weights" in said
