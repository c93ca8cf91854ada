"""Preference rows: one prompt and two answers to it, of which one was preferred.

| fields | what they are |
| --- | --- |
| `prompt`, `chosen`, `rejected` | three texts; or lists of turns, the answers with or without the prompt in front |
| `chosen`, `rejected` | two conversations that begin alike: what they share, up to a question, is the prompt |

As turns a row is both conversations, a turn of the role `rejected` between them. Nothing in the prompt is trained on,
its answers neither; so the log-probabilities that are compared are those of the two continuations alone.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rankwise.data.chat import check_order, declared_tools, turn_list, untrained
from rankwise.data.fields import ASSISTANT, SYSTEM, USER, RowError, Turn, Turns, filled, optional, type_name

REJECTED = "rejected"
CHOSEN = "chosen"
PROMPT = "prompt"


def from_preference(row: Mapping[str, Any]) -> Turns:
    """The conversation with the chosen answer, the mark, the one with the rejected answer. Raises: RowError."""
    if row.get(PROMPT) is None and any(isinstance(row.get(key), str) for key in (CHOSEN, REJECTED)):
        raise RowError("prompt is missing: chosen and rejected are texts, which answer one; or write lists of turns")
    prompt = _prompt(row)
    chosen, rejected = (_continuation(row, key, prompt) for key in (CHOSEN, REJECTED))
    if not prompt:
        prompt, chosen, rejected = _shared_prompt(chosen, rejected)
    if chosen == rejected:
        raise RowError("chosen and rejected are equal: there is nothing to prefer")
    tools = declared_tools(row)
    before = untrained(prompt)
    for key, answer in ((CHOSEN, chosen), (REJECTED, rejected)):
        shown = [f"the prompt's turn {place + 1}" for place in range(len(before))]
        check_order((*before, *answer), [*shown, *(f"turn {place + 1} of {key}" for place in range(len(answer)))], key)
    return *tools, *before, *chosen, Turn(REJECTED, ""), *tools, *before, *rejected


def both(turns: Turns) -> tuple[Turns, Turns]:
    """The conversations with the chosen and with the rejected answer. Raises: RowError when there are not two."""
    places = [place for place, turn in enumerate(turns) if turn.role == REJECTED]
    if len(places) != 1:
        raise RowError("the row is no preference pair: it has no chosen and rejected answers")
    return turns[: places[0]], turns[places[0] + 1 :]


def first(turns: Turns) -> Turns:
    """The turns before the mark; all of them where there is none."""
    return turns[: next((place for place, turn in enumerate(turns) if turn.role == REJECTED), len(turns))]


def _prompt(row: Mapping[str, Any]) -> Turns:
    """The turns of `prompt`, behind the row's `system`; none where it is missing."""
    if row.get(PROMPT) is None:
        if row.get(SYSTEM):
            raise RowError("system stands beside conversations without a prompt; make it their first turn")
        return ()
    system = optional(row, SYSTEM)
    turns = (Turn(USER, filled(row, PROMPT)),) if isinstance(row[PROMPT], str) else turn_list(row, PROMPT)
    if system.strip() and turns[0].role == SYSTEM:
        raise RowError("system is given twice, in system and in prompt[0]")
    return (*((Turn(SYSTEM, system),) if system.strip() else ()), *turns)


def _continuation(row: Mapping[str, Any], key: str, prompt: Turns) -> Turns:
    """The turns behind the prompt; where `key` repeats the prompt, it is taken off."""
    if key not in row:
        raise RowError(f"{key} is missing")
    if isinstance(row[key], str):
        return (Turn(ASSISTANT, filled(row, key)),)
    if not isinstance(row[key], list):
        raise RowError(f"{key} is {type_name(row[key])}, must be a text or a list of turns")
    turns = turn_list(row, key)
    if not prompt or turns[0].role not in (USER, SYSTEM):
        return turns
    asked = tuple(turn for turn in prompt if turn.role != SYSTEM or turns[0].role == SYSTEM)
    if turns[: len(asked)] != asked:
        raise RowError(f"{key} begins with {_article(turns[0].role)} turn, but not with the turns of prompt")
    if len(turns) == len(asked):
        raise RowError(f"{key} has no turn behind the prompt")
    return turns[len(asked) :]


def _shared_prompt(chosen: Turns, rejected: Turns) -> tuple[Turns, Turns, Turns]:
    """What two conversations begin with, and what follows in each. Raises: RowError when that is no prompt."""
    shared = next(
        (place for place, (one, other) in enumerate(zip(chosen, rejected, strict=False)) if one != other),
        min(len(chosen), len(rejected)),
    )
    if shared == len(chosen) == len(rejected):
        raise RowError("chosen and rejected are equal: there is nothing to prefer")
    while shared and (shared in (len(chosen), len(rejected)) or chosen[shared - 1].role in (ASSISTANT, SYSTEM)):
        shared -= 1  # a prompt asks something, and something answers it in both
    if not shared:
        raise RowError("chosen and rejected share no prompt: their first turns differ")
    return chosen[:shared], chosen[shared:], rejected[shared:]


def _article(role: str) -> str:
    return f"an {role}" if role == ASSISTANT else f"a {role}"
