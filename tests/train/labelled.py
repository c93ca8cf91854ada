"""Small rows of each kind with labels, and the objectives that train on them."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

from rankwise.data.config import DataConfig
from rankwise.data.example import Example
from rankwise.data.labels import find_labels
from rankwise.data.loader import load_examples
from rankwise.train.needs import NEEDS
from tests import tiny

WORDS = ("good", "bad", "film", "the", "ada", "smile", "so", "it", "is", "cat")


def _words(draw: random.Random) -> list[str]:
    return [draw.choice(WORDS) for _ in range(draw.randint(2, 8))]


def _label(draw: random.Random) -> dict[str, Any]:
    words = _words(draw)
    return {"text": " ".join(words), "label": "positive" if words.count("good") > words.count("bad") else "negative"}


def _labels(draw: random.Random) -> dict[str, Any]:
    words = _words(draw)
    return {"text": " ".join(words), "labels": [name for name in ("good", "bad", "film") if name in words]}


def _tags(draw: random.Random) -> dict[str, Any]:
    words = _words(draw)
    return {"words": words, "tags": ["B-PER" if word == "ada" else "O" for word in words]}


def _pairs(draw: random.Random) -> dict[str, Any]:
    words = _words(draw)
    row = {"anchor": " ".join(words), "positive": " ".join(reversed(words)) + " ."}
    return row | ({"negatives": [" ".join(_words(draw))]} if draw.random() < 0.5 else {})


KINDS = {"label": _label, "labels": _labels, "tags": _tags, "pairs": _pairs}
OBJECTIVE = {
    "label": "classification", "labels": "classification", "tags": "token-classification", "pairs": "embedding",
}  # fmt: skip
"""Of each kind of row."""


def rows(kind: str, count: int, seed: int = 0) -> list[dict[str, Any]]:
    draw = random.Random(seed)
    return [KINDS[kind](draw) for _ in range(count)]


def write(path: Path, documents: list[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(document) + "\n" for document in documents))
    return str(path)


def examples(path: Path, kind: str, count: int = 8) -> list[Example]:
    """Rows of a kind as examples, for `tiny.word_tokenizer`."""
    file = write(path.with_suffix(".jsonl"), rows(kind, count))
    layout = NEEDS[OBJECTIVE[kind]].layout
    config = DataConfig(train=file, packing=False, cache="off")
    labels = find_labels(config)
    return list(load_examples(file, tiny.word_tokenizer(), config, layout, labels=labels).examples)
