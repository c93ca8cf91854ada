from __future__ import annotations

import contextlib
import dataclasses
import json
import multiprocessing
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from filelock import FileLock
from safetensors.torch import load_file

from rankwise.cli.main import main
from rankwise.data.rows import BadRows
from rankwise.errors import RequestError, WorkError
from rankwise.files import sha256_file
from rankwise.recipes import resume as resume_module
from rankwise.recipes.finetune import train
from rankwise.train import objectives
from rankwise.train.interrupt import Interrupted
from rankwise.train.loop import Objective, Step
from rankwise.train.precision import Precision
from rankwise.train.state import checkpoint_folders
from tests import tiny
from tests.train.rows import write_rows

SUMMARY = {
    "output", "steps", "final_loss", "best_valid_loss", "tokens_per_s", "peak_memory_bytes", "trainable_parameters",
    "resumed_from",
}  # fmt: skip
MEASURED = ("tokens_per_s", "peak_memory_bytes")


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model and rows to train and validate on."""
    folder = tmp_path_factory.mktemp("files")
    tiny.llama().save_pretrained(folder / "model")
    tiny.tiny_tokenizer().save_pretrained(folder / "model")
    write_rows(folder / "train.jsonl", 23)
    write_rows(folder / "valid.jsonl", 5, seed=1)
    (folder / "text.jsonl").write_text("".join(json.dumps({"text": "abcabc" * n}) + "\n" for n in range(1, 9)))
    (folder / "bad.jsonl").write_text('{"prompt": "a", "completion": "b"}\n{"prompt": "a"}\nnot json\n')
    return folder


def settings(files: Path, output: Path, **sections: dict[str, Any]) -> dict[str, Any]:
    """A run with everything that could break exactness: dropout, packing, accumulation, clipping, partial batches."""
    run: dict[str, Any] = {
        "model": {"name": str(files / "model"), "device": "cpu"},
        "adapter": {"r": 4, "lora_alpha": 8, "lora_dropout": 0.1},
        "data": {"train": str(files / "train.jsonl"), "valid": str(files / "valid.jsonl")},
        "train": {
            "steps": 12, "batch_size": 8, "micro_batch_size": 3, "lr": 1e-2, "max_grad_norm": 0.3, "precision": "fp32",
            "save_every": 3, "evaluate_every": 4, "samples": 2, "sample_tokens": 4,
        },
        "output": str(output),
    }  # fmt: skip
    return {**run, **{name: {**run.get(name, {}), **values} for name, values in sections.items()}}


def adapter_bytes(output: Path) -> bytes:
    return (output / "adapter" / "adapter_model.safetensors").read_bytes()


def metrics(output: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]


def unmeasured(lines: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{key: value for key, value in line.items() if key not in MEASURED} for line in lines]


def interrupting(step: int) -> Callable[[Step], None]:
    """Presses Ctrl-C right after `step`."""

    def press(done: Step) -> None:
        if done.number == step:
            os.kill(os.getpid(), signal.SIGINT)

    return press


@pytest.fixture(scope="module")
def straight(files: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run of `settings`, from beginning to end."""
    output = tmp_path_factory.mktemp("straight") / "out"
    train(settings(files, output), quiet=True)
    return output


