"""Files of tiny runs, and one run from beginning to end, once for each module."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from rankwise.recipes.finetune import train
from tests import tiny
from tests.recipes.runs import settings
from tests.train.rows import write_rows


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


@pytest.fixture(scope="module")
def straight(files: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run of `settings`, from beginning to end."""
    output = tmp_path_factory.mktemp("straight") / "out"
    train(settings(files, output), quiet=True)
    return output
