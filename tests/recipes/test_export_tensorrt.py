"""`rankwise export --to tensorrt`: what it refuses, and, where the package is installed, what it builds."""

from __future__ import annotations

import importlib.util
import json

import pytest
from safetensors.torch import load_file

from rankwise.attach.checkpoint import save_adapter
from rankwise.errors import RequestError, WorkError
from rankwise.recipes.export import export
from tests import tiny
from tests.export.gguf_models import attached
from tests.recipes.test_export_gguf import a_run
from tests.recipes.trained import save_model


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return a_run(tmp_path_factory.mktemp("tensorrt"))


@pytest.fixture
def installed(monkeypatch):
    """The checks before the package is used."""
    monkeypatch.setattr("rankwise.recipes.export.need_package", lambda name: None)


def exported(run, out, **settings):
    return export(str(run), str(out), "tensorrt", settings, device="cpu")


@pytest.mark.skipif(importlib.util.find_spec("tensorrt_rtx") is not None, reason="it is installed")
def test_the_missing_package_is_named_with_the_command(run, tmp_path):
    with pytest.raises(RequestError, match=r"needs the package tensorrt_rtx, .*: pip install 'rankwise\[tensorrt\]'"):
        exported(run, tmp_path / "e")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"dtype": "bf16", "int8": "weights"},
            "--dtype bf16 has no effect with --int8",
        ),
        ({"merged": True, "max_rank": 8}, "--max-rank has no effect with --merged"),
        ({"max_kl": 0.0}, "--max-kl must be above 0, not 0"),
        ({"max_context": 512}, r"--max-context 512 is more than the model's 256 positions"),
        ({"dtype": "f32"}, r"--dtype 'f32' is unknown for --to tensorrt; did you mean 'fp32'"),
        ({"int4": True}, r"--int4 has no effect with --to tensorrt: it belongs to --to onnx"),
    ],
)
def test_settings_without_effect_are_refused(run, tmp_path, installed, settings, message):
    with pytest.raises(RequestError, match=message):
        exported(run, tmp_path / "e", **settings)
    assert not (tmp_path / "e").exists()


def test_an_encoder_is_refused(tmp_path, installed):
    save_model(tmp_path / "model", tiny.bert_classifier())
    model = type(tiny.bert_classifier()).from_pretrained(tmp_path / "model")
    save_adapter(attached(model, task_type="SEQ_CLS"), tmp_path / "adapter")
    with pytest.raises(RequestError, match=r"--to tensorrt takes causal language models; .* is for classification"):
        exported(tmp_path / "adapter", tmp_path / "e")


# --- with the package; no GPU --------------------------------------------------------------------------------------


@pytest.mark.parametrize("settings", [{}, {"merged": True, "int8": "full"}], ids=["fp16", "int8-merged"])
def test_an_engine(run, tmp_path, settings):
    pytest.importorskip("tensorrt_rtx")
    document = exported(run, tmp_path / "e", max_context=64, max_rows=2, **settings)
    [row] = document["report"]
    assert row["artifact"] == "model.engine" and row["ran"] is False and row["kl"] is None
    assert "built, not run" in row["note"] and 0 < row["graph_kl"] <= row["bounds"]["graph_kl"]
    files = {file.name for file in (tmp_path / "e").iterdir()}
    assert {"model.engine", "rankwise_tensorrt.json", "export_report.json", "tokenizer.json"} <= files
    manifest = json.loads((tmp_path / "e" / "rankwise_tensorrt.json").read_text())
    if settings:
        assert manifest["precision"] == "int8" and manifest["adapter"] is None and "12 products in int8" in row["note"]
        assert row["open_inputs"] == 3 + 4
    else:
        assert row["open_inputs"] == 3 + 4 + 28
        assert set(load_file(tmp_path / "e" / "adapter.safetensors")) < set(manifest["shapes"])


def test_past_the_bound_nothing_is_kept(run, tmp_path):
    pytest.importorskip("tensorrt_rtx")
    with pytest.raises(WorkError, match=r"graph_kl .*above the bound 1e-15; .* --dtype fp32"):
        exported(run, tmp_path / "in" / "e", max_kl=1e-15, max_context=64)
    assert list((tmp_path / "in").iterdir()) == []
