"""The runtime of ONNX exports: decoding, sampling, one adapter at a time, files that don't belong; the commands."""

from __future__ import annotations

import json
import shutil
from collections import Counter
from pathlib import Path

import numpy as np
import onnxruntime
import pytest

from rankwise.cli.main import main
from rankwise.errors import RequestError
from rankwise.export import onnx_adapter_files
from rankwise.export.onnx_folder import MANIFEST_FILE
from rankwise.export.onnx_runtime import Decoding, OnnxModel, Sampling, choose_tokens
from rankwise.recipes.export import export
from rankwise.recipes.generate import Conversation, open_export, open_session
from tests import tiny
from tests.recipes.trained import trained_run


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """An export with two names for one adapter; its run is `run` beside it."""
    root = tmp_path_factory.mktemp("runtime")
    run = trained_run(root)
    export(str(run), str(root / "onnx"), "onnx", {"adapters": [f"twin={run}"]}, device="cpu")
    return root / "onnx"


@pytest.fixture
def copied(folder, tmp_path) -> Path:
    return Path(shutil.copytree(folder, tmp_path / "onnx"))


PROMPTS = ["Capitals: oak pine", "Capitals: elm", "hello"]


def test_answers_are_torchs_in_batches_too(folder):
    ours = open_export(str(folder), "run").answer_all(PROMPTS, "Be brief.", 12, 2)
    session = open_session(str(folder.parent / "run"), device="cpu", precision="fp32")
    assert ours == session.answer_all(PROMPTS, "Be brief.", 12, 1)
    base = open_export(str(folder), "base").answer_all(PROMPTS, "Be brief.", 12, 2)
    assert base != ours
    model = open_session(str(folder.parent / "model"), device="cpu", precision="fp32")
    assert base == model.answer_all(PROMPTS, "Be brief.", 12, 1)


def test_a_stop_token_ends_an_answer(folder):
    model = OnnxModel(folder, 1)
    rows = [tiny.token_ids(1, 5, seed)[0].tolist() for seed in (1, 2)]
    free = model.generate(rows, Decoding(6, (), 259), "run")
    assert [len(answer) for answer in free] == [6, 6]
    stop = free[0][2]
    stopped = model.generate(rows, Decoding(6, (stop,), 259), "run")
    assert stopped[0] == free[0][: free[0].index(stop)]
    for name, wanted in (("an empty", [[]]), ("does not fit", [[1] * 510])):
        with pytest.raises(RequestError, match="is empty" if name == "an empty" else "into the model's 512 positions"):
            model.generate(wanted, Decoding(6, (), 259), "run")


def test_sampling_draws_from_the_distribution():
    logits = np.log(np.array([[0.5, 0.3, 0.15, 0.05]]))
    assert choose_tokens(logits, Sampling(), np.random.default_rng(0)).tolist() == [0]
    drawn = choose_tokens(np.repeat(logits, 4000, 0), Sampling(temperature=1.0), np.random.default_rng(0))
    shares = np.bincount(drawn, minlength=4) / 4000
    assert np.abs(shares - [0.5, 0.3, 0.15, 0.05]).max() < 0.03
    kept = Counter(choose_tokens(np.repeat(logits, 500, 0), Sampling(1.0, 0.75), np.random.default_rng(0)).tolist())
    assert set(kept) == {0, 1}
    cold = choose_tokens(np.repeat(logits, 500, 0), Sampling(0.05), np.random.default_rng(0))
    assert (cold == 0).mean() > 0.99


def test_a_seed_repeats_itself(folder):
    def drawn(seed: int) -> list[str]:
        return open_export(str(folder), "run", sampling={"temperature": 1.5, "seed": seed}).answer_all(
            ["a"], None, 20, 1
        )

    assert drawn(1) == drawn(1) != drawn(2)


@pytest.mark.parametrize(
    ("fields", "what"),
    [
        ({"temperature": -1.0}, "temperature must be a number from 0"),
        ({"temperature": float("nan")}, "temperature must be a number from 0"),
        ({"top_p": 0.5}, "top_p 0.5 has no effect without a temperature"),
        ({"seed": 3}, "seed 3 has no effect without a temperature"),
        ({"temperature": 1.0, "top_p": 0.0}, "top_p must be above 0"),
    ],
)
def test_sampling_that_is_none(fields, what):
    with pytest.raises(RequestError, match=what):
        Sampling(**fields)


# --- adapters ------------------------------------------------------------------------------------------------------


def test_one_adapter_at_a_time(folder):
    model = OnnxModel(folder, 1)
    with pytest.raises(RequestError, match=r"one adapter at a time, not 2 \(run, twin\)"):
        model.adapters.options(["run", "twin"])
    with pytest.raises(RequestError, match="there is no adapter 'rum'; did you mean 'run'"):
        model.adapters.options(["rum"])


def test_several_adapters_and_none_named(folder):
    with pytest.raises(RequestError, match=r"has several adapters \(run, twin\); choose one with --adapter, or 'base'"):
        open_export(str(folder))


def written_adapter(path: Path, version: int, **tensors: np.ndarray) -> Path:
    content = onnxruntime.AdapterFormat()
    content.set_adapter_version(1)
    content.set_model_version(version)
    content.set_parameters({k: onnxruntime.OrtValue.ortvalue_from_numpy(v) for k, v in tensors.items()})
    content.export_adapter(str(path))
    return path


A, B = "model.layers.0.mlp.up_proj.lora_A", "model.layers.0.mlp.up_proj.lora_B"