def test_the_output_folder(files: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    seen: list[int] = []
    summary = train(settings(files, tmp_path / "out"), on_step=lambda step: seen.append(step.number))
    out, err = capsys.readouterr()
    assert out == ""
    output = tmp_path / "out"
    assert {path.name for path in output.iterdir()} == {
        "adapter", "run.yaml", "metrics.jsonl", "summary.json", "checkpoints", "provenance.json", "samples.jsonl",
        ".lock",
    }  # fmt: skip
    assert set(summary) == SUMMARY and json.loads((output / "summary.json").read_text()) == summary
    assert summary["output"] == str(output) and summary["steps"] == 12 and summary["resumed_from"] is None
    assert seen == list(range(1, 13))
    lines = metrics(output)
    assert [line["step"] for line in lines] == seen
    assert all({"loss", "lr", "grad_norm", "tokens_per_s", "peak_memory_bytes"} <= set(line) for line in lines)
    valid = {line["step"]: line["valid_loss"] for line in lines if "valid_loss" in line}
    assert list(valid) == [4, 8, 12] and min(valid.values()) == summary["best_valid_loss"]
    assert summary["final_loss"] == lines[-1]["loss"] < lines[0]["loss"]
    samples = [json.loads(line) for line in (output / "samples.jsonl").read_text().splitlines()]
    assert [sample["step"] for sample in samples] == [4, 4, 8, 8, 12, 12]
    assert all(set(sample) == {"step", "prompt", "answer", "reference"} for sample in samples)
    assert [folder.name for folder in checkpoint_folders(output)] == ["step-9", "step-12"]
    weights = load_file(output / "adapter" / "adapter_model.safetensors")
    assert summary["trainable_parameters"] == sum(tensor.numel() for tensor in weights.values())
    config = json.loads((output / "adapter" / "adapter_config.json").read_text())
    assert config["task_type"] == "CAUSAL_LM" and config["base_model_name_or_path"] == str(files / "model")
    for words in ("14 layers, rank 4: 3,712 trainable", "23 rows (prompt", "12 steps of 8 rows (3 at a time"):
        assert words in err


def test_where_it_comes_from(files: Path, straight: Path) -> None:
    record = json.loads((straight / "provenance.json").read_text())
    assert set(record["versions"]) == {"python", "torch", "transformers", "rankwise"}
    assert record["versions"]["torch"] == torch.__version__
    train_file = str(files / "train.jsonl")
    assert record["data"]["train"] == {train_file: sha256_file(train_file)}
    weights = record["base"]["files"]["model.safetensors"]
    assert weights["sha256"] == sha256_file(files / "model" / "model.safetensors")
    result = straight / "adapter" / "adapter_model.safetensors"
    assert record["adapter"]["adapter_model.safetensors"] == sha256_file(result)


def test_one_seed_gives_equal_bytes_and_another_does_not(files: Path, straight: Path, tmp_path: Path) -> None:
    train(settings(files, tmp_path / "again"), quiet=True)
    assert adapter_bytes(tmp_path / "again") == adapter_bytes(straight)
    train(settings(files, tmp_path / "other", train={"seed": 1}), quiet=True)
    assert adapter_bytes(tmp_path / "other") != adapter_bytes(straight)


def test_the_resolved_run_file_repeats_the_run(straight: Path, tmp_path: Path) -> None:
    document = yaml.safe_load((straight / "run.yaml").read_text())
    train({**document, "output": str(tmp_path / "again")}, quiet=True)
    assert adapter_bytes(tmp_path / "again") == adapter_bytes(straight)


def test_evaluation_changes_no_result(files: Path, straight: Path, tmp_path: Path) -> None:
    run = settings(files, tmp_path / "silent", train={"samples": None, "evaluate_every": "auto"}, data={"valid": None})
    summary = train(run, quiet=True)
    assert summary["best_valid_loss"] is None
    assert not (tmp_path / "silent" / "samples.jsonl").exists()
    assert adapter_bytes(tmp_path / "silent") == adapter_bytes(straight)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"data": {"packing": False}},
        {"train": {"precision": "bf16"}},
        {"train": {"steps": None, "epochs": 4, "schedule": "linear", "warmup": 3, "weight_decay": 0.1, "log_every": 5}},
        {"train": {"gradient_checkpointing": True}},
        {"adapter": {"use_dora": True, "init_lora_weights": "pissa"}},
    ],
    ids=["packed", "padded", "bf16", "epochs", "checkpointing", "dora-pissa"],
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


def test_an_output_folder_that_exists_is_refused(files: Path, straight: Path, tmp_path: Path) -> None:
    with pytest.raises(RequestError, match=r"exists; choose another output, or go on.*--resume"):
        train(settings(files, straight), quiet=True)
    (tmp_path / "mine.txt").write_text("precious")
    with pytest.raises(RequestError, match=r"has no run\.yaml: it is not a run's folder"):
        train(settings(files, tmp_path), resume=True, quiet=True)
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]


def test_a_folder_in_use_is_refused(files: Path, straight: Path) -> None:
    with FileLock(straight / ".lock"), pytest.raises(RequestError, match="in use by a run that is still going"):
        train(settings(files, straight), resume=True, quiet=True)


