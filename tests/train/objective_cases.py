"""For each objective a tiny model and rows: a line here puts an objective under every test of exactness."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import BertForSequenceClassification, BertForTokenClassification, PreTrainedModel

from tests import tiny
from tests.train.rows import words

Row = dict[str, Any]


@dataclass(frozen=True)
class Case:
    """`row` makes a row of a word."""

    model: Callable[[], PreTrainedModel]
    row: Callable[[str], Row]
    chat_template: str | None = tiny.CHATML

    def write_rows(self, path: Path, count: int, seed: int = 0) -> Path:
        path.write_text("".join(json.dumps(self.row(word)) + "\n" for word in words(count, seed)))
        return path

    def save_model(self, folder: Path) -> Path:
        self.model().save_pretrained(folder)
        tiny.tiny_tokenizer(self.chat_template).save_pretrained(folder)
        return folder


def _reversed(word: str) -> Row:
    return {"prompt": word, "completion": word[::-1]}


def _preferred(word: str) -> Row:
    return {"prompt": word, "chosen": word.upper(), "rejected": word[::-1]}


def _encoder(head: type[PreTrainedModel]) -> Callable[[], PreTrainedModel]:
    """A tiny BERT with this head, for two labels."""

    def build() -> PreTrainedModel:
        torch.manual_seed(0)
        return head(tiny.bert().config).eval()  # type: ignore[call-arg]

    return build


def _tagged(word: str) -> Row:
    return {"words": [word, word[::-1]], "tags": ["X" if "a" in word else "Y", "X" if len(word) > 6 else "Y"]}


def _pair(word: str) -> Row:
    return {"anchor": word, "positive": word[::-1], "negatives": [word[2:] + "z"]}


CASES: dict[str, Case] = {
    "sft": Case(tiny.llama, _reversed),
    "text": Case(tiny.llama, lambda word: {"text": f"{word} {word[::-1]}"}),
    "dpo": Case(tiny.llama, _preferred),
    "seq2seq": Case(tiny.t5, _reversed, chat_template=None),
    "classification": Case(
        _encoder(BertForSequenceClassification), lambda word: {"text": word, "label": "a" if "a" in word else "none"}
    ),
    "token-classification": Case(_encoder(BertForTokenClassification), _tagged),
    "embedding": Case(tiny.bert, _pair),
}
