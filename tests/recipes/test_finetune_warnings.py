"""What a run says before it trains, and what it names when a step has broken the adapter."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from rankwise.data import loader
from rankwise.errors import WorkError
from rankwise.recipes.finetune import train
from rankwise.recipes.run import rank_hint
from tests.recipes.runs import settings

TWO_STEPS = {"steps": 2, "evaluate_every": 2, "save_every": None}


def _warnings(err: str) -> list[str]:
    return [line.strip() for line in err.splitlines() if "warning: " in line]


def test_a_learning_rate_that_breaks_the_adapter_is_named(files: Path, tmp_path: Path) -> None:
    changes = {"lr": 1e30, "steps": 1, "warmup": 0, "schedule": "constant", "precision": "fp32"}
    with pytest.raises(WorkError, match=r"^step 1: the validation loss is nan; lower train\.lr \(1e\+30, 1e\+30 at"):
        train(settings(files, tmp_path / "out", train=changes), quiet=True)


def test_ranks_that_no_weight_can_have_are_said(
    files: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    adapter = {"r": 17, "target_modules": ["q_proj", "k_proj", "up_proj"], "rank_pattern": {"up_proj": 4}}
    train(settings(files, tmp_path / "out", adapter=adapter, train=TWO_STEPS))
    [line] = _warnings(capsys.readouterr().err)
    assert "the rank of 2 layers" in line and "k_proj (rank 17, smaller side 16)" in line
    assert "q_proj" not in line and "up_proj" not in line
    assert "lower adapter.r" in line and "adapter.rank_pattern" in line
    run = settings(files, tmp_path / "on", train=TWO_STEPS)
    train({**run, "adapter": {"from": str(tmp_path / "out" / "adapter")}})
    [line] = _warnings(capsys.readouterr().err)
    assert "k_proj (rank 17, smaller side 16)" in line and "rank_pattern" not in line


def test_ranks_up_to_the_smaller_side_are_not(files: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    adapter = {"r": 16, "target_modules": ["q_proj", "k_proj"]}
    train(settings(files, tmp_path / "out", adapter=adapter, train=TWO_STEPS))
    assert _warnings(capsys.readouterr().err) == []


def test_validation_rows_that_are_trained_on_are_said(
    files: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """By what was read anyway: no file is read again."""
    lines = (files / "train.jsonl").read_text().splitlines()
    valid = tmp_path / "valid.jsonl"
    valid.write_text("\n".join([*lines[:2], *(files / "valid.jsonl").read_text().splitlines()]) + "\n")
    read: list[str] = []
    iter_rows = loader.iter_rows

    def counting(paths: Any, *given: Any) -> Any:
        read.extend(Path(path).name for path in ([paths] if isinstance(paths, str) else paths))
        return iter_rows(paths, *given)

    monkeypatch.setattr(loader, "iter_rows", counting)
    summary = train(settings(files, tmp_path / "out", data={"valid": str(valid)}, train=TWO_STEPS))
    [line] = _warnings(capsys.readouterr().err)
    assert line.startswith("warning: valid: 2 rows also in the training files")
    assert read == ["train.jsonl", "valid.jsonl"] and summary["steps"] == 2


def test_data_that_hold_more_than_the_adapter_are_said(
    files: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    small = {"r": 1, "target_modules": ["layers.0.self_attn.k_proj"]}
    train(settings(files, tmp_path / "small", adapter=small, train=TWO_STEPS))
    assert "more than 48 parameters can remember" in capsys.readouterr().err
    train(settings(files, tmp_path / "out", adapter={"r": 4}, train=TWO_STEPS))
    assert "hint" not in capsys.readouterr().err


def test_a_run_without_a_rank_gets_a_hint(tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text("data: {train: rows.jsonl}\nadapter: {lora_alpha: 8}\n")
    hint = rank_hint(file)
    assert hint is not None and "no adapter.r" in hint and "rank 16" in hint
    assert rank_hint({"data": {"train": "rows.jsonl"}}) == hint
    assert rank_hint(file, ["adapter.r=4"]) is None and rank_hint({"adapter": {"from": "a"}}) is None
    assert rank_hint({"ranks": {"policy": "layered", "budget": 9}}) is None
