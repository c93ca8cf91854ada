from __future__ import annotations

import subprocess
import sys

import pytest

from rankwise.config import build
from rankwise.data.config import DataConfig, paths_of
from rankwise.errors import RequestError


def test_defaults_and_lists():
    config = build(DataConfig, {"train": ["a.jsonl", "b.jsonl"]}, "data")
    assert paths_of(config.train) == ["a.jsonl", "b.jsonl"]
    assert (config.format, config.max_length, config.packing, config.chat_template) == ("auto", 512, None, "auto")


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"format": "alpacca"}, "did you mean 'alpaca'"),
        ({"format": "preferences"}, "did you mean 'preference'"),
        ({"max_length": 1}, "data.max_length must be 2 or more, not 1"),
        ({"chat_template": "plan"}, "did you mean 'plain'"),
        ({"format": "text", "chat_template": "plain"}, "has no effect"),
        ({"train": []}, r"data.train is \[\]"),
        ({"valid": ""}, "data.valid is ''"),
    ],
)
def test_wrong_values_are_refused(settings, words):
    with pytest.raises(RequestError, match=words):
        build(DataConfig, {"train": "a.jsonl", **settings}, "data")


def test_train_is_needed():
    with pytest.raises(RequestError, match=r"data\.train"):
        build(DataConfig, {}, "data")


def test_module_does_not_import_torch():
    code = "import sys, rankwise.data.config, rankwise.data.rows; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
