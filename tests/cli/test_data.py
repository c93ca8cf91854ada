from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml

from rankwise.cli.main import main
from tests import tiny
from tests.data.builders import FIXTURES, messages, write_rows

FIELDS = ("rows", "tokens", "trained_tokens", "truncated", "duplicates", "leaks", "problems", "examples")


@pytest.fixture
def model(tmp_path: Path) -> str:
    """A folder that holds a tokenizer and nothing else: a preview needs no weights."""
    folder = tmp_path / "model"
    tiny.tiny_tokenizer().save_pretrained(folder)
    (folder / "config.json").write_text(json.dumps({"model_type": "llama"}))
    return str(folder)


def run_file(folder: Path, model: str, train: object, **data: object) -> str:
    path = folder / "run.yaml"
    path.write_text(yaml.safe_dump({"model": {"name": model}, "data": {"train": train, **data}}))
    return str(path)


def test_document(tmp_path, model, capsys):
    write_rows(tmp_path / "train.jsonl", [messages("Hi", "Yo"), messages("Hm", "Oh"), messages("Hm", "Oh")])
    write_rows(tmp_path / "valid.jsonl", [messages("Hi", "Yo")])
    path = run_file(tmp_path, model, "train.jsonl", valid="valid.jsonl")
    assert main(["data", "preview", path, "--rows", "1", "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert [document[field] for field in FIELDS[:6]] == [3, document["tokens"], 9, 0, 1, 1]
    (example,) = document["examples"]
    ((start, end),) = example["trained_spans"]
    assert example["text"][start:end] == "Yo<|im_end|>"


def test_strict_makes_warnings_fail(tmp_path, model, capsys):
    write_rows(tmp_path / "train.jsonl", [messages("Hi", "Yo"), messages("Hi", "Yo")])
    path = run_file(tmp_path, model, "train.jsonl")
    assert main(["data", "preview", path]) == 0
    assert "warning: train: 1 row equal to an earlier row" in capsys.readouterr().out
    assert main(["data", "preview", path, "--strict", "--json"]) == 1
    captured = capsys.readouterr()
    assert json.loads(captured.out)["error"]["code"] == 1
    assert captured.err.strip().splitlines()[-1].startswith("rankwise: error: train: 1 row equal")


def test_bad_rows_are_listed_and_fail(tmp_path, model, capsys):
    broken = str(FIXTURES / "broken" / "alpaca.jsonl")
    path = run_file(tmp_path, model, broken)
    assert main(["data", "preview", path, "--json"]) == 2
    document = json.loads(capsys.readouterr().out)
    assert [(item["file"], item["line"]) for item in document["problems"]] == [(broken, n) for n in (7, 9, 11, 13, 15)]
    assert all(field in document for field in FIELDS)
    assert document["error"]["code"] == 2
    assert main(["data", "preview", path]) == 2
    captured = capsys.readouterr()
    assert "⟦" in captured.out
    assert captured.out.count("problem: ") == 5
    assert "5 rows can't be used" in captured.err


def test_overrides_and_missing_files(tmp_path, model, capsys):
    path = run_file(tmp_path, model, "none.jsonl")
    assert main(["data", "preview", path, "--json"]) == 2
    assert "does not exist" in json.loads(capsys.readouterr().out)["error"]["message"]
    good = write_rows(tmp_path / "good.jsonl", [messages("Hi", "Hello")])
    assert main(["data", "preview", path, f"data.train={good}", "data.max_length=24", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["truncated"] == 1


def test_rows_that_the_objective_does_not_train_on_are_a_warning(tmp_path, model, capsys):
    write_rows(tmp_path / "train.jsonl", [{"text": "a quiet day"}])
    path = run_file(tmp_path, model, "train.jsonl")
    assert main(["data", "preview", path, "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert document["rows"] == 1 and document["format"] == "text"
    (warning,) = document["warnings"]
    assert "train.objective: sft trains on answers, data.train holds whole texts" in warning
    assert main(["data", "preview", path, "train.objective=text", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["warnings"] == []
    assert main(["data", "preview", path, "--strict"]) == 1


def test_an_encoder_is_refused(tmp_path, model, capsys):
    (Path(model) / "config.json").write_text(json.dumps({"model_type": "bert"}))
    write_rows(tmp_path / "train.jsonl", [messages("Hi", "Yo")])
    assert main(["data", "preview", run_file(tmp_path, model, "train.jsonl"), "--json"]) == 2
    assert "is an encoder" in json.loads(capsys.readouterr().out)["error"]["message"]


def test_skipped_rows_are_said_and_fail_all_the_same(tmp_path, model, capsys):
    write_rows(tmp_path / "train.jsonl", [messages("Hi", "Yo"), {"messages": 3}])
    path = run_file(tmp_path, model, "train.jsonl", on_bad_row="skip")
    assert main(["data", "preview", path, "--json"]) == 2
    document = json.loads(capsys.readouterr().out)
    assert document["rows"] == 1
    assert [item["line"] for item in document["problems"]] == [2]
    (warning,) = document["warnings"]
    assert warning.startswith("train: 1 row left out because of data.on_bad_row=skip, the first ")


def test_any_columns_of_any_file(tmp_path, model, capsys):
    (tmp_path / "train.csv").write_text('question,answer\n"What, then?",Hi\n')
    path = run_file(tmp_path, model, "train.csv", columns={"prompt": "{question} Say.", "completion": "answer"})
    assert main(["data", "preview", path, "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert "What, then? Say." in document["examples"][0]["text"]
    assert document["why"].endswith("; CSV)")
    assert main(["data", "preview", path, "data.columns.completion=anser", "--json"]) == 2
    message = json.loads(capsys.readouterr().out)["error"]["message"]
    assert "did you mean 'answer'" in message
    for wrong in ("data.columns.completion={answer!r}", "data.on_bad_row=drop"):
        assert main(["data", "preview", path, wrong]) == 2


def test_html_page(tmp_path, model, capsys):
    write_rows(tmp_path / "train.jsonl", [messages("Hi", "Yo"), messages("Hm", "Oh")])
    path, page = run_file(tmp_path, model, "train.jsonl"), tmp_path / "page.html"
    assert main(["data", "preview", path, "--html", str(page), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["page"] == str(page)
    assert page.read_text().startswith("<!doctype html>") and "<mark>Yo" in page.read_text()
    assert main(["data", "preview", path]) == 0
    assert "micro batches are packed: 100.0% of their positions are tokens" in capsys.readouterr().out
    for wrong in (tmp_path, page / "inside.html"):
        assert main(["data", "preview", path, "--html", str(wrong), "--json"]) == 2
        assert str(wrong) in json.loads(capsys.readouterr().out)["error"]["message"]
