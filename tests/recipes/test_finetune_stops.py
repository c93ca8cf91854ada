"""Runs that stop (Ctrl-C, a kill, a full disk, a loss that is nan) and go on as if they had not."""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import json
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file

from rankwise.cli.main import main
from rankwise.errors import RequestError, WorkError, WriteError
from rankwise.recipes import best
from rankwise.recipes import resume as resume_module
from rankwise.recipes.finetune import train
from rankwise.train import objectives, state
from rankwise.train.interrupt import Interrupted
from rankwise.train.loop import Step
from rankwise.train.precision import Precision
from rankwise.train.state import checkpoint_folders
from tests.recipes.runs import adapter_bytes, interrupting, metrics, settings, unmeasured
from tests.train.rows import write_rows

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"data": {"packing": False}},
        {"train": {"precision": "bf16"}},
        {"train": {"steps": None, "epochs": 4, "schedule": "linear", "warmup": 3, "weight_decay": 0.1, "log_every": 5}},
        {"train": {"gradient_checkpointing": True}},
        {"adapter": {"use_dora": True, "init_lora_weights": "pissa"}},
        {"train": {"optimizer": "adamw-fused", "label_smoothing": 0.1, "z_loss": 1e-3, "loraplus_ratio": 4.0}},
        {"train": {"optimizer": "adamw-8bit", "loraplus_ratio": 4.0, "weight_decay": 0.1}, "adapter": {"r": 128}},
    ],
    ids=["packed", "padded", "bf16", "epochs", "checkpointing", "dora-pissa", "fused-smoothed", "8bit"],
)
def test_interrupted_and_resumed_is_the_straight_run(files: Path, tmp_path: Path, changes: dict[str, Any]) -> None:
    train(settings(files, tmp_path / "straight", **changes), quiet=True)
    run = settings(files, tmp_path / "halves", **changes)
    with pytest.raises(Interrupted) as stopped:
        train(run, on_step=interrupting(7), quiet=True)
    assert "stopped after step 7 of 12" in stopped.value.message
    assert f"rankwise train {tmp_path}/halves/run.yaml --resume" in stopped.value.message
    assert not (tmp_path / "halves" / "adapter").exists()
    summary = train(run, resume=True, quiet=True)
    assert summary["resumed_from"] == 7 and summary["steps"] == 12
    assert adapter_bytes(tmp_path / "halves") == adapter_bytes(tmp_path / "straight")
    assert unmeasured(metrics(tmp_path / "halves")) == unmeasured(metrics(tmp_path / "straight"))
    last = [checkpoint_folders(tmp_path / name)[-1] for name in ("halves", "straight")]
    states = [load_file(folder / "state.safetensors") for folder in last]
    assert states[0].keys() == states[1].keys()
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])


def _killed_at(run: dict[str, Any], step: int, num_threads: int) -> None:
    def kill(done: Step) -> None:
        if done.number == step:
            os.kill(os.getpid(), signal.SIGKILL)

    torch.set_num_threads(num_threads)  # sums are split by threads: equal bits need equally many
    train(run, on_step=kill, quiet=True)


def test_killed_and_resumed_is_the_straight_run(files: Path, straight: Path, tmp_path: Path) -> None:
    run = settings(files, tmp_path / "out")
    worker = multiprocessing.get_context("spawn").Process(target=_killed_at, args=(run, 8, torch.get_num_threads()))
    worker.start()
    worker.join()
    assert worker.exitcode == -signal.SIGKILL
    assert [line["step"] for line in metrics(tmp_path / "out")] == list(range(1, 9))
    assert train(run, resume=True, quiet=True)["resumed_from"] == 6
    assert adapter_bytes(tmp_path / "out") == adapter_bytes(straight)
    assert unmeasured(metrics(tmp_path / "out")) == unmeasured(metrics(straight))
    assert (tmp_path / "out" / "samples.jsonl").read_text() == (straight / "samples.jsonl").read_text()


