"""A run of every objective: what it writes, that it resumes bit for bit, and that evaluation changes nothing."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from peft import PeftConfig

from rankwise.errors import RequestError
from rankwise.recipes.finetune import train
from rankwise.train.interrupt import Interrupted
from rankwise.train.needs import NEEDS
from tests.recipes.runs import adapter_bytes, interrupting, metrics, settings, unmeasured
from tests.train.objective_cases import CASES

OTHERS = sorted(set(CASES) - {"sft"})  # which has its own, longer tests


@pytest.fixture(scope="module", params=OTHERS)
def name(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="module")
def folder(name: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    case, folder = CASES[name], tmp_path_factory.mktemp(name)
    case.save_model(folder / "model")
    case.write_rows(folder / "train.jsonl", 11)
    case.write_rows(folder / "valid.jsonl", 4, seed=1)
    return folder


def run_of(name: str, folder: Path, output: Path, **train_settings: Any) -> dict[str, Any]:
    samples = 2 if NEEDS[name].generates else None
    own = {"objective": name, "steps": 6, "batch_size": 4, "evaluate_every": 3, "samples": samples}
    tokens = {"sample_tokens": 4 if samples else None}
    return settings(folder, output, train={**own, **tokens, **train_settings})


@pytest.fixture(scope="module")
def straight(name: str, folder: Path) -> Path:
    train(run_of(name, folder, folder / "straight"), quiet=True)
    return folder / "straight"


def test_its_folder(name: str, straight: Path) -> None:
    assert PeftConfig.from_pretrained(str(straight / "adapter")).task_type == NEEDS[name].task_type
    lines = metrics(straight)
    assert [line["step"] for line in lines if "valid_loss" in line] == [3, 6]
    assert json.loads((straight / "summary.json").read_text())["final_loss"] == lines[-1]["loss"]
    assert (straight / "samples.jsonl").exists() == NEEDS[name].generates


@pytest.mark.parametrize("stop", [2, 5])
def test_a_resumed_run_equals_the_straight_one(
    name: str, folder: Path, straight: Path, tmp_path: Path, stop: int
) -> None:
    run = run_of(name, folder, tmp_path / "out")
    with pytest.raises(Interrupted):
        train(run, on_step=interrupting(stop), quiet=True)
    assert train(run, resume=True, quiet=True)["resumed_from"] == stop
    assert adapter_bytes(tmp_path / "out") == adapter_bytes(straight)
    assert unmeasured(metrics(tmp_path / "out")) == unmeasured(metrics(straight))


def test_evaluation_changes_no_result(name: str, folder: Path, straight: Path, tmp_path: Path) -> None:
    run = run_of(name, folder, tmp_path / "out", evaluate_every="auto", samples=None, sample_tokens=None)
    run["data"]["valid"] = None
    train(run, quiet=True)
    assert adapter_bytes(tmp_path / "out") == adapter_bytes(straight)


def test_packing_is_refused_where_rows_are_padded(name: str, folder: Path, tmp_path: Path) -> None:
    if NEEDS[name].packs:
        pytest.skip("it packs")
    run = run_of(name, folder, tmp_path / "out")
    run["data"]["packing"] = True
    with pytest.raises(RequestError, match=rf"data.packing \(true\) has no effect with train.objective: {name}"):
        train(run, quiet=True)
