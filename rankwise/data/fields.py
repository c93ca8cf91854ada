"""What the readers of rows share: turns, the fields of a JSON object, and why a row can't be used."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from rankwise.data.readers.records import type_name

__all__ = ["ASSISTANT", "SYSTEM", "TEXT", "TOOL", "TOOLS", "USER", "Call", "RowError", "Turn", "Turns",
           "filled", "optional", "string", "type_name"]  # fmt: skip

SYSTEM, USER, ASSISTANT, TEXT = "system", "user", "assistant", "text"
TOOL, TOOLS = "tool", "tools"
"""The result of a call; and the tools that may be called, their schemas as JSON, in front of all turns."""
LABEL, WORD, TAG = "label", "word", "tag"
ANCHOR, POSITIVE, NEGATIVE = "anchor", "positive", "negative"
ANSWERS, TEXTS, PREFERENCES = "answers", "whole texts", "preference pairs"
LABELLED, TAGGED, PAIRED = "texts with labels", "words with tags", "pairs of texts"
"""Kinds of rows, as messages call them; an objective trains on one kind."""


@dataclass(frozen=True)
class Call:
    """A tool that the assistant calls. `arguments`: a JSON object, as text; `id`: what results name, or ""."""

    name: str
    arguments: str
    id: str = ""


@dataclass(frozen=True)
class Turn:
    """One message, or one part of a row. `role`: system, user, assistant, or tool; text, for a row that is text and
    nothing else; or tools; or label, word, tag, anchor, positive, negative (see `rankwise.data.label_formats`).

    Args:
        content: the text; of the role tools, their schemas as JSON.
        calls: tools that an assistant turn calls.
        weight: how much an answer counts in the loss; 0: it is not trained on.
        name, call_id: of a tool turn, whose result it is, or "".
    """

    role: str
    content: str
    calls: tuple[Call, ...] = ()
    weight: float = 1.0
    name: str = ""
    call_id: str = ""

    @property
    def train(self) -> bool:
        """Whether an answer is trained on."""
        return self.weight > 0


Turns = tuple[Turn, ...]


class RowError(Exception):
    """Why a row can't be used; it becomes a Problem with file and line."""


def string(row: Mapping[str, Any], key: str, shown: str | None = None) -> str:
    """The text in `key`, which messages call `shown`. Raises: RowError for anything else."""
    shown = shown or key
    if key not in row:
        raise RowError(f"{shown} is missing")
    value = row[key]
    if not isinstance(value, str):
        raise RowError(f"{shown} is {type_name(value)}, must be a string")
    return value


def filled(row: Mapping[str, Any], key: str, shown: str | None = None) -> str:
    """As `string`. Raises: RowError for white space too."""
    value = string(row, key, shown)
    if not value.strip():
        raise RowError(f"{shown or key} is empty")
    return value


def optional(row: Mapping[str, Any], key: str) -> str:
    """As `string`, with "" for what is absent or null."""
    return "" if row.get(key) is None else string(row, key)