def test_a_damaged_checkpoint_is_said_and_the_one_before_is_used(
    files: Path, straight: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = settings(files, tmp_path / "out", train={"keep_checkpoints": 3})
    with pytest.raises(Interrupted):
        train(run, on_step=interrupting(10), quiet=True)
    state = tmp_path / "out" / "checkpoints" / "step-10" / "state.safetensors"
    state.write_bytes(state.read_bytes()[:100])
    summary = train(run, resume=True)
    err = capsys.readouterr().err
    assert "is damaged (state.safetensors does not match its hash); using the one before" in err
    assert "after step 9" in err and summary["resumed_from"] == 9
    assert adapter_bytes(tmp_path / "out") == adapter_bytes(straight)


def test_a_request_that_is_refused_removes_no_checkpoint(files: Path, straight: Path, tmp_path: Path) -> None:
    """A damaged one is removed when the run goes on from the one before, and not sooner."""
    shutil.copytree(straight, tmp_path / "out")
    newest = checkpoint_folders(tmp_path / "out")[-1]
    (newest / "state.safetensors").write_bytes(b"half")
    with pytest.raises(RequestError, match=r"train\.lr was 0\.01 when the run began"):
        train(settings(files, tmp_path / "out", train={"lr": 1e-3}), resume=True, quiet=True)
    assert checkpoint_folders(tmp_path / "out")[-1] == newest


def test_a_folder_that_was_moved_goes_on_where_it_is(
    straight: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Not afresh in the place that it had, which its run file still names."""
    moved = shutil.copytree(straight, tmp_path / "new place")
    run = moved / "run.yaml"
    run.write_text(run.read_text().replace(str(straight), str(tmp_path / "old")))
    assert main(["train", str(run), "--resume", "--json"]) == 2
    assert f"the folder was moved; go on with output='{moved}'" in capsys.readouterr().err
    assert not (tmp_path / "old").exists()
    assert main(["train", str(run), "--resume", f"output={moved}", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["resumed_from"] == 12


def test_a_finished_run_is_resumed_to_nothing(files: Path, straight: Path) -> None:
    before = adapter_bytes(straight)
    lines = metrics(straight)
    summary = train(settings(files, straight), resume=True, quiet=True)
    assert summary["resumed_from"] == 12 and summary["steps"] == 12
    assert summary["final_loss"] == lines[-1]["loss"]
    assert adapter_bytes(straight) == before and metrics(straight) == lines


def test_resume_without_a_checkpoint_starts_afresh_and_says_so(
    files: Path, straight: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = settings(files, tmp_path / "out")
    summary = train(run, resume=True)
    assert "starting afresh" in capsys.readouterr().err
    assert summary["resumed_from"] is None
    assert adapter_bytes(tmp_path / "out") == adapter_bytes(straight)


def test_a_longer_run_with_a_constant_rate_is_the_long_run(files: Path, tmp_path: Path) -> None:
    constant = {"schedule": "constant", "warmup": 2}
    train(settings(files, tmp_path / "long", train=constant), quiet=True)
    train(settings(files, tmp_path / "out", train={**constant, "steps": 6}), quiet=True)
    train(settings(files, tmp_path / "out", train=constant), resume=True, quiet=True)
    assert adapter_bytes(tmp_path / "out") == adapter_bytes(tmp_path / "long")


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"train": {"lr": 0.1}}, ("train.lr", "0.01", "0.1")),
        ({"train": {"steps": 24}}, ("train.steps", "12", "24", "cosine")),
        ({"train": {"seed": 3}}, ("train.seed", "0", "3")),
        ({"train": {"precision": "bf16"}}, ("train.precision", "fp32", "bf16")),
        ({"adapter": {"r": 8}}, ("adapter.r", "4", "8")),
        ({"data": {"max_length": 100}}, ("data.max_length", "512", "100")),
    ],
)
def test_changed_settings_are_named(files: Path, straight: Path, changes: dict, words: tuple[str, ...]) -> None:
    before = (straight / "run.yaml").read_text()
    with pytest.raises(RequestError) as error:
        train(settings(files, straight, **changes), resume=True, quiet=True)
    assert all(word in error.value.message for word in words), error.value.message
    assert (straight / "run.yaml").read_text() == before


def test_changed_data_is_noticed_and_moved_data_is_not(files: Path, straight: Path, tmp_path: Path) -> None:
    moved = tmp_path / "moved.jsonl"
    moved.write_bytes((files / "train.jsonl").read_bytes())
    train(settings(files, straight, data={"train": str(moved)}), resume=True, quiet=True)
    write_rows(moved, 23, seed=5)
    with pytest.raises(RequestError, match=r"contents of data\.train have changed"):
        train(settings(files, straight, data={"train": str(moved)}), resume=True, quiet=True)


def test_memory_settings_may_change_and_it_is_said(
    files: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(Interrupted):
        train(settings(files, tmp_path / "out"), on_step=interrupting(4), quiet=True)
    train(settings(files, tmp_path / "out", train={"micro_batch_size": 2}), resume=True)
    assert "train.micro_batch_size was 3 and is now 2" in capsys.readouterr().err


def test_auto_precision_is_decided_once(files: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    answers = iter([Precision("bf16", "faster"), Precision("fp32", "faster")])
    monkeypatch.setattr(resume_module, "choose_precision", lambda name, device: next(answers))
    run = settings(files, tmp_path / "out", train={"precision": "auto"})
    with pytest.raises(Interrupted):
        train(run, on_step=interrupting(4), quiet=True)
    train(run, resume=True, quiet=True)
    assert yaml.safe_load((tmp_path / "out" / "run.yaml").read_text())["train"]["precision"] == "bf16"
    assert next(answers).name == "fp32"  # nobody asked a second time


def test_without_checkpoints_a_finished_run_is_not_trained_again(files: Path, tmp_path: Path) -> None:
    run = settings(files, tmp_path / "out", train={"steps": 2, "save_every": None})
    train(run, quiet=True)
    assert not (tmp_path / "out" / "checkpoints").exists()
    before = adapter_bytes(tmp_path / "out")
    with pytest.raises(RequestError, match="finished and kept no checkpoint"):
        train(run, resume=True, quiet=True)
    assert adapter_bytes(tmp_path / "out") == before


def test_a_failing_run_keeps_its_last_checkpoint(files: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []

    def losses(model: Any, batch: Any) -> torch.Tensor:
        calls.append(1)
        return objectives.TOKENS.losses(model, batch) * (float("nan") if len(calls) > 15 else 1.0)

    monkeypatch.setitem(objectives.OBJECTIVES, "sft", dataclasses.replace(objectives.TOKENS, losses=losses))
    with pytest.raises(WorkError, match=r"step 5: the loss is nan.*last checkpoint.*step-3.*adapter\.from=") as error:
        train(settings(files, tmp_path / "out"), quiet=True)
    assert error.value.code == 1
    assert [folder.name for folder in checkpoint_folders(tmp_path / "out")] == ["step-3"]


def test_a_second_ctrl_c_ends_at_once(files: Path, tmp_path: Path) -> None:
    def twice(step: Step) -> None:
        if step.number == 5:
            with contextlib.suppress(KeyboardInterrupt):
                os.kill(os.getpid(), signal.SIGINT)
            os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        train(settings(files, tmp_path / "out"), on_step=twice, quiet=True)
    assert [folder.name for folder in checkpoint_folders(tmp_path / "out")] == ["step-3"]


def test_ctrl_c_on_the_real_command(files: Path, tmp_path: Path) -> None:
    """A process of its own gets SIGINT while it trains: one line that says how to go on; then it goes on."""
    run_file = tmp_path / "run.yaml"
    run_file.write_text(yaml.safe_dump(settings(files, Path("out"), train={"steps": 2000, "save_every": None})))
    command = [sys.executable, "-m", "rankwise", "train", str(run_file), "--json"]
    running = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT)
    written = tmp_path / "out" / "metrics.jsonl"
    started = time.monotonic()
    while not (written.exists() and written.stat().st_size) and time.monotonic() - started < 60:
        assert running.poll() is None, running.communicate()
        time.sleep(0.02)
    running.send_signal(signal.SIGINT)
    out, err = running.communicate(timeout=60)
    assert running.returncode == 1 and "Traceback" not in err
    message = json.loads(out)["error"]["message"]
    assert err.splitlines()[-1] == f"rankwise: error: {message}"
    assert message.endswith(f"saved; go on with: rankwise train {tmp_path}/out/run.yaml --resume")
    (saved,) = checkpoint_folders(tmp_path / "out")
    step = int(saved.name.removeprefix("step-"))
    assert message.startswith(f"stopped after step {step} of 2000")
    with pytest.raises(Interrupted, match=f"stopped after step {step + 2} of 2000"):
        train(tmp_path / "out" / "run.yaml", on_step=interrupting(step + 2), resume=True, quiet=True)


def full_disk(monkeypatch: pytest.MonkeyPatch, calls_that_work: int) -> None:
    calls: list[int] = []
    save = state.save

    def fail(*given: Any) -> bytes:
        calls.append(1)
        if len(calls) > calls_that_work:
            raise OSError(errno.ENOSPC, "No space left on device")
        return save(*given)

    monkeypatch.setattr(state, "save", fail)


def test_a_full_disk_is_one_line_and_loses_nothing(
    files: Path, straight: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run_file = tmp_path / "run.yaml"
    run_file.write_text(yaml.safe_dump(settings(files, Path("out"))))
    with pytest.MonkeyPatch.context() as patch:
        full_disk(patch, 2)
        assert main(["train", str(run_file), "--json"]) == 1
    out, err = capsys.readouterr()
    folder = tmp_path / "out"
    message = json.loads(out)["error"]["message"]
    assert message == (
        f"cannot write '{folder}/checkpoints/step-9': No space left on device; free space or choose another folder; "
        f"the last checkpoint is '{folder}/checkpoints/step-6', go on with: rankwise train {folder}/run.yaml --resume"
    )
    assert err.splitlines()[-1] == f"rankwise: error: {message}"
    assert sorted(path.name for path in (folder / "checkpoints").iterdir()) == ["step-3", "step-6"]
    assert train(folder / "run.yaml", resume=True, quiet=True)["resumed_from"] == 6
    assert adapter_bytes(folder) == adapter_bytes(straight)


def test_a_result_that_can_not_be_written_is_there_after_resuming(files: Path, straight: Path, tmp_path: Path) -> None:
    def full(model: Any, folder: Path) -> None:
        raise WriteError(str(folder), "No space left on device")

    with pytest.MonkeyPatch.context() as patch, pytest.raises(WorkError, match=r"out/adapter'.*step-12', go on with"):
        patch.setattr(best, "save_adapter", full)
        train(settings(files, tmp_path / "out"), quiet=True)
    assert not (tmp_path / "out" / "summary.json").exists()
    train(settings(files, tmp_path / "out"), resume=True, quiet=True)
    assert adapter_bytes(tmp_path / "out") == adapter_bytes(straight)


def test_a_folder_that_was_made_and_no_more_is_resumed(files: Path, straight: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / ".lock").touch()
    train(settings(files, tmp_path / "out"), resume=True, quiet=True)
    assert adapter_bytes(tmp_path / "out") == adapter_bytes(straight)
