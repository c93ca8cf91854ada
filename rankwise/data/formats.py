"""The row formats, each a pure function from one JSON object to canonical turns: dict in, turns out.

| name | row |
| --- | --- |
| messages | `messages`: list of `role` and `content` (see `rankwise.data.chat`); may have `system`, `tools` |
| prompt_completion | `prompt`, `completion`: texts, or lists of turns with `tools`; may have `system` |
| text | `text`: trained on whole |
| alpaca | `instruction`, `input` (may be absent or empty), `output`; may have `system` |
| sharegpt | `conversations`: list of `from` and `value`; may have `system`, `tools` |
| preference | `chosen`, `rejected` and mostly `prompt`: see `rankwise.data.preferences` |
| translation | `translation`: one text in each of two languages, of which the first is translated into the second |
| label, labels, tags, pairs | rows of classifiers and of embeddings: see `rankwise.data.label_formats` |

A row that does not fit its format raises `RowError`, which says what is wrong with it. To add a format: a function
and a line in `FORMATS`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rankwise.data.chat import SHAREGPT_KEYS, check_order, conversation, declared_tools, turn_list, untrained
from rankwise.data.fields import (
    ANSWERS,
    ASSISTANT,
    LABELLED,
    PAIRED,
    PREFERENCES,
    SYSTEM,
    TAGGED,
    TEXT,
    TEXTS,
    TOOLS,
    USER,
    RowError,
    Turn,
    Turns,
    filled,
    optional,
    string,
    type_name,
)
from rankwise.data.label_formats import from_label, from_labels, from_pairs, from_tags
from rankwise.data.preferences import from_preference
from rankwise.errors import RequestError, counted


@dataclass(frozen=True)
class Format:
    """How rows of one format are recognised and read.

    `keys`: the fields that every row has, `a|b` for either name; `not_with`: fields whose presence means that it is
    some other format; `rows`: what kind of row it is.
    """

    keys: tuple[str, ...]
    turns: Callable[[Mapping[str, Any]], Turns]
    not_with: tuple[str, ...] = ()
    rows: str = ANSWERS
    optional: tuple[str, ...] = ()
    """Fields that a row may have."""

    @property
    def fields(self) -> list[str]:
        """All names of fields that are read."""
        return [*(name for key in self.keys for name in key.split("|")), *self.optional]

    def fits(self, row: Mapping[str, Any]) -> bool:
        """Whether the row has this format's fields, whatever their values."""
        has_all = all(any(name in row for name in key.split("|")) for key in self.keys)
        return has_all and not any(key in row for key in self.not_with)

    @property
    def shown_keys(self) -> str:
        """The keys in words."""
        return " and ".join(key.replace("|", " or ") for key in self.keys)


def from_messages(row: Mapping[str, Any]) -> Turns:
    """`{"messages": [{"role": "user", "content": "..."}, ...]}`."""
    return _with_system(row, conversation(row, "messages"), "messages")


def from_prompt_completion(row: Mapping[str, Any]) -> Turns:
    """`{"prompt": "...", "completion": "..."}`; or two lists of turns, of which the completion's are trained on."""
    if isinstance(row.get("prompt"), list) and isinstance(row.get("completion"), list):
        return _split_conversation(row)
    return *_leading_system(row), Turn(USER, filled(row, "prompt")), Turn(ASSISTANT, filled(row, "completion"))


def from_text(row: Mapping[str, Any]) -> Turns:
    """`{"text": "..."}`."""
    return (Turn(TEXT, filled(row, "text")),)


def from_alpaca(row: Mapping[str, Any]) -> Turns:
    """`{"instruction": "...", "input": "...", "output": "..."}`; the input follows the instruction after a blank line.

    Alpaca's own preamble ("Below is an instruction ...") is not added: the chat template takes its place.
    """
    if row.get("history"):
        raise RowError("history is not read; write earlier turns as messages")
    instruction, extra = string(row, "instruction"), optional(row, "input")
    request = "\n\n".join(part for part in (instruction, extra) if part.strip())
    if not request:
        raise RowError("instruction is empty")
    return *_leading_system(row), Turn(USER, request), Turn(ASSISTANT, filled(row, "output"))


def from_sharegpt(row: Mapping[str, Any]) -> Turns:
    """`{"conversations": [{"from": "human", "value": "..."}, ...]}`; turns of `role` and `content` are read too."""
    return _with_system(row, conversation(row, "conversations", SHAREGPT_KEYS), "conversations")


def _with_system(row: Mapping[str, Any], turns: Turns, key: str) -> Turns:
    """The turns with the row's `system` in front, behind the tools."""
    system = _leading_system(row)
    num_tools = sum(turn.role == TOOLS for turn in turns)
    if system and turns[num_tools].role == SYSTEM:
        raise RowError(f"system is given twice, in system and in {key}[0]")
    return *turns[:num_tools], *system, *turns[num_tools:]


