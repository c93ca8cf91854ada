"""Adapter folders for tests, and ways to break them."""

from __future__ import annotations

import json
from pathlib import Path

from safetensors.torch import load_file, save_file

from rankwise.adapters.config import LoraConfig
from rankwise.attach.checkpoint import save_adapter
from rankwise.attach.inject import attach
from tests import tiny
from tests.attach.peft_cases import randomise

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"


def saved(folder: Path, seed: int = 0, **options) -> Path:
    model = attach(tiny.llama(), LoraConfig(**{"r": 4, "target_modules": ["q_proj", "v_proj"], **options}))
    randomise(model, seed)
    save_adapter(model, folder)
    return folder


def edit_config(folder: Path, **changes) -> None:
    fields = json.loads((folder / CONFIG).read_text())
    (folder / CONFIG).write_text(json.dumps({k: v for k, v in {**fields, **changes}.items() if v != "DELETE"}))


def edit_weights(folder: Path, change) -> None:
    tensors = load_file(folder / WEIGHTS)
    change(tensors)
    save_file(tensors, folder / WEIGHTS)