def test_without_checkpoints_a_finished_run_is_not_trained_again(files: Path, tmp_path: Path) -> None:
    run = settings(files, tmp_path / "out", train={"steps": 2, "save_every": None})
    train(run, quiet=True)
    assert not (tmp_path / "out" / "checkpoints").exists()
    before = adapter_bytes(tmp_path / "out")
    with pytest.raises(RequestError, match="finished and kept no checkpoint"):
        train(run, resume=True, quiet=True)
    assert adapter_bytes(tmp_path / "out") == before


@pytest.mark.parametrize(
    ("changes", "kind", "words"),
    [
        ({"data": {"train": "bad.jsonl"}}, BadRows, ("bad.jsonl:2", "bad.jsonl:3")),
        ({"data": {"train": "bad.jsonl", "valid": "bad.jsonl"}}, BadRows, ("4 bad rows",)),
        ({"data": {"train": "gone.jsonl"}}, RequestError, ("gone.jsonl",)),
        ({"data": {"train": "text.jsonl"}}, RequestError, ("train.objective=text",)),
        ({"train": {"objective": "text"}}, RequestError, ("train.objective=sft",)),
        ({"adapter": {"target_modules": ["nonsense"]}}, RequestError, ("nonsense",)),
        ({"model": {"name": "./gone"}}, RequestError, ("gone",)),
        ({"model": {"device": "cuda:99"}}, RequestError, ("cuda:99",)),
        ({"train": {"warmup": 12}}, RequestError, ("train.warmup",)),
    ],
)
def test_a_wrong_request_leaves_nothing_behind(
    files: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    changes: dict[str, Any],
    kind: type[Exception],
    words: tuple[str, ...],
) -> None:
    monkeypatch.chdir(files)
    with pytest.raises(kind) as error:
        train(settings(files, tmp_path / "out", **changes), quiet=True)
    assert all(word in str(error.value) for word in words), str(error.value)
    assert not (tmp_path / "out").exists()


def test_rows_longer_than_the_model_are_refused(files: Path, tmp_path: Path) -> None:
    (tmp_path / "long.jsonl").write_text(json.dumps({"prompt": "a", "completion": "b" * 900}) + "\n")
    run = settings(files, tmp_path / "out", data={"train": str(tmp_path / "long.jsonl"), "max_length": 1000})
    with pytest.raises(RequestError, match=r"the model 512 positions; set data\.max_length=512"):
        train(run, quiet=True)


