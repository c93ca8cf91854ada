"""`--to onnx` of encoder-decoder models: two graphs, their caches, one adapter file for both; the commands."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from rankwise.cli.main import main
from rankwise.errors import RequestError, WorkError
from rankwise.export.certificate import answer_logits
from rankwise.export.onnx_folder import check_files, read_manifest
from rankwise.export.onnx_runtime import Decoding, OnnxModel
from rankwise.export.onnx_seq2seq import OnnxSeq2Seq
from rankwise.export.same_text import same_text
from rankwise.recipes.export import export
from rankwise.recipes.finetune import train
from rankwise.recipes.generate import open_export, open_session
from rankwise.recipes.target import find_target, open_target
from tests import tiny
from tests.recipes.trained import rows, run_document, write_rows

pytestmark = pytest.mark.slow  # tracing two graphs takes half a minute; tests/export/test_onnx_seq2seq.py has the rest

QUESTION, ANSWER = [tiny.token_ids(1, length, seed)[0].tolist() for seed, length in enumerate((9, 6))]


def trained(root: Path, model, name: str = "run", **adapter) -> Path:
    """A run on `model`; its base is `root/model`."""
    if not (root / "model").exists():
        model.save_pretrained(root / "model")
        tiny.tiny_tokenizer(chat_template=None).save_pretrained(root / "model")
    document = run_document(root, str(root / "model"), objective="seq2seq", steps=6)
    document["data"]["train"] = write_rows(root / "train.jsonl", rows(8))
    document["adapter"] = {"r": 4, "lora_alpha": 8, **adapter}
    train({**document, "output": str(root / name)}, quiet=True)
    return root / name


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    """A tied T5 with two adapters, `run` on both sides and `other` on the decoder alone, on one export."""
    root = tmp_path_factory.mktemp("seq2seq")
    run = trained(root, tiny.t5(num_layers=1), target_modules=["v", "wi"])
    trained(root, None, "other", r=2, target_modules=["q", "wo"], exclude_modules=r"encoder\..*")
    export(str(run), str(root / "onnx"), "onnx", {"adapters": [f"other={root / 'other'}"]}, device="cpu")
    return root


def test_the_folder_and_its_report(root):
    folder = root / "onnx"
    graphs = {file.name for file in folder.glob("*.onnx*")}
    assert graphs == {"encoder.onnx", "encoder.onnx.data", "decoder.onnx", "decoder.onnx.data"}
    report = json.loads((folder / "export_report.json").read_text())["report"]
    assert [row["artifact"] for row in report] == [
        "encoder.onnx, decoder.onnx",
        "adapters/run.onnx_adapter",
        "adapters/other.onnx_adapter",
    ]
    for row in report:
        assert row["ran"] and row["max_abs_diff"] <= row["bounds"]["max_abs_diff"] == 1e-3
        assert row["by_token_max_abs_diff"] < 1e-3 and row["same_text"] == 1.0
    assert report[0]["speedup"] > 0
    assert report[0]["bytes"] == sum((folder / name).stat().st_size for name in graphs)
    check_files(folder, read_manifest(folder), whole=True)
    with pytest.raises(RequestError, match=r"is a seq2seq-lm export, which has an encoder; open it as OnnxSeq2Seq"):
        OnnxModel(folder)


@pytest.mark.parametrize("name", ["run", "other"])
def test_each_adapter_is_its_run_in_torch(root, name):
    model = OnnxSeq2Seq(root / "onnx", 1)
    opened = open_target(find_target(str(root / name), device="cpu"), "fp32")
    wanted = answer_logits(opened.model, QUESTION, ANSWER).numpy()
    for by_token in (False, True):
        assert np.abs(model.logits(QUESTION, ANSWER, name, by_token) - wanted).max() < 1e-4
    assert np.abs(model.logits(QUESTION, ANSWER) - wanted).max() > 1e-2, "the base is another"


def test_the_adapters_tensors_are_inputs_of_the_graph_that_reads_them(root):
    """A file with all of them is taken by both: in each graph some are inputs that no node reads."""
    model = OnnxSeq2Seq(root / "onnx", 1)
    inputs = [{node.name for node in one.get_overridable_initializers()} for one in (model.encoder, model.decoder)]
    assert inputs[0] == inputs[1] and any(name.startswith("encoder.") for name in inputs[0])
    ids = np.array([QUESTION], np.int64)
    caches = [model.encode(ids, np.ones_like(ids), name) for name in (None, "other", "run")]
    changed = [max(np.abs(cache[key] - caches[0][key]).max(initial=0) for key in cache) for cache in caches[1:]]
    assert changed[0] == 0.0 and changed[1] > 1e-3, "`other` leaves the encoder as it is"


def test_answers_are_torchs_in_batches_too(root, capsys):
    prompts = ["Capitals: oak pine", "Capitals: elm", "hello"]
    ours = open_export(str(root / "onnx"), "run").answer_all(prompts, None, 12, 2)
    session = open_session(str(root / "run"), device="cpu", precision="fp32")
    assert ours == session.answer_all(prompts, None, 12, 1)
    free = OnnxSeq2Seq(root / "onnx", 1).generate([QUESTION, ANSWER], Decoding(6, (), 259), "run")
    assert [len(answer) for answer in free] == [6, 6]
    assert same_text(session.opened.model, [QUESTION, ANSWER], free) == 1.0
    line = ["generate", str(root / "onnx"), "--prompt", prompts[0], "--adapter", "run", "--max-new-tokens", "12"]
    assert main([*line, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["results"][0]["answer"] == ours[0]


@pytest.mark.parametrize("family", ["t5", "mt5", "bart"])
def test_merged_and_fewer_bits(family, tmp_path):
    """DoRA is folded in; 8-bit weights keep the adapters; past its bound nothing is kept."""
    run = trained(tmp_path, getattr(tiny, family)())
    document = export(str(run), str(tmp_path / "q"), "onnx", {"int8": "weights", "max_kl": 0.5}, device="cpu")
    plain, adapted = document["report"]
    assert plain["kl"] < 0.5 and adapted["by_token_kl"] < 0.5 and not list((tmp_path / "q").glob(".*"))
    model = OnnxSeq2Seq(tmp_path / "q", 1)
    opened = open_target(find_target(str(run), device="cpu"), "fp32")
    wanted = answer_logits(opened.model, QUESTION, ANSWER)
    drift = np.abs(model.logits(QUESTION, ANSWER, "run") - wanted.numpy()).mean()
    assert 1e-6 < drift < 0.5 * np.abs(model.logits(QUESTION, ANSWER) - wanted.numpy()).mean()
    with pytest.raises(
        WorkError, match=r"above --max-kl 1e-12; it loses most by (\w+ \(without it [\d.e-]+\)(, )?){3};"
    ):
        export(str(run), str(tmp_path / "in" / "q"), "onnx", {"int8": "weights", "max_kl": 1e-12}, device="cpu")
    assert list((tmp_path / "in").iterdir()) == []
    dora = trained(tmp_path, None, "dora", use_dora=True)
    [row] = export(str(dora), str(tmp_path / "m"), "onnx", {"merged": True}, device="cpu")["report"]
    assert row["max_abs_diff"] < 1e-3 and "folded in" in row["note"]


def test_full_int8_leaves_out_what_it_has_to(root, tmp_path):
    loose = export(str(root / "run"), str(tmp_path / "a"), "onnx", {"int8": "full", "max_kl": 1.0}, device="cpu")
    assert loose["report"][0]["left_out"] == []
    bound = 0.8 * max(row[name] for row in loose["report"] for name in ("kl", "by_token_kl"))
    tight = export(str(root / "run"), str(tmp_path / "b"), "onnx", {"int8": "full", "max_kl": bound}, device="cpu")
    assert tight["report"][0]["left_out"]
    assert all(row[name] <= bound for row in tight["report"] for name in ("kl", "by_token_kl"))
