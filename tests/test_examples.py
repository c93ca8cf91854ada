"""The examples run as they stand, on a tiny model."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers

import rankwise as rw
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