def test_many_processes_are_refused_for_now(files: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(RequestError, match="2 processes is not available yet"):
        train(settings(files, tmp_path / "out"), quiet=True)


def test_an_output_is_needed(files: Path) -> None:
    run = settings(files, Path("unused"))
    del run["output"]
    with pytest.raises(RequestError, match="missing setting 'output'"):
        train(run, quiet=True)


def test_a_failing_run_keeps_its_last_checkpoint(files: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []

    def losses(model: Any, batch: Any) -> torch.Tensor:
        calls.append(1)
        return objectives.TOKENS.losses(model, batch) * (float("nan") if len(calls) > 15 else 1.0)

    monkeypatch.setitem(objectives.OBJECTIVES, "sft", Objective(losses, objectives.TOKENS.count))
    with pytest.raises(WorkError, match=r"step 5: the loss is nan.*last checkpoint.*step-3.*adapter\.from=") as error:
        train(settings(files, tmp_path / "out"), quiet=True)
    assert error.value.code == 1
    assert [folder.name for folder in checkpoint_folders(tmp_path / "out")] == ["step-3"]


def test_starting_from_an_adapter(files: Path, straight: Path, tmp_path: Path) -> None:
    run = settings(files, tmp_path / "out", train={"steps": 2})
    run["adapter"] = {"from": str(straight / "adapter")}
    summary = train(run, quiet=True)
    first = metrics(tmp_path / "out")[0]["loss"]
    assert first < metrics(straight)[0]["loss"] - 0.01
    assert summary["trainable_parameters"] == 3712
    assert adapter_bytes(tmp_path / "out") != adapter_bytes(straight)
    record = json.loads((tmp_path / "out" / "provenance.json").read_text())
    assert record["start"]["files"]["adapter_model.safetensors"] == sha256_file(
        straight / "adapter" / "adapter_model.safetensors"
    )


def test_weights_of_the_base_are_trained_in_fp32_only(files: Path, tmp_path: Path) -> None:
    adapter = {"modules_to_save": ["lm_head"]}
    with pytest.raises(RequestError, match=r"adapter\.modules_to_save.*set train\.precision=fp32"):
        train(settings(files, tmp_path / "out", adapter=adapter, train={"precision": "bf16"}), quiet=True)
    assert not (tmp_path / "out").exists()
    train(settings(files, tmp_path / "out", adapter=adapter, train={"precision": "auto", "steps": 2}), quiet=True)
    assert yaml.safe_load((tmp_path / "out" / "run.yaml").read_text())["train"]["precision"] == "fp32"


def test_texts(files: Path, tmp_path: Path) -> None:
    text = str(files / "text.jsonl")
    changes = {"objective": "text", "steps": 4, "samples": None}
    run = settings(files, tmp_path / "out", data={"train": text, "valid": text}, train=changes)
    summary = train(run, quiet=True)
    assert summary["best_valid_loss"] is not None
    lines = metrics(tmp_path / "out")
    assert lines[-1]["loss"] < lines[0]["loss"]


def test_samples_are_of_the_model_as_it_is(files: Path, tmp_path: Path) -> None:
    """Enough steps on two rows to learn them by heart: the samples must be those answers."""
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps({"prompt": p, "completion": c}) + "\n" for p, c in (("a", "xyz"), ("b", "uvw"))))
    run = settings(
        files, tmp_path / "out", data={"train": str(rows), "valid": str(rows)},
        adapter={"r": 16, "lora_alpha": 64, "lora_dropout": 0.0, "target_modules": ["v_proj", "down_proj", "lm_head"]},
        train={"steps": 150, "batch_size": 2, "micro_batch_size": 2, "lr": 2e-2, "max_grad_norm": 1.0,
               "evaluate_every": 150, "save_every": None, "sample_tokens": 6},
    )  # fmt: skip
    train(run, quiet=True)
    samples = [json.loads(line) for line in (tmp_path / "out" / "samples.jsonl").read_text().splitlines()]
    assert [(sample["prompt"], sample["answer"]) for sample in samples] == [("a", "xyz"), ("b", "uvw")]


def test_the_command(files: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run_file = tmp_path / "run.yaml"
    run_file.write_text(yaml.safe_dump(settings(files, Path("out"))))
    assert main(["train", str(run_file), "train.steps=3", "train.warmup=0", "--json"]) == 0
    out, err = capsys.readouterr()
    document = json.loads(out)
    assert set(document) == SUMMARY and document["output"] == str(tmp_path / "out")
    assert "step 3/3" in err
    assert main(["train", str(run_file), "--json"]) == 2
    out, err = capsys.readouterr()
    assert json.loads(out)["error"]["code"] == 2 and "--resume" in json.loads(out)["error"]["message"]
    assert main(["train", str(run_file), "train.steps=3", "train.warmup=0", "--resume"]) == 0
    out, _ = capsys.readouterr()
    assert "resumed after step 3" in out and str(tmp_path / "out") in out
    assert main(["train", str(run_file), "train.lrr=3"]) == 2
    assert "train.lr" in capsys.readouterr().err


def test_a_second_ctrl_c_ends_at_once(files: Path, tmp_path: Path) -> None:
    def twice(step: Step) -> None:
        if step.number == 5:
            with contextlib.suppress(KeyboardInterrupt):
                os.kill(os.getpid(), signal.SIGINT)
            os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        train(settings(files, tmp_path / "out"), on_step=twice, quiet=True)
    assert [folder.name for folder in checkpoint_folders(tmp_path / "out")] == ["step-3"]


def test_steps_are_plain_data(files: Path, tmp_path: Path) -> None:
    seen: list[Step] = []
    train(settings(files, tmp_path / "out", train={"steps": 4}), on_step=seen.append, quiet=True)
    assert {field.name for field in dataclasses.fields(seen[0])} >= {"number", "num_steps", "loss", "lr", "grad_norm"}
    assert "valid_loss" in seen[3].metrics
