"""A fine-tuning run from its settings to its output folder."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path

import pytest
import torch
import yaml
from peft import PeftConfig
from safetensors.torch import load_file

from rankwise.cli.main import main
from rankwise.data.formats import USER, Turn
from rankwise.data.templates import render_prompt
from rankwise.files import sha256_file
from rankwise.recipes.finetune import train
from rankwise.recipes.target import find_target
from rankwise.train.loop import Step
from rankwise.train.state import checkpoint_folders
from tests import tiny
from tests.recipes.runs import adapter_bytes, metrics, settings

SUMMARY = {
    "output", "steps", "final_loss", "best_valid_loss", "adapter_step", "stopped_early", "tokens_per_s",
    "peak_memory_bytes", "trainable_parameters", "vllm_max_lora_rank", "rank_map", "resumed_from",
    "skipped_rows",
}  # fmt: skip


def test_the_output_folder(files: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    seen: list[int] = []
    summary = train(settings(files, tmp_path / "out"), on_step=lambda step: seen.append(step.number))
    out, err = capsys.readouterr()
    assert out == ""
    output = tmp_path / "out"
    assert {path.name for path in output.iterdir()} == {
        "adapter", "run.yaml", "metrics.jsonl", "summary.json", "checkpoints", "provenance.json", "samples.jsonl",
        "status.json", ".lock",
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
    silent = {"samples": None, "sample_tokens": None, "evaluate_every": "auto"}
    run = settings(files, tmp_path / "silent", train=silent, data={"valid": None})
    summary = train(run, quiet=True)
    assert summary["best_valid_loss"] is None
    assert not (tmp_path / "silent" / "samples.jsonl").exists()
    assert adapter_bytes(tmp_path / "silent") == adapter_bytes(straight)


def test_starting_from_an_adapter(files: Path, straight: Path, tmp_path: Path) -> None:
    run = settings(files, tmp_path / "out", train={"steps": 2})
    run["adapter"] = {"from": str(straight / "adapter")}
    run["model"]["name"] = str(shutil.copytree(files / "model", tmp_path / "moved"))
    summary = train(run, quiet=True)
    first = metrics(tmp_path / "out")[0]["loss"]
    assert first < metrics(straight)[0]["loss"] - 0.01
    assert summary["trainable_parameters"] == 3712
    config = json.loads((tmp_path / "out" / "adapter" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str(tmp_path / "moved"), "the model that it was trained on last"
    assert adapter_bytes(tmp_path / "out") != adapter_bytes(straight)
    record = json.loads((tmp_path / "out" / "provenance.json").read_text())
    assert record["start"]["files"]["adapter_model.safetensors"] == sha256_file(
        straight / "adapter" / "adapter_model.safetensors"
    )


def test_texts(files: Path, tmp_path: Path) -> None:
    text = str(files / "text.jsonl")
    changes = {"objective": "text", "steps": 4, "samples": None, "sample_tokens": None}
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


def test_steps_are_plain_data(files: Path, tmp_path: Path) -> None:
    seen: list[Step] = []
    train(settings(files, tmp_path / "out", train={"steps": 4}), on_step=seen.append, quiet=True)
    assert {field.name for field in dataclasses.fields(seen[0])} >= {"number", "num_steps", "loss", "lr", "grad_norm"}
    assert "valid_loss" in seen[3].metrics


def test_a_revision_goes_into_the_adapter(files: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Else the adapter alone would later load its base as it is by then."""
    commit = "0123456789abcdef0123456789abcdef01234567"
    repository = tmp_path / "models--someone--tiny"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "v1").write_text(commit)
    shutil.copytree(files / "model", repository / "snapshots" / commit)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    run = settings(files, tmp_path / "out", model={"name": "someone/tiny", "revision": "v1"}, train={"steps": 2})
    train(run, quiet=True)
    adapter = tmp_path / "alone"
    shutil.copytree(tmp_path / "out" / "adapter", adapter)
    config = json.loads((adapter / "adapter_config.json").read_text())
    assert (config["base_model_name_or_path"], config["revision"]) == ("someone/tiny", "v1")
    assert find_target(str(adapter)).model.revision == "v1"
    assert PeftConfig.from_pretrained(adapter).revision == "v1"
    base = json.loads((tmp_path / "out" / "provenance.json").read_text())["base"]
    assert (base["name"], base["commit"]) == ("someone/tiny", commit)
    assert base["files"]["model.safetensors"]["sha256"] == sha256_file(files / "model" / "model.safetensors")


@pytest.mark.parametrize("resumed", [False, True])
def test_texts_that_were_recognised_are_written_as_such(files: Path, tmp_path: Path, resumed: bool) -> None:
    """Then `generate` on the run's folder goes on with raw text, and the run file as it was still resumes."""
    text = str(files / "text.jsonl")
    changes = {"objective": "text", "steps": 4, "samples": None, "sample_tokens": None}
    run = settings(files, tmp_path / "out", data={"train": text, "valid": text}, train=changes)
    train(run, quiet=True)
    if resumed:
        assert train(run, resume=True, quiet=True)["resumed_from"] == 4
    assert yaml.safe_load((tmp_path / "out" / "run.yaml").read_text())["data"]["format"] == "text"
    target = find_target(str(tmp_path / "out"))
    tokenizer = tiny.tiny_tokenizer()
    assert render_prompt(tokenizer, [Turn(USER, "abc")], target.data_config())[0] == "abc"
    assert target.data_config(str(files / "valid.jsonl")).format == "auto", "other files are what they are"


def test_one_step_is_one(files: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    row = tmp_path / "row.jsonl"
    row.write_text('{"prompt": "a", "completion": "b"}\n')
    run = settings(
        files, tmp_path / "out", data={"train": str(row), "valid": None},
        adapter={"target_modules": ["model.layers.0.self_attn.q_proj"]},
        train={"steps": 20, "batch_size": 1, "micro_batch_size": 1, "warmup": 1, "samples": None,
               "sample_tokens": None, "evaluate_every": "auto"},
    )  # fmt: skip
    train(run)
    err = capsys.readouterr().err
    for words in ("1 layer, rank 4", "1 row (prompt_completion)", "20 steps of 1 row (", "1 step of warm-up"):
        assert words in err, words


def test_smoothing_is_trained_on_and_never_measured(files: Path, tmp_path: Path) -> None:
    """At a rate that moves nothing the training loss shows the smoothing, and the validation loss does not."""
    found = []
    for name, more in (("plain", {}), ("smooth", {"label_smoothing": 0.3, "z_loss": 0.1})):
        run = settings(files, tmp_path / name, train={"steps": 2, "warmup": 0, "lr": 1e-12, **more})
        train(run, quiet=True)
        last = metrics(tmp_path / name)[-1]
        found.append((last["loss"], last["valid_loss"]))
    (plain_loss, plain_valid), (smooth_loss, smooth_valid) = found
    assert smooth_valid == pytest.approx(plain_valid, abs=1e-5)
    assert smooth_loss > plain_loss + 0.5


def test_skipped_rows_are_in_the_summary(files: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = settings(files, tmp_path / "out", data={"train": str(files / "bad.jsonl"), "on_bad_row": "skip"})
    assert train(run)["skipped_rows"] == 2
    assert "2 rows left out because of data.on_bad_row=skip" in capsys.readouterr().err
