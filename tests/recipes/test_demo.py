from __future__ import annotations

import json
from pathlib import Path

import pytest

from rankwise.cli.demo import show, verdict
from rankwise.errors import RequestError
from rankwise.recipes.demo import PLANS, DemoPlan, demo, demo_run, free_output
from rankwise.recipes.output import RunFolder
from rankwise.recipes.run import read_run
from rankwise.recipes.target import find_target
from tests import tiny
from tests.recipes.trained import save_model

TINY = DemoPlan(
    steps=4, batch_size=4, micro_batch_size=4, r=2, evaluate_every=None, test_rows=7, max_length=400,
    max_new_tokens=5, eval_batch_size=4,
)  # fmt: skip


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    root = tmp_path_factory.mktemp("demo")
    model = tiny.llama(initializer_range=0.2, max_position_embeddings=1024)
    return demo(TINY, str(root / "out"), save_model(root / "model", model), "cpu", progress=False)


def test_the_document(done):
    assert [row["target"] for row in done["results"]] == ["copy", "base", "adapter", "merged"]
    copy, *models = done["results"]
    figures = ["chrf", "bleu", "rouge_l", "exact_match"]
    assert list(copy) == ["target", *figures]
    assert all(list(row) == ["target", "loss", "perplexity", *figures] for row in models)
    assert models[1]["loss"] < models[0]["loss"]
    assert models[2]["loss"] == pytest.approx(models[1]["loss"], rel=0.02)
    assert copy["chrf"] > 40, "verses resemble each other in both Englishes"
    assert done["certificate"]["verdict"] == "pass" and done["rows"] == 7
    assert done["train"]["steps"] == 4


def test_the_output_folder(done):
    folder = Path(done["output"])
    names = {path.name for path in folder.iterdir()}
    assert {"adapter", "merged", "run.yaml", "metrics.jsonl", "summary.json", "loss.png", "demo.json"} <= names
    assert (folder / "loss.png").read_bytes()[:4] == b"\x89PNG"
    assert json.loads((folder / "demo.json").read_text()) == json.loads(json.dumps(done))
    assert (folder / "merged" / "merge_certificate.json").is_file()
    assert find_target(str(folder)).kind == "run"


def test_six_samples_spread_over_the_rows(done):
    assert len(done["samples"]) == 6
    assert list(done["samples"][0]) == ["input", "reference", "base", "adapter", "merged"]
    assert not any(sample["input"].startswith("Rewrite") for sample in done["samples"])
    assert len({sample["reference"] for sample in done["samples"]}) == 6


def test_where_the_time_went(done):
    assert list(done["time_s"]) == [
        "get the model", "train", "load the adapter", "evaluate base", "evaluate adapter", "merge and certify",
        "evaluate merged", "draw the loss curve",
    ]  # fmt: skip
    assert all(seconds >= 0 for seconds in done["time_s"].values())


def test_what_people_see(done, capsys):
    show({**done, "samples": [{**done["samples"][0], "base": "[bold]x[/nonsense]" + "y" * 900}]})
    text = capsys.readouterr().out
    for expected in (
        "copy",
        "merged",
        "BLEU",
        "ROUGE-L",
        "where the time went",
        "loss curve",
        "Against copying the input",
    ):
        assert expected in text
    assert "[bold]x" in text.replace("\n", "") and "y" * 400 not in text


def test_the_sentence():
    rows = [
        {"target": "copy", "bleu": 38.0, "chrf": 62.0},
        {"target": "base", "bleu": 16.0, "chrf": 32.0, "loss": 1.6},
        {"target": "adapter", "bleu": 50.0, "chrf": 67.5, "loss": 1.0},
    ]
    text = verdict(rows)
    assert "38% below" in text and "BLEU +12.0, chrF +5.5" in text and "BLEU +34.0, chrF +35.5" in text


def test_the_output_is_fresh(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert free_output(None) == tmp_path / "runs" / "demo"
    (tmp_path / "runs" / "demo").mkdir(parents=True)
    (tmp_path / "runs" / "demo-2").mkdir()
    assert free_output(None) == tmp_path / "runs" / "demo-3"
    with pytest.raises(RequestError, match="output 'runs/demo' exists; choose another folder"):
        free_output("runs/demo")


@pytest.mark.parametrize("name", sorted(PLANS))
def test_plans_are_runs(name, tmp_path):
    from rankwise.models.config import ModelConfig
    from rankwise.train.precision import Precision

    run = demo_run(PLANS[name], tmp_path / "out", ModelConfig(), Precision("fp32", "test"))
    assert run.train.steps == PLANS[name].steps and run.data.train.endswith("demo_data/train.jsonl")
    assert read_run(run) == run
    assert RunFolder(tmp_path / "out").path == Path(str(run.output))
