"""A bench of tiny cells on three tasks at once."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import yaml

from tests.bench.suites import write_suite
from tests.recipes.task_runs import ANSWERS, write_tasks
from tests.recipes.trained import WORDS

TARGETS = ["q_proj", "v_proj", "down_proj"]
SINGLE = {"r": 2, "lora_alpha": 4, "target_modules": TARGETS}
SHARED = {"r": 6, "lora_alpha": 4, "target_modules": TARGETS}

METHODS: dict[str, Any] = {
    "base": {"kind": "base"},
    "singles": {"adapter": SINGLE, "lr": 2e-2},
    "hard": {"kind": "gate", "singles": "singles", "gate": {"mode": "hard"}},
    "inferred": {"kind": "gate", "singles": "singles", "gate": {"mode": "inferred"}},
    "uniform": {"kind": "combine", "singles": "singles", "combine": {"method": "sum"}},
    "ties": {"kind": "combine", "singles": "singles", "combine": {"method": "ties", "density": 0.5}},
    "soft": {
        "kind": "tasks", "singles": "singles", "train": {"steps": 3}, "lr": 0.5,
        "tasks": {"gate": {"mode": "soft", "per": "layer"}, "train_adapters": False},
    },
    "joint": {"kind": "tasks", "adapter": SHARED, "train": {"steps": 6}, "lr": [1e-3, 2e-2]},
    "embedding": {"kind": "tasks", "adapter": SHARED, "train": {"steps": 6}, "lr": "joint", "tasks": {"embedding": {}}},
    "progressive": {
        "kind": "tasks", "adapter": SHARED, "train": {"steps": 6}, "lr": "joint",
        "tasks": {"stages": [{"kind": "shared", "tasks": [name], "steps": 2} for name in ANSWERS]},
    },
    "vector": {
        "kind": "tasks", "adapter": SHARED, "train": {"steps": 4}, "lr": "joint", "tasks": {"embedding": {}},
        "new_task": {"rows": 4, "steps": 3},
    },
}  # fmt: skip

SUITE: dict[str, Any] = {
    "title": "Tiny tasks", "table": "tasks", "tasks": list(ANSWERS), "seeds": 2, "reference": "singles",
    "methods": METHODS, "margin": {"base": "base", "to": "singles"},
}  # fmt: skip


def write_several(root: Path) -> Path:
    """A bench with three tasks, beside its model and data."""
    write_tasks(root)
    folder = root / "bench"
    folder.mkdir()
    tasks = {}
    for name, answer in ANSWERS.items():
        rows = [{"prompt": word, "completion": answer(word)} for word in WORDS[8:13]]
        (root / f"{name}-test.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        tasks[name] = {
            "model": {"name": "../model", "device": "cpu"},
            "data": {split: f"../{name}-{split}.jsonl" for split in ("train", "valid", "test")},
            "train": {"steps": 4, "batch_size": 4, "micro_batch_size": 4, "precision": "fp32"},
        }
    (folder / "tasks.yaml").write_text(yaml.safe_dump(tasks))
    write_suite(folder, "several", SUITE)
    return folder
