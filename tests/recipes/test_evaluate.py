from __future__ import annotations

import math
from pathlib import Path

import pytest

from rankwise.attach.inject import disabled, is_attached
from rankwise.errors import RequestError
from rankwise.recipes import evaluate as room
from rankwise.recipes.evaluate import EvaluateConfig, evaluate
from tests.recipes.trained import figures, rows, trained_run, write_rows

ALL = ["loss", "perplexity", "chrf", "bleu", "rouge_l", "exact_match"]


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    return trained_run(tmp_path_factory.mktemp("evaluate"))


def config(**settings) -> EvaluateConfig:
    return EvaluateConfig(**{"max_new_tokens": 6, "precision": "fp32", **settings})


def loss_only(**settings) -> EvaluateConfig:
    return config(**{"metrics": ("loss",), "max_new_tokens": None, **settings})


def test_adapter_beside_its_base(run):
    result = evaluate(str(run), config(), device="cpu")
    assert [list(row) for row in result["results"]] == [["target", *ALL]] * 2
    base, adapter = result["results"]
    assert (base["target"], adapter["target"]) == ("base", "adapter")
    assert adapter["loss"] < base["loss"] - 0.5
    for row in (base, adapter):
        assert row["perplexity"] == pytest.approx(math.exp(row["loss"]))
        assert 0 <= row["exact_match"] <= 1 and all(0 <= row[name] <= 100 for name in ("chrf", "bleu", "rouge_l"))
    assert (result["rows"], result["data"]) == (5, str(run.parent / "valid.jsonl"))
    assert (result["target"], result["kind"], result["precision"]) == (str(run), "run", "fp32")


def test_the_base_row_is_the_base_models_own(run):
    """One model in memory, adapter switched off, equals the base loaded alone."""
    data = str(run.parent / "valid.jsonl")
    both = evaluate(str(run), config(data=data), device="cpu")["results"]
    alone = evaluate(str(run.parent / "model"), config(data=data), device="cpu")["results"]
    assert len(alone) == 1 and alone[0]["target"] == str(run.parent / "model")
    assert figures(alone[0]) == pytest.approx(figures(both[0]), rel=1e-5)


def test_only_one_model_is_loaded(run, monkeypatch):
    loads = []
    opened = room.open_target
    monkeypatch.setattr(room, "open_target", lambda *given: loads.append(opened(*given)) or loads[-1])
    evaluate(str(run), loss_only(), device="cpu")
    assert len(loads) == 1 and is_attached(loads[0].model)
    with disabled(loads[0].model):
        pass


def test_batch_size_changes_nothing(run):
    many, one = (evaluate(str(run), config(batch_size=size), device="cpu")["results"] for size in (16, 1))
    for a, b in zip(many, one, strict=True):
        assert figures(a) == pytest.approx(figures(b), rel=1e-4)


def test_only_what_was_asked_for(run, monkeypatch):
    result = evaluate(str(run), loss_only(rows=2), device="cpu")
    assert [list(row) for row in result["results"]] == [["target", "loss"]] * 2 and result["rows"] == 2
    monkeypatch.setattr(room, "measure_loss", None)
    result = evaluate(str(run), config(metrics=("bleu", "chrf"), copy=True), device="cpu")
    assert [list(row) for row in result["results"]] == [["target", "chrf", "bleu"]] * 3


def test_copy_repeats_the_input_without_its_instruction(run, tmp_path):
    documents = [{**row, "completion": row["prompt"].removeprefix("Capitals: ")} for row in rows(4)]
    data = write_rows(tmp_path / "same.jsonl", documents)
    copy = evaluate(str(run), config(data=data, copy=True), device="cpu")["results"][0]
    assert copy["target"] == "copy" and "loss" not in copy
    assert (copy["exact_match"], copy["chrf"]) == (1.0, pytest.approx(100.0))


def test_texts_have_a_loss_and_no_answers(run, tmp_path):
    data = write_rows(tmp_path / "texts.jsonl", [{"text": "a quiet day by the sea"}, {"text": "rain"}])
    model = str(run.parent / "model")
    result = evaluate(model, loss_only(data=data, metrics=None), device="cpu")
    assert list(result["results"][0]) == ["target", "loss", "perplexity"]
    with pytest.raises(
        RequestError, match=r"--max-new-tokens 6 has no effect: no answers are generated for loss, perplexity"
    ):
        evaluate(model, config(data=data), device="cpu")
    with pytest.raises(RequestError, match=r"metric 'bleu' compares answers, and .*texts.jsonl:1 is text without one"):
        evaluate(model, config(data=data, metrics=("bleu",)), device="cpu")


def test_bad_requests(run, tmp_path):
    model = str(run.parent / "model")
    with pytest.raises(RequestError, match="has no test or valid file of its own; give one with --data"):
        evaluate(model, config(), device="cpu")
    with pytest.raises(RequestError, match="unknown metric 'rogue_l'; did you mean 'rouge_l'"):
        evaluate(model, config(metrics=("rogue_l",)), device="cpu")
    with pytest.raises(RequestError, match=r"data file .* does not exist"):
        evaluate(str(run), config(data=str(run.parent / "vlid.jsonl")), device="cpu")
    with pytest.raises(
        RequestError, match="--max-new-tokens 6 has no effect: no answers are generated for loss; leave it out"
    ):
        evaluate(str(run), config(metrics=("loss",)), device="cpu")
    with pytest.raises(RequestError, match="--copy has no effect"):
        evaluate(str(run), loss_only(copy=True), device="cpu")


def test_template_and_length_in_place_of_the_runs(run):
    plain = evaluate(str(run), loss_only(chat_template="plain"), device="cpu")
    own = evaluate(str(run), loss_only(), device="cpu")
    assert plain["results"][1]["loss"] != pytest.approx(own["results"][1]["loss"], rel=1e-3)
    assert evaluate(str(run), loss_only(max_length=45), device="cpu")["truncated"] > 0
    with pytest.raises(RequestError, match=r"data.chat_template can't be 'plane'; did you mean 'plain'"):
        evaluate(str(run), config(chat_template="plane"), device="cpu")


def test_rows_that_were_cut_are_counted(run, tmp_path, capsys):
    long = [{"prompt": "Capitals: a", "completion": "A" * 700}, *rows(2)]
    result = evaluate(str(run), loss_only(data=write_rows(tmp_path / "d.jsonl", long)), device="cpu")
    assert result["truncated"] == 1 and len(result["warnings"]) == 1
    assert capsys.readouterr().err == f"warning: {result['warnings'][0]}\n"
