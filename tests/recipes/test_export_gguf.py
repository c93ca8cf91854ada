"""`rankwise export --to gguf` and `--to gguf-lora`, on tiny runs."""

from __future__ import annotations

import json
from pathlib import Path

import gguf
import pytest

from rankwise.attach.checkpoint import save_adapter
from rankwise.errors import RequestError, WorkError
from rankwise.recipes import export_gguf as room
from rankwise.recipes.export import export
from rankwise.recipes.finetune import train
from tests import tiny
from tests.export.gguf_models import attached, bpe_tokenizer, llama, qwen3
from tests.recipes.trained import run_document, save_model
from tests.tiny import CHATML


def a_run(root: Path, model=None, tokenizer=None, **data) -> Path:
    folder = root / "model"
    (llama() if model is None else model).save_pretrained(folder)
    (bpe_tokenizer() if tokenizer is None else tokenizer).save_pretrained(folder)
    document = run_document(root, str(folder), steps=4)
    document["data"].update(data)
    train(document, quiet=True)
    return root / "run"


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    return a_run(tmp_path_factory.mktemp("gguf"))


def exported(run, out, to="gguf", **settings):
    return export(str(run), str(out), to, settings, device="cpu")


@pytest.mark.parametrize(("dtype", "bound"), [("f32", "max_abs_diff"), ("f16", "kl"), ("q8_0", "kl")])
def test_a_model(run, tmp_path, dtype, bound):
    document = exported(run, tmp_path / "m", dtype=dtype)
    [row] = document["report"]
    assert row["artifact"] == "model.gguf" and row["ran"] and list(row["bounds"]) == [bound]
    assert 0 < row[bound] <= row["bounds"][bound] or dtype == "f32"
    assert row["bytes"] == (tmp_path / "m" / "model.gguf").stat().st_size
    assert row["same_text"] > (0.99 if dtype == "f32" else 0.5) and row["tokenizer_texts"] > 20
    assert "not run in llama.cpp" in row["note"] and row["pre_tokenizer"] == "smollm"
    assert {file.name for file in (tmp_path / "m").iterdir()} == {"model.gguf", "Modelfile", "export_report.json"}
    assert json.loads((tmp_path / "m" / "export_report.json").read_text()) == document


def test_the_default_dtype_and_the_adapter_is_in_it(run, tmp_path):
    document = exported(run, tmp_path / "m")
    assert document["settings"]["dtype"] == "f16"
    reader = gguf.GGUFReader(tmp_path / "m" / "model.gguf")
    assert len([t for t in reader.tensors if t.name == "output.weight"]) == 0, "a tied head is not written twice"


def test_an_adapter(run, tmp_path):
    document = exported(run, tmp_path / "a", "gguf-lora")
    [row] = document["report"]
    assert row["artifact"] == "adapter.gguf" and row["ran"] and row["layers"] == 14
    assert row["weight_error"] < 1e-6 and row["max_abs_diff"] < 1e-4
    text = (tmp_path / "a" / "Modelfile").read_text()
    assert "ADAPTER ./adapter.gguf" in text and "FROM ./base.gguf" in text


def test_the_modelfile_has_trainings_template_and_stops(run, tmp_path):
    exported(run, tmp_path / "m")
    text = (tmp_path / "m" / "Modelfile").read_text()
    assert '{{ if eq .Role "user" }}<|im_start|>user\n{{ .Content }}<|im_end|>\n{{ else if' in text
    assert 'PARAMETER stop "<|im_end|>"' in text and "PARAMETER num_ctx 256" in text


def test_a_run_with_a_plain_template(tmp_path):
    run = a_run(tmp_path, tokenizer=bpe_tokenizer(chat_template=None), chat_template="plain")
    exported(run, tmp_path / "m")
    assert "### User:\n{{ .Content }}" in (tmp_path / "m" / "Modelfile").read_text()
    found = gguf.GGUFReader(tmp_path / "m" / "model.gguf").fields
    assert "tokenizer.chat_template" not in found


