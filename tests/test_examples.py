"""The examples run as they stand, on a tiny model."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers

import rankwise as rw
from rankwise.recipes.run import read_run
from tests import tiny
from tests.recipes.trained import rows, save_model, write_rows

EXAMPLES = Path(__file__).parents[1] / "examples"


@pytest.fixture
def files(tmp_path) -> dict[str, str]:
    return {
        "model": save_model(tmp_path / "model"),
        "data": write_rows(tmp_path / "train.jsonl", rows(16)),
        "valid": write_rows(tmp_path / "valid.jsonl", rows(4, first=9)),
        "output": str(tmp_path / "out"),
    }


def run(name: str, *arguments: str) -> str:
    command = [sys.executable, "-W", "error::UserWarning:rankwise", str(EXAMPLES / name), *arguments]
    environment = {**os.environ, "PYTHONPATH": str(EXAMPLES.parent)}
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_flat_loop(files):
    out = run(
        "flat_loop.py", "--data", files["data"], "--model", files["model"], "--output", files["output"],
        "--steps", "12", "--batch-size", "4", "--lr", "0.02", "--device", "cpu",
    )  # fmt: skip
    base, adapter = (float(word) for word in out.split("last batch: base ")[1].split("\n")[0].split(", adapter "))
    assert adapter < base - 0.3
    from peft import PeftModel

    plain = transformers.AutoModelForCausalLM.from_pretrained(files["model"])
    theirs = PeftModel.from_pretrained(plain, files["output"])
    ours = rw.load_adapter(transformers.AutoModelForCausalLM.from_pretrained(files["model"]), files["output"])
    ids = torch.arange(20)[None]
    assert torch.allclose(theirs(ids).logits, ours(ids).logits, atol=1e-5)


def test_flat_loop_is_about_120_lines():
    assert len((EXAMPLES / "flat_loop.py").read_text().splitlines()) <= 130


def test_notebook(files):
    out = run(
        "notebook.py", "--data", files["data"], "--valid", files["valid"], "--model", files["model"],
        "--output", files["output"], "--steps", "8",
    )  # fmt: skip
    assert "'target': 'base'" in out and "'target': 'adapter'" in out and "LlamaForCausalLM" in out
    assert "'verdict': 'pass'" in out
    assert (Path(files["output"]) / "merged" / "merge_certificate.json").is_file()


def adapter_files(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir() if path.name.startswith(("adapter", "model", "pytorch_model"))}


ADAPTER = {"adapter_config.json", "adapter_model.safetensors"}


def test_trainer(files):
    arguments = ("--data", files["data"], "--valid", files["valid"], "--model", files["model"], "--lr", "0.02")
    out = run("trainer.py", *arguments, "--output", files["output"], "--steps", "8", "--every", "4")
    before, after = (float(word) for word in re.findall(r"base ([\d.]+), adapter ([\d.]+)", out)[0])
    assert after < before - 0.3 and "best" in out
    for folder in ("adapter", "checkpoint-4", "checkpoint-8"):
        assert adapter_files(Path(files["output"]) / folder) == ADAPTER
    again = run("trainer.py", *arguments, "--output", files["output"], "--steps", "12", "--every", "4", "--resume")
    assert adapter_files(Path(files["output"]) / "checkpoint-12") == ADAPTER and "base" in again


def need_trl() -> None:
    pytest.importorskip("trl", reason="TRL is not installed: pip install 'rankwise[trl]'")


def test_trl_sft(files):
    need_trl()
    out = run(
        "trl_sft.py", "--data", files["data"], "--model", files["model"], "--output", files["output"], "--steps", "8",
        "--lr", "0.02",
    )  # fmt: skip
    first, last = (float(word) for word in re.findall(r"first step ([\d.]+), last step ([\d.]+)", out)[0])
    assert last < first - 0.3
    for folder in ("adapter", "checkpoint-8"):
        assert adapter_files(Path(files["output"]) / folder) == ADAPTER
    loaded = rw.load_adapter(
        transformers.AutoModelForCausalLM.from_pretrained(files["model"]), f"{files['output']}/adapter"
    )
    assert len(rw.ranks(loaded)) == 14


def test_grpo_with_the_base_as_reference(files):
    need_trl()
    out = run(
        "grpo.py", "--data", files["data"], "--model", files["model"], "--output", files["output"], "--steps", "3",
        "--tokens", "6", "--lr", "0.02",
    )  # fmt: skip
    first, last = (float(word) for word in re.findall(r"kl: first step ([\d.e-]+), last step ([\d.e-]+)", out)[0])
    assert first == 0.0, "a fresh adapter is its own reference"
    assert last > 0.0, "which the adapter-off model stays, while the adapter moves"
    assert adapter_files(Path(files["output"]) / "adapter") == ADAPTER


def test_classify(tmp_path: Path) -> None:
    """The run file and its data, on a tiny encoder."""
    tiny.encoder().save_pretrained(tmp_path / "model")
    tiny.word_tokenizer().save_pretrained(tmp_path / "model")
    changes = ["model.name=" + str(tmp_path / "model"), "output=" + str(tmp_path / "out"), "train.epochs=1"]
    summary = rw.train(read_run(EXAMPLES / "classify.yaml", changes), quiet=True)
    assert summary["steps"] == 3
    assert (tmp_path / "out" / "adapter" / "head.json").exists()


def test_tasks(files, tmp_path: Path) -> None:
    """The run file and its data, on a tiny model."""
    changes = [
        "model.name=" + files["model"], "output=" + files["output"], "train.steps=4", "train.evaluate_every=4",
        "tasks.conflict_every=2", "tasks.stages=[{kind: shared, steps: 2}, {kind: joint}]", "tasks.isolate_below=0.9",
        "train.sample_tokens=2", "train.precision=fp32",
    ]  # fmt: skip
    summary = rw.train(read_run(EXAMPLES / "tasks.yaml", changes), quiet=True)
    assert set(summary["tasks"]["losses"]) == {"capitals", "backwards", "doubled"} and summary["tasks"]["isolated"]
    assert (tmp_path / "out" / "adapter" / "backwards" / "adapter_model.safetensors").exists()
    assert (tmp_path / "out" / "conflict.jsonl").exists()


CLUSTER = EXAMPLES / "cluster"


@pytest.mark.parametrize("name", sorted(path.name for path in CLUSTER.glob("*.yaml")))
def test_run_files_for_clusters_are_read(name):
    from rankwise.recipes.run import read_run

    run = read_run(CLUSTER / name)
    assert run.model.device == "cuda" and run.output is not None
    assert run.train.batch_size % 32 == 0 and run.train.batch_size >= 8 * run.train.micro_rows


@pytest.mark.parametrize("name", sorted(path.name for path in CLUSTER.iterdir() if path.suffix in (".sh", ".sbatch")))
def test_scripts_for_clusters_start_torchrun_on_a_run_file(name):
    from torch.distributed.run import get_args_parser

    text = (CLUSTER / name).read_text(encoding="utf-8")
    assert subprocess.run(["bash", "-n", str(CLUSTER / name)], check=False).returncode == 0
    words = shlex.split(text[text.rindex("torchrun ") :].replace("\\\n", " "), comments=True)
    found = get_args_parser().parse_args([word.replace("$SLURM_NNODES", "4") for word in words[1:]])
    assert found.module and found.training_script == "rankwise" and found.training_script_args[0] == "train"
    assert (EXAMPLES.parent / found.training_script_args[1]).is_file() and int(found.max_restarts) == 3
