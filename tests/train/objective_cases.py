"""For each objective a tiny model and rows: a line here puts an objective under every test of exactness."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

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


CASES: dict[str, Case] = {
    "sft": Case(tiny.llama, _reversed),
    "text": Case(tiny.llama, lambda word: {"text": f"{word} {word[::-1]}"}),
    "dpo": Case(tiny.llama, _preferred),
    "seq2seq": Case(tiny.t5, _reversed, chat_template=None),
}
