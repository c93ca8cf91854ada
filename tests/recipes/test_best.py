"""Early stopping, and the best checkpoint: straight, interrupted, killed, on two processes."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from rankwise.cli.main import main
from rankwise.errors import RequestError, WorkError
from rankwise.files import sha256_file
from rankwise.recipes.finetune import train
from rankwise.train.interrupt import Interrupted
from rankwise.train.state import checkpoint_folders
from tests.processes import Processes
from tests.recipes.runs import adapter_bytes, interrupting, metrics, settings, unmeasured

BEST, STOPPED = 8, 12
"""Where this run's validation loss is lowest, and where two evaluations have brought nothing after it."""


def overfitting(files: Path, output: Path, **more: Any) -> dict[str, Any]:
    """A run of 16 steps, evaluated every second one, at a rate that soon learns its rows by heart."""
    changes = {
        "steps": 16, "batch_size": 4, "micro_batch_size": 4, "lr": 3e-2, "schedule": "constant", "warmup": 0,
        "evaluate_every": 2, "samples": 0, "sample_tokens": None, "save_every": 4,
    }  # fmt: skip
    return settings(files, output, train={**changes, **more})


WATCHED: dict[str, Any] = {"early_stopping": 2, "keep_best": True, "keep_checkpoints": 1}


