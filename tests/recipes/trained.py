"""A tiny run, trained in a second: a random Llama that learns to answer in capitals."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from rankwise.recipes.finetune import train
from tests import tiny
from tests.train import labelled

WORDS = (
    "amber", "birch", "cedar", "dove", "elm", "fern", "gull", "heron", "iris", "jade", "kite", "lark", "moss", "nest",
    "oak", "pine", "quail", "reed", "sage", "thyme",
)  # fmt: skip


def rows(count: int, first: int = 0) -> list[dict[str, str]]:
    """Prompts that share an instruction, and completions."""
    chosen = [(WORDS[(first + i) % len(WORDS)], WORDS[(first + 3 * i + 1) % len(WORDS)]) for i in range(count)]
    return [{"prompt": f"Capitals: {a} {b}", "completion": f"{a} {b}".upper()} for a, b in chosen]


def write_rows(path: Path, documents: list[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(document) + "\n" for document in documents))
    return str(path)


def save_model(folder: Path, model: Any = None) -> str:
    model = tiny.llama(initializer_range=0.2) if model is None else model
    model.save_pretrained(folder)
    tiny.tiny_tokenizer().save_pretrained(folder)
    return str(folder)


def run_document(root: Path, model: str, **train_settings: Any) -> dict[str, Any]:
    """A run's mapping, its data files written under `root`."""
    return {
        "model": {"name": model, "device": "cpu"},
        "adapter": {"r": 4, "lora_alpha": 8},
        "data": {
            "train": write_rows(root / "train.jsonl", rows(16)),
            "valid": write_rows(root / "valid.jsonl", rows(5, first=7)),
        },
        "train": {
            "steps": 12, "batch_size": 8, "lr": 2e-2, "precision": "fp32", "samples": 0, "save_every": None,
            **train_settings,
        },
        "output": str(root / "run"),
    }  # fmt: skip


def headed_run(root: Path, kind: str, num_rows: int, steps: int) -> Path:
    """A finished run on rows of a `kind` of `tests.train.labelled`; its base, its rows and its output are in `root`."""
    tiny.encoder().save_pretrained(root / "model")
    tiny.word_tokenizer().save_pretrained(root / "model")
    train(
        {
            "model": {"name": str(root / "model"), "device": "cpu"},
            "adapter": {"r": 4, "lora_alpha": 8},
            "data": {
                "train": labelled.write(root / "train.jsonl", labelled.rows(kind, num_rows)),
                "valid": labelled.write(root / "valid.jsonl", labelled.rows(kind, 9, seed=1)),
                "max_length": 32,
            },
            "train": {
                "objective": labelled.OBJECTIVE[kind], "steps": steps, "batch_size": 10, "lr": 1e-2,
                "precision": "fp32",
            },
            "output": str(root / "run"),
        },
        quiet=True,
    )  # fmt: skip
    return root / "run"


def figures(result: dict[str, Any]) -> dict[str, float]:
    """A row of results without its name."""
    return {name: value for name, value in result.items() if name != "target"}


def trained_run(root: Path, model: Any = None) -> Path:
    """A finished run folder; its base is `root/model`."""
    train(run_document(root, save_model(root / "model", model)), quiet=True)
    return root / "run"
