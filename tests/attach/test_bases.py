"""Adapters of another base are refused by the hashes in their runs' provenance."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoModelForCausalLM

import rankwise as rw
from rankwise.adapters.gate_config import GateConfig
from rankwise.attach.attachment import attachment_of
from rankwise.attach.bases import base_record, model_weight_hashes
from rankwise.errors import RequestError
from tests import tiny
from tests.attach.gate_cases import disturbed

CONFIG = rw.LoraConfig(r=2)


def of_run(folder: Path, base: dict[str, Any] | None) -> Path:
    """An adapter in the folder of a run that says what its base was."""
    rw.save_adapter(disturbed(rw.attach(tiny.llama(), CONFIG), 1), folder / "adapter")
    if base is not None:
        (folder / "provenance.json").write_text(json.dumps({"base": base}))
    return folder / "adapter"


def record(name: str, hash: str) -> dict[str, Any]:
    return {"name": name, "files": {"model.safetensors": {"bytes": 1, "sha256": hash}, "config.json": {"sha256": "0"}}}


def test_the_model_s_own_files_decide(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tiny.llama().save_pretrained(tmp_path / "base")
    own = model_weight_hashes(AutoModelForCausalLM.from_pretrained(tmp_path / "base"))["model.safetensors"]
    right, wrong = of_run(tmp_path / "r", record("base", own)), of_run(tmp_path / "w", record("other", "f" * 64))
    bare, torn = of_run(tmp_path / "b", None), of_run(tmp_path / "t", None)
    (tmp_path / "t" / "provenance.json").write_text("{")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    words = (
        rf"'b' \('.*w/adapter'\) was trained on another base, other \(sha256 f+\), than this model \(sha256 {own[:12]}"
    )
    with pytest.raises(RequestError, match=words):
        rw.attach_gate(model, {"a": right, "b": wrong})
    with pytest.raises(RequestError, match=r"'.*provenance\.json' can't be read"):
        rw.attach_gate(model, {"a": right, "b": torn})
    with pytest.raises(RequestError, match="adapter 'shared'"):
        rw.attach_gate(model, {"a": right}, shared=wrong)
    assert attachment_of(model) is None and "note:" not in capsys.readouterr().err
    rw.attach_gate(model, {"a": right, "b": bare, "c": CONFIG, "d": bare}, GateConfig("soft"))
    said = [line for line in capsys.readouterr().err.splitlines() if line.startswith("note:")]
    assert len(said) == 1 and "which base adapters b, d were trained on" in said[0]


def test_a_model_from_nowhere_takes_adapters_of_one_base(tmp_path: Path) -> None:
    one, same, other = (of_run(tmp_path / n, record(n, hash * 64)) for n, hash in (("1", "a"), ("2", "a"), ("3", "b")))
    rw.attach_gate(tiny.llama(), {"x": one, "y": same})
    with pytest.raises(RequestError, match=r"adapter 'z' .* another base, 3 .* than adapter 'x' \(sha256 aaaa"):
        rw.attach_gate(tiny.llama(), {"x": one, "y": same, "z": other})


def test_a_shared_adapter_s_base_is_checked(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tiny.llama().save_pretrained(tmp_path / "base")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    wrong, bare = of_run(tmp_path / "w", record("other", "f" * 64)), of_run(tmp_path / "b", None)
    with pytest.raises(RequestError, match=r"adapter 'shared' .* was trained on another base, other"):
        rw.attach_embedding(model, wrong, ["a", "b"])
    assert attachment_of(model) is None
    rw.attach_embedding(model, bare, ["a", "b"])
    assert "which base adapter shared was trained on" in capsys.readouterr().err


@pytest.mark.parametrize("embedding", [False, True])
def test_a_saved_folder_keeps_the_bases_and_is_checked_when_opened(tmp_path: Path, embedding: bool) -> None:
    tiny.llama().save_pretrained(tmp_path / "base")
    own = model_weight_hashes(AutoModelForCausalLM.from_pretrained(tmp_path / "base"))["model.safetensors"]
    right = of_run(tmp_path / "r", record("base", own))
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    if embedding:
        rw.attach_embedding(model, right, ["x", "y"])
    else:
        rw.attach_gate(model, {"x": right, "fresh": CONFIG})
    rw.save_adapter(model, tmp_path / "gate")
    kept, *others = (tmp_path / "gate").rglob("provenance.json")
    assert base_record(kept.parent) == record("base", own) and not others, "of a fresh one nothing is known"
    again = rw.load_adapter(AutoModelForCausalLM.from_pretrained(tmp_path / "base"), tmp_path / "gate")
    rw.save_adapter(again, tmp_path / "second")
    assert (tmp_path / "second" / kept.relative_to(tmp_path / "gate")).read_bytes() == kept.read_bytes()
    tiny.llama(initializer_range=0.3).save_pretrained(tmp_path / "other")
    other = AutoModelForCausalLM.from_pretrained(tmp_path / "other")
    with pytest.raises(RequestError, match=r"was trained on another base, base .* than this model"):
        rw.load_adapter(other, tmp_path / "second")
    assert attachment_of(other) is None


def test_where_the_record_is(tmp_path: Path) -> None:
    (tmp_path / "provenance.json").write_text(json.dumps({"base": {"name": "it"}}))
    for place in ("adapter", "adapter/movies", "checkpoints/step-3/adapter", "checkpoints/step-3/adapter/movies"):
        assert base_record(tmp_path / place) == {"name": "it"}, place
    assert base_record(tmp_path / "elsewhere" / "deep") is None