@pytest.fixture(scope="module")
def watched(files: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that stops early and keeps its best checkpoint."""
    output = tmp_path_factory.mktemp("watched") / "out"
    train(overfitting(files, output, **WATCHED), quiet=True)
    return output


def steps_kept(output: Path) -> list[int]:
    return [int(folder.name.removeprefix("step-")) for folder in checkpoint_folders(output)]


def summary_of(output: Path) -> dict[str, Any]:
    return json.loads((output / "summary.json").read_text())


def test_it_stops_and_its_adapter_is_the_best_one(files: Path, watched: Path, tmp_path: Path) -> None:
    train(overfitting(files, tmp_path / "long"), quiet=True)
    straight = metrics(tmp_path / "long")
    losses = {line["step"]: line["valid_loss"] for line in straight if "valid_loss" in line}
    assert min(losses, key=losses.__getitem__) == BEST and len(losses) == 8
    assert unmeasured(metrics(watched)) == unmeasured(straight[:STOPPED]), "up to there it is the same run"
    summary = summary_of(watched)
    assert (summary["steps"], summary["adapter_step"], summary["stopped_early"]) == (STOPPED, BEST, True)
    assert summary["best_valid_loss"] == losses[BEST]
    assert steps_kept(watched) == [BEST, STOPPED], "the best, and the last state"
    best = watched / "checkpoints" / f"step-{BEST}" / "adapter"
    assert {path.name: sha256_file(path) for path in best.iterdir()} == {
        path.name: sha256_file(path) for path in (watched / "adapter").iterdir()
    }
    record = json.loads((watched / "provenance.json").read_text())
    assert record["adapter"]["adapter_model.safetensors"] == sha256_file(watched / "adapter/adapter_model.safetensors")
    train(overfitting(files, tmp_path / "short", steps=BEST), quiet=True)
    assert adapter_bytes(watched) == adapter_bytes(tmp_path / "short"), "it is the model as it was after that step"
    summary = summary_of(tmp_path / "long")
    assert (summary["adapter_step"], summary["stopped_early"]) == (16, False)
    assert steps_kept(tmp_path / "long") == [12, 16]


@pytest.mark.parametrize("stop_after", [7, 11])
def test_interrupted_and_resumed_it_stops_at_the_same_step(
    stop_after: int, files: Path, watched: Path, tmp_path: Path
) -> None:
    run = overfitting(files, tmp_path / "out", **WATCHED)
    with pytest.raises(Interrupted):
        train(run, on_step=interrupting(stop_after), quiet=True)
    summary = train(run, resume=True, quiet=True)
    assert (summary["steps"], summary["adapter_step"], summary["stopped_early"]) == (STOPPED, BEST, True)
    assert adapter_bytes(tmp_path / "out") == adapter_bytes(watched)
    assert unmeasured(metrics(tmp_path / "out")) == unmeasured(metrics(watched))


def test_a_run_that_stopped_early_is_resumed_to_nothing_and_with_more_patience_goes_on(
    files: Path, watched: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "out"
    shutil.copytree(watched, output)
    before = adapter_bytes(output)
    assert train(overfitting(files, output, **WATCHED), resume=True, quiet=True)["steps"] == STOPPED
    assert adapter_bytes(output) == before
    longer = {**WATCHED, "early_stopping": 3}
    summary = train(overfitting(files, output, **longer), resume=True)
    assert (summary["steps"], summary["adapter_step"], summary["stopped_early"]) == (14, BEST, True)
    assert "step 14: 3 evaluations in turn without a validation loss below 5.2937: stopping early" in (
        capsys.readouterr().err
    )
    last = {**WATCHED, "early_stopping": None, "keep_best": False}
    summary = train(overfitting(files, output, **last), resume=True, quiet=True)
    assert (summary["steps"], summary["adapter_step"], summary["stopped_early"]) == (16, 16, False)
    train(overfitting(files, tmp_path / "straight"), quiet=True)
    assert adapter_bytes(output) == adapter_bytes(tmp_path / "straight"), "the final state was never lost"


def test_gains_below_the_delta_do_not_count(files: Path, tmp_path: Path) -> None:
    summary = train(
        overfitting(files, tmp_path / "out", early_stopping=2, early_stopping_min_delta=10.0), quiet=True
    )  # fmt: skip
    assert (summary["steps"], summary["adapter_step"], summary["stopped_early"]) == (6, 6, True)


def test_a_damaged_best_is_never_replaced_in_silence(
    files: Path, watched: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "out"
    run = overfitting(files, output, **WATCHED)
    with pytest.raises(Interrupted):
        train(run, on_step=interrupting(9), quiet=True)
    assert steps_kept(output) == [BEST, 9]
    weights = output / "checkpoints" / f"step-{BEST}" / "adapter" / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1])
    summary = train(run, resume=True)
    err = capsys.readouterr().err
    assert f"step-{BEST}' is damaged (adapter/adapter_model.safetensors does not match its hash)" in err
    assert summary["adapter_step"] > 9 and summary["best_valid_loss"] == summary_of(watched)["best_valid_loss"]

    def spoil(step: Any) -> None:
        if step.number == STOPPED:
            (output / "checkpoints" / f"step-{BEST}" / "state.json").unlink()

    shutil.rmtree(output)
    with pytest.raises(WorkError, match=rf"step-{BEST}' is damaged \(state.json is missing\).*train.keep_best=false"):
        train(run, on_step=spoil, quiet=True)
    assert not (output / "adapter").exists() and steps_kept(output)[-1] == STOPPED
    train({**run, "train": {**run["train"], "keep_best": False}}, resume=True, quiet=True)
    assert (output / "adapter").is_dir()


def test_an_older_checkpoint_still_has_its_best(files: Path, tmp_path: Path) -> None:
    """The newest are steps 10 and 9, whose best is 8: it stays, whatever of them is damaged."""
    output = tmp_path / "out"
    run = overfitting(files, output, keep_best=True, keep_checkpoints=2, save_every=1)
    with pytest.raises(Interrupted):
        train(run, on_step=interrupting(10), quiet=True)
    assert steps_kept(output) == [8, 9, 10]
    for folder in checkpoint_folders(output)[2:]:
        (folder / "state.safetensors").write_bytes(b"")
    assert train(run, resume=True, quiet=True)["adapter_step"] == BEST


def test_two_processes_stop_together(files: Path, watched: Path, tmp_path: Path, two_processes: Processes) -> None:
    run = overfitting(files, tmp_path / "two", **WATCHED)
    run["adapter"]["lora_dropout"] = 0.0
    first, second = two_processes(train, run, None, False, True)
    assert first == second and first["stopped_early"] and first["adapter_step"] < first["steps"]
    assert steps_kept(tmp_path / "two") == [first["adapter_step"], first["steps"]]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"early_stopping": 0}, "train.early_stopping must be 1 or more, not 0"),
        ({"early_stopping_min_delta": 0.1}, "(0.1) has no effect without train.early_stopping"),
        ({"early_stopping": 2, "early_stopping_min_delta": -0.1}, "min_delta must be 0 or more, not -0.1"),
        ({"early_stopping": 2, "evaluate_every": None}, "train.early_stopping (2) needs evaluations"),
        ({"keep_best": True, "evaluate_every": None}, "train.keep_best (true) needs evaluations"),
        ({"keep_best": True, "save_every": None}, "train.keep_best (true) needs checkpoints"),
    ],
)
def test_what_makes_no_sense_is_refused(
    changes: dict[str, Any], words: str, files: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(RequestError) as error:
        train(overfitting(files, tmp_path / "out", **changes), quiet=True)
    assert words in error.value.message and not (tmp_path / "out").exists()


@pytest.mark.parametrize("setting", [{"keep_best": True}, {"early_stopping": 2}])
@pytest.mark.parametrize("split", ["auto", 0])
def test_it_needs_validation_rows(setting: dict[str, Any], split: str | int, files: Path, tmp_path: Path) -> None:
    run = overfitting(files, tmp_path / "out", **setting, evaluate_every="auto")
    run["data"] |= {"valid": None, "valid_split": split}
    run["train"]["samples"] = None
    with pytest.raises(RequestError, match=rf"train\.{next(iter(setting))} .* has no effect without data\.valid"):
        train(run, quiet=True)
    assert not (tmp_path / "out").exists()


def test_the_command_says_which_step_the_adapter_is_of(watched: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", str(watched / "run.yaml"), "--resume"]) == 0
    out, _ = capsys.readouterr()
    assert "stopped early" in out and f"the adapter is that of step {BEST}" in out
