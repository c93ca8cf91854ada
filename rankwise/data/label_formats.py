"""Row formats of classifiers and of embeddings: what is read and what is said of it, as turns of their own roles.

| name | row | turns |
| --- | --- | --- |
| label | `text` (may have `text_pair`) or `sentence1` and `sentence2`; `label`: name or whole number | text, label |
| labels | the same texts; `labels`: a list of them, which may be empty | text, label ... |
| tags | `words` or `tokens`; `tags` or `ner_tags`, one for each word | word, tag, word, tag ... |
| pairs | `anchor` or `query`; `positive`; may have `negative` or `negatives` | anchor, positive, negative ... |

A number is kept as its digits: label 3 and label "3" are one label.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rankwise.data.fields import (
    ANCHOR,
    LABEL,
    NEGATIVE,
    POSITIVE,
    TAG,
    TEXT,
    WORD,
    RowError,
    Turn,
    Turns,
    filled,
    type_name,
)


def from_label(row: Mapping[str, Any]) -> Turns:
    """`{"text": "...", "label": "positive"}`, or two texts and a number."""
    if "label" not in row:
        raise RowError("label is missing")
    return *_texts(row), Turn(LABEL, _label(row["label"], "label"))


def from_labels(row: Mapping[str, Any]) -> Turns:
    """`{"text": "...", "labels": ["toxic", "insult"]}`; an empty list says that none of them holds."""
    labels = [_label(value, f"labels[{place}]") for place, value in enumerate(_list(row, "labels"))]
    twice = next((label for label in labels if labels.count(label) > 1), None)
    if twice is not None:
        raise RowError(f"labels names '{twice}' twice")
    return *_texts(row), *(Turn(LABEL, label) for label in labels)


def from_tags(row: Mapping[str, Any]) -> Turns:
    """`{"words": ["Ada", "smiled"], "tags": ["B-PER", "O"]}`."""
    words_key, tags_key = _either(row, "words", "tokens"), _either(row, "tags", "ner_tags")
    words, tags = _list(row, words_key), _list(row, tags_key)
    if len(words) != len(tags):
        raise RowError(f"{words_key} has {len(words)} entries and {tags_key} {len(tags)}: each word needs one tag")
    if not words:
        raise RowError(f"{words_key} is empty")
    turns: list[Turn] = []
    for place, (word, tag) in enumerate(zip(words, tags, strict=True)):
        shown = f"{words_key}[{place}]"
        turns += [Turn(WORD, filled({shown: word}, shown)), Turn(TAG, _label(tag, f"{tags_key}[{place}]"))]
    return tuple(turns)


def from_pairs(row: Mapping[str, Any]) -> Turns:
    """`{"query": "...", "positive": "...", "negatives": ["...", "..."]}`."""
    anchor = filled(row, _either(row, "anchor", "query"))
    positive = filled(row, "positive")
    if "negative" in row and "negatives" in row:
        raise RowError("negative and negatives are both there; keep one of them")
    negatives: list[str] = []
    if row.get("negative") is not None:
        negatives = [filled(row, "negative")]
    elif row.get("negatives") is not None:
        shown = [(f"negatives[{place}]", value) for place, value in enumerate(_list(row, "negatives"))]
        negatives = [filled({name: value}, name) for name, value in shown]
    if positive in negatives:
        raise RowError("the positive is among the negatives")
    return Turn(ANCHOR, anchor), Turn(POSITIVE, positive), *(Turn(NEGATIVE, text) for text in negatives)


def _texts(row: Mapping[str, Any]) -> Turns:
    """One text, or two that are read together."""
    if "text" in row and "sentence1" in row:
        raise RowError("text and sentence1 are both there; keep one of them")
    if "sentence1" in row:
        return Turn(TEXT, filled(row, "sentence1")), Turn(TEXT, filled(row, "sentence2"))
    first = Turn(TEXT, filled(row, "text"))
    return (first,) if row.get("text_pair") is None else (first, Turn(TEXT, filled(row, "text_pair")))


def _either(row: Mapping[str, Any], one: str, other: str) -> str:
    """Which of two names for the same field the row has."""
    if one in row and other in row:
        raise RowError(f"{one} and {other} are both there; keep one of them")
    return other if other in row else one


def _list(row: Mapping[str, Any], key: str) -> list[Any]:
    if key not in row:
        raise RowError(f"{key} is missing")
    if not isinstance(row[key], list):
        raise RowError(f"{key} is {type_name(row[key])}, must be a list")
    return row[key]


def _label(value: Any, shown: str) -> str:
    """A name as it is, or the digits of a whole number."""
    if isinstance(value, str):
        if not value.strip():
            raise RowError(f"{shown} is empty")
        return value
    if isinstance(value, bool) or not isinstance(value, int):
        what = f"{value}" if isinstance(value, float) else type_name(value)
        raise RowError(f"{shown} is {what}, must be a name or a whole number")
    return str(value)
