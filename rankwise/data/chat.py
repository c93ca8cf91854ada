"""Lists of turns, as OpenAI's messages and as ShareGPT's conversations have them, to canonical turns.

| role | also written |
| --- | --- |
| system | developer |
| user | human |
| assistant | gpt, chatgpt, bot, model; function_call, tool_call for one whose value is a call as JSON |
| tool | function, observation, function_response, tool_response, ipython |

A turn is `role` and `content`, or `from` and `value`. Content is a string, or a list of text parts, which are joined
without anything between them, as chat templates do. An assistant's `tool_calls` are trained on, like its words; tool
turns, the results, are not. `train: false` or `weight: 0` leaves an answer in the conversation and out of the loss.

What a conversation looks like: tools that may be called, a system turn, then user and assistant by turns; behind calls
come their results, then the assistant again; the last turn is an assistant's.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

from rankwise.data.fields import ASSISTANT, SYSTEM, TOOL, TOOLS, USER, Call, RowError, Turn, Turns, string, type_name
from rankwise.data.readers.records import flaw
from rankwise.errors import did_you_mean

_CALL = "call"
ROLES: dict[str, str] = {
    "system": SYSTEM, "developer": SYSTEM,
    "user": USER, "human": USER,
    "assistant": ASSISTANT, "gpt": ASSISTANT, "chatgpt": ASSISTANT, "bot": ASSISTANT, "model": ASSISTANT,
    "function_call": _CALL, "tool_call": _CALL,
    "tool": TOOL, "function": TOOL, "observation": TOOL, "function_response": TOOL, "tool_response": TOOL,
    "ipython": TOOL,
}  # fmt: skip

MESSAGE_KEYS = ("role", "content")
SHAREGPT_KEYS = ("from", "value")

UNREAD = ("reasoning_content", "thinking", "audio", "refusal")
"""Fields of a turn that would change what is trained; ignoring them in silence would train on something else."""

UNREAD_MEDIA = ("images", "image", "audios", "videos")
"""Fields beside a conversation that it refers to."""


def conversation(row: Mapping[str, Any], key: str, keys: tuple[str, str] = MESSAGE_KEYS) -> Turns:
    """The turns in `row[key]`, checked, behind the row's `tools`, if it has any.

    Raises: RowError for what is no conversation to train on.
    """
    for name in UNREAD_MEDIA:
        if row.get(name):
            raise RowError(f"{name} are not read: only text can be trained on")
    turns = turn_list(row, key, keys)
    check_order(turns, [f"{key}[{index}]" for index in range(len(turns))], key)
    return *declared_tools(row), *turns


def turn_list(row: Mapping[str, Any], key: str, keys: tuple[str, str] = MESSAGE_KEYS) -> Turns:
    """The turns in `row[key]`, each read by itself. Raises: RowError."""
    if key not in row:
        raise RowError(f"{key} is missing")
    items = row[key]
    if not isinstance(items, list):
        raise RowError(f"{key} is {type_name(items)}, must be a list of turns")
    if not items:
        raise RowError(f"{key} is empty")
    return tuple(_turn(item, f"{key}[{index}]", keys) for index, item in enumerate(items))


def check_order(turns: Sequence[Turn], shown: Sequence[str], what: str) -> None:
    """Whether the turns are a conversation. `shown`: what messages call each; `what`: all of them.

    Raises: RowError for turns in an order that templates don't know, or without an answer that is trained on.
    """
    answers = [turn for turn in turns if turn.role == ASSISTANT]
    if not answers:
        raise RowError(f"{what} has no assistant turn: there is nothing to train on")
    before: Turn | None = None
    for turn, name in zip(turns, shown, strict=True):
        if turn.role == SYSTEM:
            if name != shown[0]:
                raise RowError(f"{name} is a system turn, which may only come first")
            continue
        wrong = _out_of_order(turn, before)
        if wrong is not None:
            raise RowError(f"{name} is {_article(turn.role)} turn but {wrong}")
        before = turn
    _check_ids(turns, shown)
    if turns[-1].role != ASSISTANT:
        raise RowError(f"{what} ends with {_article(turns[-1].role)} turn that has no answer")
    if not any(turn.train for turn in answers):
        raise RowError(f"{what} has no assistant turn that is trained on: each has train false or weight 0")


def declared_tools(row: Mapping[str, Any]) -> Turns:
    """The row's `tools` (a list of schemas, or its JSON) as the turn in front of all others; nothing where none are.

    Raises: RowError for what are no tools.
    """
    tools = _parsed(row.get("tools"), "tools")
    if tools is None or tools == [] or tools == {}:
        return ()
    if not isinstance(tools, list):
        raise RowError(f"tools is {type_name(tools)}, must be a list of tools")
    found: list[Mapping[str, Any]] = []
    for index, tool in enumerate(tools):
        shown = f"tools[{index}]"
        if not isinstance(tool, dict):
            raise RowError(f"{shown} is {type_name(tool)}, must be an object")
        function = tool.get("function", tool)
        if not isinstance(function, dict):
            raise RowError(f"{shown}.function is {type_name(function)}, must be an object")
        string(function, "name", f"{shown}.name")
        found.append(tool if "function" in tool else {"type": "function", "function": tool})
    return (Turn(TOOLS, _as_json(found, "tools")),)


def untrained(turns: Turns) -> Turns:
    """The same turns with no answer trained on."""
    return tuple(dataclasses.replace(turn, weight=0.0) if turn.role == ASSISTANT else turn for turn in turns)


def _turn(item: Any, shown: str, keys: tuple[str, str]) -> Turn:
    if not isinstance(item, dict):
        raise RowError(f"{shown} is {type_name(item)}, must be an object")
    if (plain := _plain_turn(item, keys)) is not None:
        return plain
    role_key, content_key = keys
    if role_key not in item and any(other in item for other in ("role", "from")):
        role_key, content_key = MESSAGE_KEYS if "role" in item else SHAREGPT_KEYS
    if content_key not in item:
        content_key = next((other for other in ("content", "value") if other in item), content_key)
    name = string(item, role_key, f"{shown}.{role_key}")
    if name not in ROLES:
        raise RowError(f"{shown}.{role_key} is '{name}'{did_you_mean(name, ROLES)}")
    for field in UNREAD:
        if item.get(field) is not None:
            raise RowError(f"{shown}.{field} is not read; remove it, or write it as text")
    role, calls = ROLES[name], _calls(item, shown)
    if role not in (ASSISTANT, _CALL) and calls:
        raise RowError(f"{shown} is {_article(role)} turn with tool calls, which only an assistant turn has")
    content = _content(item, content_key, shown, may_miss=bool(calls))
    if role == _CALL:
        role, calls, content = ASSISTANT, _written_calls(content, f"{shown}.{content_key}"), ""
    if role in (USER, ASSISTANT) and not content.strip() and not calls:
        raise RowError(f"{shown}.{content_key} is empty")
    label = _optional_text(item, "name", shown) if role == TOOL else ""
    call_id = _optional_text(item, "tool_call_id", shown)
    if call_id and role != TOOL:
        raise RowError(f"{shown}.tool_call_id has no meaning in {_article(role)} turn")
    return Turn(role, content, calls, _weight(item, role, shown), label, call_id)


def _plain_turn(item: Mapping[str, Any], keys: tuple[str, str]) -> Turn | None:
    """The turn of an item that is a role, a text and nothing else, as most are; None for all others, good or bad."""
    name, content = item.get(keys[0]), item.get(keys[1])
    if len(item) != 2 or type(name) is not str or type(content) is not str or not content or content.isspace():
        return None
    role = ROLES.get(name, _CALL)
    return None if role == _CALL else Turn(role, content)


def _content(item: Mapping[str, Any], key: str, shown: str, may_miss: bool) -> str:
    """The text of a turn: a string, or text parts joined."""
    if may_miss and item.get(key) is None:
        return ""
    if not isinstance(item.get(key), list):
        return string(item, key, f"{shown}.{key}")
    texts: list[str] = []
    for index, part in enumerate(item[key]):
        name = f"{shown}.{key}[{index}]"
        if not isinstance(part, dict):
            raise RowError(f"{name} is {type_name(part)}, must be an object with type and text")
        kind = string(part, "type", f"{name}.type")
        if kind != "text":
            raise RowError(f"{name} is of type '{kind}': only text can be trained on")
        texts.append(string(part, "text", f"{name}.text"))
    return "".join(texts)


def _calls(item: Mapping[str, Any], shown: str) -> tuple[Call, ...]:
    """`tool_calls`, or `function_call`, its elder sister."""
    found = _parsed(item.get("tool_calls"), f"{shown}.tool_calls")
    old = item.get("function_call")
    if found and old:
        raise RowError(f"{shown} has tool_calls and function_call; keep one of them")
    if old:
        return (_call(old, f"{shown}.function_call"),)
    if not found:
        return ()
    if not isinstance(found, list):
        raise RowError(f"{shown}.tool_calls is {type_name(found)}, must be a list of calls")
    return tuple(_call(call, f"{shown}.tool_calls[{index}]") for index, call in enumerate(found))


def _written_calls(content: str, shown: str) -> tuple[Call, ...]:
    """A call, or a list of them, written as JSON in place of text."""
    found = _parsed(content, shown)
    if not found:
        raise RowError(f"{shown} is empty, must be a call as JSON")
    calls = found if isinstance(found, list) else [found]
    return tuple(_call(call, shown) for call in calls)


def _call(value: Any, shown: str) -> Call:
    """`{"id": ..., "function": {"name": ..., "arguments": {...} or their JSON}}`, or the function alone."""
    if not isinstance(value, dict):
        raise RowError(f"{shown} is {type_name(value)}, must be an object with name and arguments")
    function = value.get("function", value)
    if not isinstance(function, dict):
        raise RowError(f"{shown}.function is {type_name(function)}, must be an object with name and arguments")
    name = string(function, "name", f"{shown}.name")
    if not name.strip():
        raise RowError(f"{shown}.name is empty")
    arguments = _parsed(function.get("arguments"), f"{shown}.arguments")
    if arguments is None:
        arguments = {}
    if not isinstance(arguments, dict):
        raise RowError(f"{shown}.arguments is {type_name(arguments)}, must be an object, or the JSON of one")
    return Call(name, _as_json(arguments, f"{shown}.arguments"), _optional_text(value, "id", shown))


def _parsed(value: Any, shown: str) -> Any:
    """The value, or what it says where it is JSON in a string; None for an empty string."""
    if not isinstance(value, str):
        return value
    if not value.strip():
        return None
    try:
        found = json.loads(value, parse_constant=_no_constant)
    except (ValueError, RecursionError):
        raise RowError(f"{shown} is a string that is not JSON") from None
    if wrong := flaw(found):
        raise RowError(f"{shown}: {wrong}")
    return found


def _as_json(value: Any, shown: str) -> str:
    """The value's JSON. Raises: RowError for what has none: bytes in a column, a number that is too large."""
    try:
        return json.dumps(value, ensure_ascii=False, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise RowError(f"{shown} can't be written as JSON: {error}") from None


def _no_constant(name: str) -> Any:
    raise ValueError(name)


def _optional_text(item: Mapping[str, Any], key: str, shown: str) -> str:
    return "" if item.get(key) is None else string(item, key, f"{shown}.{key}")


def _weight(item: Mapping[str, Any], role: str, shown: str) -> float:
    """How much an answer counts: 1, or by `train` and `weight`. Of other turns always 1, which nothing reads."""
    train, weight = item.get("train"), item.get("weight")
    if train is not None and not isinstance(train, bool):
        raise RowError(f"{shown}.train is {type_name(train)}, must be true or false")
    is_number = isinstance(weight, (int, float)) and not isinstance(weight, bool)
    if weight is not None and not (is_number and 0 <= weight <= _MAX_WEIGHT and math.isfinite(weight)):
        seen = f"{weight:g}" if isinstance(weight, float) else str(weight)[:20] if is_number else type_name(weight)
        raise RowError(f"{shown}.weight is {seen}, must be a number from 0 to {_MAX_WEIGHT}")
    if train is not None and weight is not None and train != (weight > 0):
        raise RowError(f"{shown} says train {str(train).lower()} and weight {weight:g}; keep one of them")
    if role == ASSISTANT:
        return 0.0 if train is False else 1.0 if weight is None else float(weight)
    if train or weight:
        raise RowError(f"{shown} asks to train on {_article(role)} turn: only an assistant's can be trained on")
    return 1.0


_MAX_WEIGHT = 1000


def _out_of_order(turn: Turn, before: Turn | None) -> str | None:
    """What is wrong with this turn behind that one."""
    if before is None:
        return None if turn.role == USER else "comes first; the user must begin"
    if before.role == ASSISTANT and before.calls:
        return None if turn.role == TOOL else "follows tool calls, whose results (tool turns) must come first"
    if turn.role == TOOL:
        return None if before.role == TOOL else "follows no tool call"
    if before.role == TOOL:
        return None if turn.role == ASSISTANT else "follows the result of a call; the assistant must answer first"
    if turn.role == before.role:
        return f"follows another {turn.role} turn; user and assistant must alternate"
    return None


def _check_ids(turns: Sequence[Turn], shown: Sequence[str]) -> None:
    """Raises: RowError for a result whose call has another id."""
    known: set[str] = set()
    for turn, name in zip(turns, shown, strict=True):
        known |= {call.id for call in turn.calls}
        if turn.call_id and known and "" not in known and turn.call_id not in known:
            raise RowError(f"{name}.tool_call_id is '{turn.call_id}', the id of no call before it")


def _article(role: str) -> str:
    return f"an {role}" if role == ASSISTANT else f"a {role}"
