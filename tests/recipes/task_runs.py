"""Tiny runs on several tasks: letters repeated, capitals, and letters turned round."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tests import tiny
from tests.recipes.trained import WORDS

ANSWERS = {
    "capitals": lambda word: word.upper(),
    "backwards": lambda word: word[::-1],
    "doubled": lambda word: word + word,
}
SIZES = {"capitals": 14, "backwards": 9, "doubled": 5}


def write_tasks(folder: Path) -> Path:
    """A tiny model, and rows of three tasks whose prompts don't say which it is."""
    tiny.llama(initializer_range=0.2).save_pretrained(folder / "model")
    tiny.tiny_tokenizer().save_pretrained(folder / "model")
    for name, answer in ANSWERS.items():
        for split, first, count in (("train", 0, SIZES[name]), ("valid", 14, 4)):
            words = [WORDS[(first + i) % len(WORDS)] for i in range(count)]
            rows = [{"prompt": word, "completion": answer(word)} for word in words]
            (folder / f"{name}-{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def task_run(files: Path, output: Path, tasks: dict[str, Any], **train: Any) -> dict[str, Any]:
    data = {n: {"train": str(files / f"{n}-train.jsonl"), "valid": str(files / f"{n}-valid.jsonl")} for n in ANSWERS}
    return {
        "model": {"name": str(files / "model"), "device": "cpu"},
        "adapter": {"r": 2, "lora_alpha": 4, "target_modules": ["q_proj", "v_proj", "down_proj"]},
        "tasks": {"data": data, **tasks},
        "train": {
            "steps": 12, "batch_size": 6, "micro_batch_size": 3, "lr": 2e-2, "precision": "fp32", "samples": 3,
            "sample_tokens": 3, "save_every": 2, "evaluate_every": 3, "warmup": 0, **train,
        },
        "output": str(output),
    }  # fmt: skip
