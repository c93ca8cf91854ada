"""`--to onnx` of classifiers, taggers and embedding models, whose heads and adapters are switched."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from rankwise.export.onnx_folder import read_manifest
from rankwise.export.onnx_runtime import OnnxModel
from rankwise.recipes.export import export
from rankwise.recipes.finetune import train
from rankwise.recipes.target import find_target, open_target
from tests import tiny
from tests.train.labelled import OBJECTIVE, rows, write


def trained(folder: Path, kind: str) -> Path:
    tiny.encoder().save_pretrained(folder / "model")
    tiny.word_tokenizer().save_pretrained(folder / "model")
    train(
        {
            "model": {"name": str(folder / "model"), "device": "cpu"},
            "adapter": {"r": 4, "lora_alpha": 8},
            "data": {
                "train": write(folder / "train.jsonl", rows(kind, 20)),
                "valid": write(folder / "valid.jsonl", rows(kind, 9, seed=1)),
                "max_length": 32,
            },
            "train": {"objective": OBJECTIVE[kind], "steps": 8, "batch_size": 10, "lr": 1e-2, "precision": "fp32"},
            "output": str(folder / "run"),
        },
        quiet=True,
    )
    return folder / "run"


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["label", "labels", "tags", "pairs"])
def test_heads_and_hidden_states_are_torchs(kind, tmp_path):
    run = trained(tmp_path, kind)
    document = export(str(run), str(tmp_path / "onnx"), "onnx", {}, device="cpu")
    assert all(row["max_abs_diff"] < 1e-3 for row in document["report"])
    model, stated = OnnxModel(tmp_path / "onnx", 1), read_manifest(tmp_path / "onnx")
    opened = open_target(find_target(str(run), device="cpu"), "fp32")
    row = [2, 40, 41, 42, 43, 3]
    with torch.no_grad():
        output = opened.model(input_ids=torch.tensor([row]), attention_mask=torch.ones(1, len(row), dtype=torch.long))
    wanted = output.last_hidden_state if kind == "pairs" else output.logits
    found = model.encode(row, "run")
    assert found.shape == tuple(wanted.shape) and np.abs(found - wanted.numpy()).max() < 1e-4
    assert np.abs(model.encode(row) - found).max() > 1e-3, "without the adapter and its head"
    assert (stated.pooling is not None) == (kind == "pairs") and (stated.labels is None) == (kind == "pairs")
    if kind in ("labels", "pairs"):  # what is compared is no plain row of logits there
        quantised = export(str(run), str(tmp_path / "q"), "onnx", {"int8": "full", "max_kl": 5.0}, device="cpu")
        assert all(0 < row["kl"] < 5.0 and row["left_out"] == [] for row in quantised["report"])
