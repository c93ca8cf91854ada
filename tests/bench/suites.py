"""A bench of tiny cells: tasks, a suite of comparisons and one of rates."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from tests.recipes.trained import rows, save_model, write_rows

METHODS: dict[str, Any] = {
    "base": {"kind": "base"},
    "lora-r4": {"adapter": {"r": 4, "lora_alpha": 8}, "lr": [1e-3, 1e-2]},
    "lora-r2": {"adapter": {"r": 2, "lora_alpha": 8}, "lr": 1e-2},
    "full": {"kind": "full", "lr": 1e-2},
}

SUITE: dict[str, Any] = {
    "title": "Tiny", "tasks": ["capitals"], "seeds": 2, "reference": "lora-r4", "methods": METHODS,
    "margin": {"base": "base", "to": "lora-r4"}, "share_of": {"base": "base", "to": "full"},
}  # fmt: skip

RATES: dict[str, Any] = {
    "title": "Tiny rates", "table": "rates", "tasks": ["capitals"], "seeds": 2,
    "methods": {
        "lora-r4": {"adapter": {"r": 4, "lora_alpha": 8}, "lr": [1e-3, 1e-2]}, "full": {"kind": "full", "lr": [1e-2]},
    },
}  # fmt: skip


def write_suite(folder: Path, name: str, document: dict[str, Any]) -> Path:
    """A suite of a bench."""
    path = folder / "suites" / f"{name}.yaml"
    path.parent.mkdir(exist_ok=True)
    path.write_text(yaml.safe_dump(document, sort_keys=False))
    return path


def write_bench(root: Path) -> Path:
    """A bench with one task, beside its model and data; relative paths in it."""
    save_model(root / "model")
    folder = root / "bench"
    folder.mkdir()
    data = {"train": 16, "valid": 6, "test": 8}
    for number, (split, count) in enumerate(data.items()):
        write_rows(root / f"{split}.jsonl", rows(count, first=5 * number))
    task = {
        "model": {"name": "../model", "device": "cpu"},
        "data": {split: f"../{split}.jsonl" for split in data},
        "train": {"steps": 5, "batch_size": 8, "micro_batch_size": 8, "precision": "fp32"},
    }
    (folder / "tasks.yaml").write_text(yaml.safe_dump({"capitals": task}))
    write_suite(folder, "tiny", SUITE)
    write_suite(folder, "rates", RATES)
    return folder
