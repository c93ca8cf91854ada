"""Preferences from a run file: it learns them, and after `adapter.from` the start is the reference."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

from rankwise.errors import RequestError
from rankwise.recipes.evaluate import EvaluateConfig, evaluate
from rankwise.recipes.finetune import train
from rankwise.train.interrupt import Interrupted
from tests.recipes.runs import adapter_bytes, interrupting, metrics, settings, unmeasured
from tests.train.objective_cases import CASES


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("dpo")
    CASES["dpo"].save_model(folder / "model")
    CASES["dpo"].write_rows(folder / "train.jsonl", 12)
    CASES["dpo"].write_rows(folder / "valid.jsonl", 4, seed=1)
    return folder


def dpo(files: Path, output: Path, **own: Any) -> dict[str, Any]:
    plain = {
        "objective": "dpo", "steps": 20, "batch_size": 6, "max_grad_norm": 1.0, "evaluate_every": 10, "lr": 1e-2,
        "samples": 0, "sample_tokens": None,
    }  # fmt: skip
    return settings(files, output, adapter={"lora_dropout": 0.0}, train={**plain, **own})


@pytest.fixture(scope="module")
def first(files: Path) -> Path:
    train(dpo(files, files / "first"), quiet=True)
    return files / "first"


def test_it_learns_what_is_preferred(first: Path) -> None:
    lines = metrics(first)
    assert lines[0]["loss"] == pytest.approx(math.log(2), rel=1e-6) and lines[0]["reward_margin"] == 0
    assert lines[-1]["loss"] < 0.6 and lines[-1]["reward_accuracy"] == 1.0 and lines[-1]["reward_margin"] > 0.2
    last = lines[-1]
    assert last["reward_margin"] == pytest.approx(last["reward_chosen"] - last["reward_rejected"], abs=1e-6)
    assert last["valid_loss"] < math.log(2) and last["valid_reward_accuracy"] > 0.5


def test_going_on_from_an_adapter_begins_at_log_2_and_resumes_exactly(files: Path, first: Path, tmp_path: Path) -> None:
    """Against the base the margins would be large from the first step on."""
    run = dpo(files, tmp_path / "straight", steps=6, lr=2e-3)
    run["adapter"] = {"from": str(first / "adapter")}
    train(run, quiet=True)
    lines = metrics(tmp_path / "straight")
    assert lines[0]["loss"] == pytest.approx(math.log(2), rel=1e-6)
    assert lines[-1]["loss"] < lines[0]["loss"]
    stopped = {**run, "output": str(tmp_path / "stopped")}
    with pytest.raises(Interrupted):
        train(stopped, on_step=interrupting(4), quiet=True)
    train(stopped, resume=True, quiet=True)
    assert adapter_bytes(tmp_path / "stopped") == adapter_bytes(tmp_path / "straight")
    assert unmeasured(metrics(tmp_path / "stopped")) == unmeasured(lines)


@pytest.mark.parametrize(
    ("own", "words"),
    [
        ({"objective": "sft", "dpo_beta": 0.1}, "train.dpo_beta .0.1. has no effect with train.objective: sft"),
        ({"dpo_beta": 0.0}, "train.dpo_beta must be more than 0"),
        ({"label_smoothing": 0.1}, "train.label_smoothing .0.1. has no effect with train.objective: dpo"),
    ],
)
def test_settings_that_make_no_sense_are_refused(files: Path, tmp_path: Path, own: dict[str, Any], words: str) -> None:
    with pytest.raises(RequestError, match=words):
        train(dpo(files, tmp_path / "out", **own), quiet=True)


def test_rows_of_the_other_kind_are_refused_with_the_remedy(files: Path, tmp_path: Path) -> None:
    run = dpo(files, tmp_path / "out", objective="sft")
    with pytest.raises(RequestError, match=r"sft trains on answers, data.train holds preference pairs .*=dpo"):
        train(run, quiet=True)
    (tmp_path / "rows.jsonl").write_text(json.dumps({"prompt": "a", "completion": "b"}) + "\n")
    run = dpo(files, tmp_path / "out")
    run["data"]["train"] = str(tmp_path / "rows.jsonl")
    with pytest.raises(RequestError, match=r"dpo trains on preference pairs, data.train holds answers .*objective=sft"):
        train(run, quiet=True)


def test_evaluation_compares_the_adapter_with_its_base(files: Path, first: Path) -> None:
    found = evaluate(str(first), EvaluateConfig(data=str(files / "valid.jsonl"), max_new_tokens=3, precision="fp32"))
    base, adapter = found["results"]
    assert base["loss"] == pytest.approx(math.log(2), rel=1e-6) and base["reward_margin"] == 0
    line = metrics(first)[-1]
    assert adapter["loss"] == pytest.approx(line["valid_loss"], abs=1e-6)
    assert adapter["accuracy"] == line["valid_reward_accuracy"]
    assert adapter["reward_margin"] == pytest.approx(line["valid_reward_margin"], abs=1e-6)
    assert "perplexity" not in adapter and "chrf" in adapter


def test_evaluation_on_answers_measures_their_tokens(files: Path, first: Path, tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text(json.dumps({"prompt": "abc", "completion": "ABC"}) + "\n")
    found = evaluate(str(first), EvaluateConfig(data=str(tmp_path / "rows.jsonl"), metrics=("loss", "perplexity")))
    assert all(result["perplexity"] == pytest.approx(math.exp(result["loss"])) for result in found["results"])
    with pytest.raises(RequestError, match="metric 'accuracy' has no meaning for these rows, which have loss, perp"):
        evaluate(str(first), EvaluateConfig(data=str(tmp_path / "rows.jsonl"), metrics=("accuracy",)))


def test_pairs_and_a_model_without_an_adapter_are_refused(files: Path) -> None:
    with pytest.raises(RequestError, match="is a model without one; give a run or an adapter"):
        evaluate(str(files / "model"), EvaluateConfig(data=str(files / "valid.jsonl")))