def _split_conversation(row: Mapping[str, Any]) -> Turns:
    """A conversation in two lists: answers in `prompt` are not trained on."""
    prompt, completion = turn_list(row, "prompt"), turn_list(row, "completion")
    shown = [f"prompt[{index}]" for index in range(len(prompt))]
    shown += [f"completion[{index}]" for index in range(len(completion))]
    if all(turn.role != ASSISTANT for turn in completion):
        raise RowError("completion has no assistant turn: there is nothing to train on")
    turns = (*untrained(prompt), *completion)
    check_order(turns, shown, "prompt and completion")
    return _with_system(row, (*declared_tools(row), *turns), "prompt")


def from_translation(row: Mapping[str, Any]) -> Turns:
    """`{"translation": {"en": "...", "fr": "..."}}`: from the language that stands first into the other."""
    texts = row.get("translation")
    if not isinstance(texts, dict):
        raise RowError(f"translation is {type_name(texts)}, must be an object with a text in each of two languages")
    if len(texts) == 1:
        raise RowError(
            f"translation has a text in '{next(iter(texts))}' only; the one in the other language is missing"
        )
    if len(texts) != 2:
        raise RowError(f"translation has {counted(len(texts), 'text')}, must have one in each of two languages")
    source, target = (filled(texts, language, f"translation.{language}") for language in texts)
    return Turn(USER, source), Turn(ASSISTANT, target)


FORMATS: dict[str, Format] = {
    "messages": Format(("messages",), from_messages, optional=("system", "tools")),
    "prompt_completion": Format(
        ("prompt", "completion"), from_prompt_completion, not_with=("label",), optional=("system", "tools")
    ),
    "text": Format(("text",), from_text, not_with=("label", "labels"), rows=TEXTS),
    "alpaca": Format(("instruction", "output"), from_alpaca, optional=("input", "system", "history")),
    "sharegpt": Format(("conversations",), from_sharegpt, optional=("system", "tools")),
    "translation": Format(("translation",), from_translation),
    "preference": Format(
        ("chosen", "rejected"), from_preference, rows=PREFERENCES, optional=("prompt", "system", "tools")
    ),
    "label": Format(("text|sentence1", "label"), from_label, rows=LABELLED, optional=("text_pair", "sentence2")),
    "labels": Format(("text|sentence1", "labels"), from_labels, rows=LABELLED, optional=("text_pair", "sentence2")),
    "tags": Format(("words|tokens", "tags|ner_tags"), from_tags, rows=TAGGED),
    "pairs": Format(("anchor|query", "positive"), from_pairs, rows=PAIRED, optional=("negative", "negatives")),
}


def detect(rows: Sequence[tuple[int, Mapping[str, Any]]], file: str, is_start: bool = False) -> tuple[str, str]:
    """The format of a file's rows and why: the one format whose fields at least half of the rows have.

    Args:
        rows: line number and row, of the lines that hold a JSON object.
        file: its name, for messages.
        is_start: whether these are the first rows of more.

    Raises: RequestError when no format fits, or more than one does.
    """
    counts = {name: sum(form.fits(row) for _, row in rows) for name, form in FORMATS.items()}
    found = [name for name, count in counts.items() if 2 * count >= len(rows)]
    if len(found) == 1:
        name = found[0]
        keys = FORMATS[name].shown_keys
        total = f"{'the first ' if is_start else ''}{counted(len(rows), 'row')}"
        return name, f"{counts[name]:,} of {total} {'has' if len(rows) == 1 else 'have'} {keys}"
    if found:
        line, keys = _shown(next((pair for pair in rows if FORMATS[found[1]].fits(pair[1])), rows[0]))
        fit = " and ".join(f"{name} ({counts[name]} of {counted(len(rows), 'row')})" for name in found)
        raise RequestError(
            f"'{file}' fits several formats: {fit}; line {line} has {keys}; set data.format to the one meant"
        )
    line, keys = _shown(rows[0])
    known = ", ".join(f"{name} ({form.shown_keys})" for name, form in FORMATS.items())
    raise RequestError(f"no format fits the rows of '{file}': line {line} has {keys}; known formats: {known}")


def _shown(pair: tuple[int, Mapping[str, Any]]) -> tuple[int, str]:
    line, row = pair
    return line, f"the keys {', '.join(row)}" if row else "no keys"


def _leading_system(row: Mapping[str, Any]) -> Turns:
    system = optional(row, SYSTEM)
    return (Turn(SYSTEM, system),) if system.strip() else ()
