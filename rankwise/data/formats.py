"""The row formats, each a pure function from one JSON object to canonical turns: dict in, turns out.

| name | row |
| --- | --- |
| messages | `messages`: list of `role` (system, user, assistant) and `content` |
| prompt_completion | `prompt`, `completion` |
| text | `text`: trained on whole |
| alpaca | `instruction`, `input` (may be absent or empty), `output`; may have `system` |
| sharegpt | `conversations`: list of `from` (system, human, gpt) and `value`; may have `system` |

A row that does not fit its format raises `RowError`, which says what is wrong with it. To add a format: a function
and a line in `FORMATS`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rankwise.data.fields import (
    ANSWERS,
    ASSISTANT,
    SYSTEM,
    TEXT,
    TEXTS,
    USER,
    RowError,
    Turn,
    Turns,
    filled,
    optional,
    string,
    type_name,
)
from rankwise.errors import RequestError, counted, did_you_mean


@dataclass(frozen=True)
class Format:
    """How rows of one format are recognised and read.

    `keys`: the fields that every row has; `not_with`: fields whose presence means that it is some other format;
    `rows`: what kind of row it is.
    """

    keys: tuple[str, ...]
    turns: Callable[[Mapping[str, Any]], Turns]
    not_with: tuple[str, ...] = ()
    rows: str = ANSWERS

    def fits(self, row: Mapping[str, Any]) -> bool:
        """Whether the row has this format's fields, whatever their values."""
        return all(key in row for key in self.keys) and not any(key in row for key in self.not_with)


def from_messages(row: Mapping[str, Any]) -> Turns:
    """`{"messages": [{"role": "user", "content": "..."}, ...]}`."""
    return _checked(_turn_list(row, "messages", _MESSAGE_KEYS), "messages")


def from_prompt_completion(row: Mapping[str, Any]) -> Turns:
    """`{"prompt": "...", "completion": "..."}`."""
    return Turn(USER, filled(row, "prompt")), Turn(ASSISTANT, filled(row, "completion"))


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
    turns = _turn_list(row, "conversations", _SHAREGPT_KEYS)
    system = _leading_system(row)
    if system and turns and turns[0].role == SYSTEM:
        raise RowError("system is given twice, in system and in conversations[0]")
    return *system, *_checked(turns, "conversations")


FORMATS: dict[str, Format] = {
    "messages": Format(("messages",), from_messages),
    "prompt_completion": Format(("prompt", "completion"), from_prompt_completion, not_with=("label",)),
    "text": Format(("text",), from_text, not_with=("label", "labels"), rows=TEXTS),
    "alpaca": Format(("instruction", "output"), from_alpaca),
    "sharegpt": Format(("conversations",), from_sharegpt),
}

_LATER: dict[tuple[str, ...], str] = {
    ("chosen", "rejected"): "they look like preference pairs, which are not read yet",
    ("label",): "they look like rows with labels, which are not read yet",
    ("labels",): "they look like rows with labels, which are not read yet",
}

# (role key, content key, role names) of a turn.
_MESSAGE_KEYS = ("role", "content", {SYSTEM: SYSTEM, USER: USER, ASSISTANT: ASSISTANT})
_SHAREGPT_KEYS = (
    "from",
    "value",
    {SYSTEM: SYSTEM, "human": USER, USER: USER, "gpt": ASSISTANT, "chatgpt": ASSISTANT, ASSISTANT: ASSISTANT},
)
_UNREAD = ("tool_calls", "tool_call_id", "function_call", "weight", "reasoning_content", "thinking")
"""Fields of a turn that would change what is trained; ignoring them in silence would train on something else."""


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
        keys = " and ".join(FORMATS[name].keys)
        total = f"{'the first ' if is_start else ''}{counted(len(rows), 'row')}"
        return name, f"{counts[name]:,} of {total} {'has' if len(rows) == 1 else 'have'} {keys}"
    if found:
        line, keys = _shown(next((pair for pair in rows if FORMATS[found[1]].fits(pair[1])), rows[0]))
        fit = " and ".join(f"{name} ({counts[name]} of {counted(len(rows), 'row')})" for name in found)
        raise RequestError(
            f"'{file}' fits several formats: {fit}; line {line} has {keys}; set data.format to the one meant"
        )
    line, keys = _shown(rows[0])
    known = ", ".join(f"{name} ({' and '.join(form.keys)})" for name, form in FORMATS.items())
    later = next((text for marks, text in _LATER.items() if all(mark in rows[0][1] for mark in marks)), None)
    hint = f": {later}" if later else ""
    raise RequestError(f"no format fits the rows of '{file}': line {line} has {keys}{hint}; known formats: {known}")


def _shown(pair: tuple[int, Mapping[str, Any]]) -> tuple[int, str]:
    line, row = pair
    return line, f"the keys {', '.join(row)}" if row else "no keys"


def _leading_system(row: Mapping[str, Any]) -> Turns:
    system = optional(row, SYSTEM)
    return (Turn(SYSTEM, system),) if system.strip() else ()


def _turn_list(row: Mapping[str, Any], key: str, names: tuple[str, str, Mapping[str, str]]) -> Turns:
    if key not in row:
        raise RowError(f"{key} is missing")
    items = row[key]
    if not isinstance(items, list):
        raise RowError(f"{key} is {type_name(items)}, must be a list of turns")
    if row.get("tools"):
        raise RowError("tools are not read; remove the field, or write the calls as text")
    if not items:
        raise RowError(f"{key} is empty")
    return tuple(_turn(item, f"{key}[{index}]", names) for index, item in enumerate(items))


def _turn(item: Any, shown: str, names: tuple[str, str, Mapping[str, str]]) -> Turn:
    if not isinstance(item, dict):
        raise RowError(f"{shown} is {type_name(item)}, must be an object")
    role_key, content_key, roles = names
    if role_key not in item and "role" in item:
        role_key, content_key, roles = _MESSAGE_KEYS
    name = string(item, role_key, f"{shown}.{role_key}")
    if name not in roles:
        raise RowError(f"{shown}.{role_key} is '{name}'{did_you_mean(name, roles)}")
    for key in _UNREAD:
        if item.get(key) is not None:
            raise RowError(f"{shown}.{key} is not read; remove it, or write it as text")
    shown_content = f"{shown}.{content_key}"
    if roles[name] == SYSTEM:
        return Turn(SYSTEM, string(item, content_key, shown_content))
    return Turn(roles[name], filled(item, content_key, shown_content))


def _checked(turns: Turns, key: str) -> Turns:
    """The turns, if they are: at most one system turn, in front; then user and assistant by turns, an answer last."""
    if all(turn.role != ASSISTANT for turn in turns):
        raise RowError(f"{key} has no assistant turn: there is nothing to train on")
    expected = USER
    for index, turn in enumerate(turns):
        if turn.role == SYSTEM:
            if index:
                raise RowError(f"{key}[{index}] is a system turn, which may only come first")
            continue
        if turn.role != expected:
            before = (
                f"follows another {turn.role} turn" if index and turns[index - 1].role == turn.role else "comes first"
            )
            raise RowError(
                f"{key}[{index}] is {_article(turn.role)} turn but {before}; user and assistant must alternate"
            )
        expected = ASSISTANT if expected == USER else USER
    if turns[-1].role != ASSISTANT:
        raise RowError(f"{key} ends with a user turn that has no answer")
    return turns


def _article(role: str) -> str:
    return f"an {role}" if role == ASSISTANT else f"a {role}"
