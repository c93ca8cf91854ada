"""`--to onnx` of classifiers, taggers and embedding models, whose heads and adapters are switched."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from rankwise.export.onnx_folder import read_manifest
from rankwise.export.onnx_runtime import OnnxModel
from rankwise.recipes.export import export
from rankwise.recipes.target import find_target, open_target
from tests.recipes.trained import headed_run


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["label", "labels", "tags", "pairs"])
def test_heads_and_hidden_states_are_torchs(kind, tmp_path):
    run = headed_run(tmp_path, kind, 20, steps=8)
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
