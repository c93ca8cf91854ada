from __future__ import annotations

import json

import pytest

from rankwise.data.config import DataConfig
from rankwise.data.preview import preview
from tests import tiny
from tests.data.builders import FIXTURES, WRITTEN, messages, write_rows


def test_counts_and_examples(tmp_path):
    rows = [messages("Hi", "Yo"), messages("Hi", "Hello"), messages("Hi", "Yo"), messages("q", "A long answer " * 9)]
    train = write_rows(tmp_path / "train.jsonl", rows)
    valid = write_rows(tmp_path / "valid.jsonl", [messages("Hi", "Hello"), messages("Hi", "Bye")])
    test = write_rows(tmp_path / "test.jsonl", [messages("Hi", "Yo"), messages("Hi", "Yo")])
    config = DataConfig(train=train, valid=valid, test=test, max_length=80)
    document = preview(config, tiny.tiny_tokenizer(), rows=2)
    assert (document["rows"], document["truncated"], document["duplicates"], document["leaks"]) == (4, 1, 1, 3)
    assert document["problems"] == []
    assert [item["text"].count("<|im_end|>") for item in document["examples"]] == [2, 2]
    for item, answer in zip(document["examples"], ("Yo", "Hello"), strict=True):
        assert [item["text"][start:end] for start, end in item["trained_spans"]] == [f"{answer}<|im_end|>"]
    assert document["splits"]["valid"]["leaks"] == 1
    assert document["splits"]["test"]["duplicates"] == 1
    prompt = len("?user\nHi?\n?assistant\n")  # tokens: a byte, or a special token (?)
    assert document["tokens"] == sum((prompt + len("Yo?\n"), prompt + len("Hello?\n"), prompt + len("Yo?\n"), 80))
    assert document["trained_tokens"] == len("Yo?") + len("Hello?") + len("Yo?") + 80 - (prompt - 1)
    assert document["lengths"] == {"min": prompt + 4, "median": prompt + 7, "p95": 80, "max": 80}
    assert [text.split(":")[0] for text in document["warnings"]] == ["train", "train", "test", "valid", "test"]
    json.dumps(document)


@pytest.mark.parametrize("name", WRITTEN)
def test_problems_are_listed_beside_the_good_rows(name):
    path = str(FIXTURES / "broken" / f"{name}.jsonl")
    document = preview(DataConfig(train=path), tiny.tiny_tokenizer())
    assert [(problem["file"], problem["line"]) for problem in document["problems"]] == [
        (path, line) for line in (7, 9, 11, 13, 15)
    ]
    assert document["rows"] == 15
    assert len(document["examples"]) == 3


def test_a_clean_file_has_no_warnings():
    document = preview(DataConfig(train=str(FIXTURES / "messages.jsonl")), tiny.tiny_tokenizer())
    assert (document["warnings"], document["problems"], document["notes"]) == ([], [], [])


def test_a_file_without_good_rows(tmp_path):
    path = tmp_path / "bad.jsonl"
    path.write_text("nonsense\n")
    document = preview(DataConfig(train=str(path)), tiny.tiny_tokenizer())
    assert (document["rows"], document["tokens"], document["examples"], document["lengths"]) == (0, 0, [], {})
    assert [problem["line"] for problem in document["problems"]] == [1]
