"""A tiny run with everything that could break exactness, and what it wrote."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

from rankwise.train.loop import Step

MEASURED = ("tokens_per_s", "peak_memory_bytes")


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
