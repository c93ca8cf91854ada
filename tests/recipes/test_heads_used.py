"""What was trained with a head, in use: evaluated beside its base, merged, inspected; and what it can't do."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

import rankwise as rw
from rankwise.cli.main import main
from rankwise.errors import RequestError
from rankwise.models.labels import Labels
from rankwise.recipes.evaluate import EvaluateConfig, evaluate
from tests import tiny
from tests.processes import Processes
from tests.recipes.trained import headed_run
from tests.train.labelled import KINDS, write

METRICS = {"pairs": {"loss", "recall_at_1", "mrr"}}
HEADED = {"loss", "accuracy", "f1"}


@pytest.fixture(scope="module", params=KINDS)
def kind(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="module")
def run(kind: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that has learned something; its base, its rows and its output in one folder."""
    return headed_run(tmp_path_factory.mktemp(kind), kind, 40, steps=30)


def told(capsys: pytest.CaptureFixture[str], *words: Any) -> tuple[int, dict[str, Any]]:
    code = main([str(word) for word in words] + ["--json"])
    return code, json.loads(capsys.readouterr().out)


def test_evaluated_beside_its_base(kind: str, run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, document = told(capsys, "evaluate", run, "--precision", "fp32", "--device", "cpu")
    assert code == 0 and document["kind"] == "run" and document["rows"] == 9
    base, adapter = document["results"]
    assert (base["target"], adapter["target"]) == ("base", "adapter")
    assert set(adapter) == {"target", *METRICS.get(kind, HEADED)}
    assert ("untrained_head" in base) == (kind != "pairs")
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert adapter["loss"] == pytest.approx(lines[-1]["valid_loss"], rel=1e-5) and adapter["loss"] != base["loss"]
    for name in ("accuracy", "recall_at_1", "mrr"):
        if name in adapter:
            assert adapter[name] == pytest.approx(lines[-1][f"valid_{name}"])
    again = told(capsys, "evaluate", run, "--precision", "fp32", "--device", "cpu")[1]
    assert again == document  # an untrained head is the same each time


def evaluated(run: str, sharding: str = "none") -> dict[str, Any] | str:
    """A case for several processes: batches of two rows, so that shares are uneven."""
    try:
        return evaluate(run, EvaluateConfig(precision="fp32", batch_size=2, sharding=sharding), device="cpu")
    except RequestError as error:
        return error.message


@pytest.mark.parametrize("sharding", ["none", "full"])
def test_two_processes_see_what_one_sees(kind: str, run: Path, two_processes: Processes, sharding: str) -> None:
    first, second = two_processes(evaluated, str(run), sharding)
    assert first == second
    if kind == "pairs" and sharding == "full":
        assert isinstance(first, str) and "sharding: full does not work with the objective embedding" in first
        return
    alone = evaluated(str(run))
    assert isinstance(first, dict) and isinstance(alone, dict) and first["rows"] == alone["rows"] == 9
    for one, other in zip(first["results"], alone["results"], strict=True):
        assert one.pop("target") == other.pop("target") and one == pytest.approx(other, abs=1e-5)


def test_a_copied_adapter_knows_its_head(
    kind: str, run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(run / "adapter", tmp_path / "adapter")
    words = ("--data", run.parent / "valid.jsonl", "--precision", "fp32", "--device", "cpu", "--max-length", 32)
    document = told(capsys, "evaluate", tmp_path / "adapter", *words)[1]
    whole = told(capsys, "evaluate", run, "--precision", "fp32", "--device", "cpu")[1]
    assert document["results"] == whole["results"]


def test_merged(kind: str, run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, document = told(capsys, "merge", run, "--out", tmp_path / "merged", "--device", "cpu")
    assert code == 0 and document["certificate"]["kl"] < 1e-8 < document["certificate"]["adapter_effect_kl"]
    words = ("--data", run.parent / "valid.jsonl", "--precision", "fp32", "--device", "cpu", "--max-length", 32)
    merged = told(capsys, "evaluate", tmp_path / "merged", *words)[1]["results"][0]
    adapter = told(capsys, "evaluate", run, "--precision", "fp32", "--device", "cpu")[1]["results"][1]
    assert {k: v for k, v in merged.items() if k != "target"} == pytest.approx(
        {k: v for k, v in adapter.items() if k != "target"}, rel=1e-4
    )
    if kind == "label":
        model = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "merged")
        assert model.config.id2label == {0: "negative", 1: "positive"}


def test_inspected(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, document = told(capsys, "inspect", run)
    summary = json.loads((run / "summary.json").read_text())
    assert code == 0 and document["trainable_parameters"] == summary["trainable_parameters"]


def test_previewed(kind: str, run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, document = told(capsys, "data", "preview", run / "run.yaml")
    assert code == 0 and document["rows"] == 40 and bool(document.get("labels")) == (kind != "pairs")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("generate", "RUN", "--prompt", "hi"), "and writes no answers; measure it with `rankwise evaluate"),
        (("evaluate", "RUN", "--metrics", "bleu"), "metric 'bleu' is not one of"),
        (("evaluate", "RUN", "--max-new-tokens", "3"), "--max-new-tokens has no effect"),
        (("evaluate", "RUN", "--copy"), "--copy has no effect"),
        (("evaluate", "RUN", "--data", "SFT"), "the file holds answers"),
    ],
)
def test_refused(
    run: Path, words: tuple[str, ...], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sft = write(tmp_path / "sft.jsonl", [{"prompt": "a", "completion": "b"}])
    code, document = told(capsys, *({"RUN": str(run), "SFT": sft}.get(word, word) for word in words))
    assert code == 2 and message in document["error"]["message"]


def test_pefts_classifier_has_numbers_for_names(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A folder without head.json: labels 0, 1, ... as its head has rows."""
    tiny.encoder().save_pretrained(tmp_path / "base")
    tiny.word_tokenizer().save_pretrained(tmp_path / "base")
    torch.manual_seed(0)
    names = Labels(("0", "1", "2"))
    model = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "base", **names.to_config())
    rw.attach(model, rw.LoraConfig(r=2, task_type="SEQ_CLS", base_model_name_or_path=str(tmp_path / "base")))
    rw.save_adapter(model, tmp_path / "adapter")
    data = write(tmp_path / "rows.jsonl", [{"text": "the film", "label": 2}, {"text": "the cat", "label": 0}])
    code, document = told(capsys, "evaluate", tmp_path / "adapter", "--data", data, "--device", "cpu")
    assert code == 0 and document["results"][1]["accuracy"] in (0, 0.5, 1)
    bad = write(tmp_path / "bad.jsonl", [{"text": "the film", "label": "good"}])
    code, document = told(capsys, "evaluate", tmp_path / "adapter", "--data", bad, "--device", "cpu")
    assert code == 2 and "'good' is no label of the training data; known: 0, 1, 2" in document["error"]["message"]