def test_a_template_file_is_the_files_template(tmp_path):
    template = CHATML.replace("<|im_start|>", "<|im_start|>the ")
    (tmp_path / "mine.jinja").write_text(template)
    run = a_run(tmp_path, chat_template=str(tmp_path / "mine.jinja"))
    exported(run, tmp_path / "m")
    assert gguf.GGUFReader(tmp_path / "m" / "model.gguf").fields["tokenizer.chat_template"].contents() == template
    assert "<|im_start|>the user\n{{ .Content }}" in (tmp_path / "m" / "Modelfile").read_text()


def test_encoder_decoders_are_refused(tmp_path):
    save_model(tmp_path / "model", tiny.t5())
    model = attached(type(tiny.t5()).from_pretrained(tmp_path / "model"), task_type="SEQ_2_SEQ_LM")
    save_adapter(model, tmp_path / "adapter")
    with pytest.raises(RequestError, match=r"--to gguf holds causal language models; .* is for seq2seq; --to merged"):
        exported(tmp_path / "adapter", tmp_path / "m")


def test_bos_is_left_to_the_program_that_puts_it_there(tmp_path):
    template = "<|endoftext|>{% for m in messages %}[{{ m.role }}]{{ m.content }}<|im_end|>{% endfor %}[assistant]"
    run = a_run(tmp_path, tokenizer=bpe_tokenizer("llama-bpe", template))
    exported(run, tmp_path / "m")
    text = (tmp_path / "m" / "Modelfile").read_text()
    assert 'TEMPLATE """{{ if .System }}[system]{{ .System }}' in text and "<|endoftext|>[" not in text


def test_past_a_bound_nothing_is_kept(run, tmp_path, monkeypatch):
    monkeypatch.setitem(room.BOUNDS, "q8_0", {"kl": 1e-12})
    with pytest.raises(
        WorkError, match=r"'model.gguf' differs .*kl .*above the bound 1e-12; .*export with --dtype f32"
    ):
        exported(run, tmp_path / "in" / "m", dtype="q8_0")
    assert list((tmp_path / "in").iterdir()) == []


def test_dora_is_folded_and_refused_as_a_lora(tmp_path):
    qwen3().save_pretrained(tmp_path / "model")
    bpe_tokenizer("qwen2").save_pretrained(tmp_path / "model")
    model = attached(type(qwen3()).from_pretrained(tmp_path / "model"), use_dora=True)
    save_adapter(model, tmp_path / "adapter")
    [row] = exported(tmp_path / "adapter", tmp_path / "m", dtype="f32")["report"]
    assert row["max_abs_diff"] < 1e-3
    with pytest.raises(RequestError, match=r"--to gguf-lora can't hold a Dora layer"):
        exported(tmp_path / "adapter", tmp_path / "in" / "a", "gguf-lora")
    assert list((tmp_path / "in").iterdir()) == []


@pytest.mark.parametrize("family", ["gpt2", "mixtral"])
def test_unknown_architectures_are_refused_before_weights_are_read(tmp_path, family):
    model = tiny.CAUSAL_LMS[family]()
    save_model(tmp_path / "model", model)
    base = type(model).from_pretrained(tmp_path / "model")
    save_adapter(attached(base), tmp_path / "adapter")
    (tmp_path / "model" / "model.safetensors").unlink()
    for to in ("gguf", "gguf-lora"):
        with pytest.raises(RequestError, match=rf"--to {to} can't hold a model of type '{family}'; it can hold llama"):
            exported(tmp_path / "adapter", tmp_path / "m", to)


def test_a_tokenizer_that_can_not_be_named_is_refused(tmp_path):
    save_model(tmp_path / "model", tiny.llama())
    save_adapter(attached(type(tiny.llama()).from_pretrained(tmp_path / "model")), tmp_path / "adapter")
    with pytest.raises(RequestError, match=r"cuts text in a way \(bytes\) that --to gguf can't name"):
        exported(tmp_path / "adapter", tmp_path / "m")
    exported(tmp_path / "adapter", tmp_path / "a", "gguf-lora")