@pytest.mark.parametrize(
    ("tensors", "what"),
    [
        (
            {"nowhere.lora_A": np.zeros((32, 2), np.float32)},
            "holds 'nowhere.lora_A', for which this graph has no input",
        ),
        ({A: np.zeros((32, 2), np.float64), B: np.zeros((2, 48), np.float32)}, r"is tensor\(double\), the graph takes"),
        ({A: np.zeros((31, 2), np.float32), B: np.zeros((2, 48), np.float32)}, r"is \[31, 2\], the graph takes \[32,"),
        ({A: np.zeros((32, 2), np.float32), B: np.zeros((3, 48), np.float32)}, "are not of one rank"),
        ({A: np.zeros((32, 2), np.float32)}, "are not of one rank"),
        ({B: np.zeros((2, 48), np.float32)}, "are not of one rank"),
    ],
)
def test_an_adapter_that_does_not_fit_is_refused(folder, tmp_path, tensors, what):
    model = OnnxModel(folder, 1)
    file = written_adapter(tmp_path / "x.onnx_adapter", model.manifest.version, **tensors)
    with pytest.raises(RequestError, match=what):
        model.adapters.add("x", file)


def test_an_adapter_of_another_base_is_refused(folder, tmp_path):
    model = OnnxModel(folder, 1)
    good = {A: np.zeros((32, 2), np.float32), B: np.zeros((2, 48), np.float32)}
    with pytest.raises(RequestError, match=r"belongs to another base \(model version 5, this export's is \d+\)"):
        model.adapters.add("x", written_adapter(tmp_path / "x.onnx_adapter", 5, **good))
    model.adapters.add("x", written_adapter(tmp_path / "y.onnx_adapter", model.manifest.version, **good))
    row = tiny.token_ids(1, 5)[0].tolist()
    assert np.abs(model.logits(row, "x") - model.logits(row)).max() < 1e-6, "of zeros"


def test_torn_and_missing_files_are_named(copied):
    weights = copied / "model.onnx.data"
    content = weights.read_bytes()
    weights.write_bytes(content[:-1])
    with pytest.raises(RequestError, match=r"model\.onnx\.data' has \d+ bytes, \d+ were written; copy it again"):
        OnnxModel(copied, 1)
    weights.write_bytes(content)
    adapter = copied / "adapters" / "run.onnx_adapter"
    adapter.write_bytes(adapter.read_bytes()[:-5])
    with pytest.raises(RequestError, match=r"run\.onnx_adapter' is not the file that was written"):
        OnnxModel(copied, 1)
    with pytest.raises(RequestError, match=r"run\.onnx_adapter' is not the file that was written"):
        OnnxModel(copied, 1, adapters=["twin"]).adapters.options(["run"])
    (copied / "model.onnx").unlink()
    with pytest.raises(RequestError, match=r"model\.onnx' is missing; copy the whole folder"):
        OnnxModel(copied, 1)
    (copied / MANIFEST_FILE).write_text("{")
    with pytest.raises(RequestError, match=r"rankwise_onnx\.json' can't be read"):
        OnnxModel(copied, 1)


def test_the_first_use_finds_a_file_that_was_checked_while_opening(copied, monkeypatch):
    read: list[str] = []
    real = onnx_adapter_files.sha256_file
    monkeypatch.setattr(onnx_adapter_files, "sha256_file", lambda path: read.append(path.stem) or real(path))
    model = OnnxModel(copied, 1)
    assert sorted(read) == ["run", "twin"]
    for name in ("run", "twin", "run"):
        model.adapters.options([name])
    assert len(read) == 2, "nothing was read again"
    file = copied / "adapters" / "run.onnx_adapter"
    content = bytearray(file.read_bytes())
    content[-5] ^= 1
    file.write_bytes(content)
    model.adapters.forget("run")
    with pytest.raises(RequestError, match=r"run\.onnx_adapter' is not the file that was written"):
        model.adapters.options(["run"])
    assert read[2:] == ["run"]


# --- commands ------------------------------------------------------------------------------------------------------


def test_generate_and_chat(folder, capsys, monkeypatch):
    line = ["generate", str(folder), "--prompt", "Capitals: oak", "--max-new-tokens", "6", "--json"]
    assert main([*line, "--adapter", "run"]) == 0
    answer = json.loads(capsys.readouterr().out)["results"][0]["answer"]
    assert main([*line, "--adapter", "base"]) == 0
    assert json.loads(capsys.readouterr().out)["results"][0]["answer"] != answer
    talk = Conversation(open_export(str(folder), "run"), None, 6)
    assert talk.say("Capitals: oak") == answer
    talk.reset()
    talk.toggle_base()
    assert talk.say("Capitals: oak") != answer


@pytest.mark.parametrize(
    ("flags", "what"),
    [
        (["--base", "demo"], "--base has no effect"),
        (["--precision", "fp32"], "--precision has no effect"),
        (["--device", "cuda"], "an ONNX export is run on the CPU here"),
        (["--adapter", "rum"], "there is no adapter 'rum'; did you mean 'run'"),
        (["--adapter", "run", "--top-p", "0.5"], "top_p 0.5 has no effect without a temperature"),
    ],
)
def test_flags_without_effect(folder, capsys, flags, what):
    assert main(["generate", str(folder), "--prompt", "a", *flags]) == 2
    assert what in capsys.readouterr().err


def test_flags_of_an_export_elsewhere(folder, capsys):
    for flags in (["--adapter", "run"], ["--temperature", "1"]):
        assert main(["generate", str(folder.parent / "run"), "--prompt", "a", *flags]) == 2
        assert f"{flags[0]} has no effect" in capsys.readouterr().err
    assert main(["evaluate", str(folder), "--data", "x"]) == 2
    assert "is an ONNX export, which `rankwise generate` and" in capsys.readouterr().err
