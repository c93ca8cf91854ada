"""Canonical turns as the messages and tools that chat templates take, and what shows whether one writes them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from rankwise.data.fields import ASSISTANT, TOOL, TOOLS, USER, Call, Turn

Message = dict[str, Any]


def as_messages(turns: Sequence[Turn]) -> tuple[list[Message], list[dict[str, Any]] | None]:
    """The messages, and the tools that may be called (None where the turns declare none)."""
    tools = json.loads(turns[0].content) if turns and turns[0].role == TOOLS else None
    return [_message(turn) for turn in turns if turn.role != TOOLS], tools


def _message(turn: Turn) -> Message:
    message: Message = {"role": turn.role, "content": turn.content}
    if turn.calls:
        message["tool_calls"] = [_call(call) for call in turn.calls]
    if turn.role == TOOL and turn.name:
        message["name"] = turn.name
    if turn.call_id:
        message["tool_call_id"] = turn.call_id
    return message


def _call(call: Call) -> dict[str, Any]:
    """Arguments are an object here, as templates want them, not the string that OpenAI's interface has."""
    found: dict[str, Any] = {
        "type": "function",
        "function": {"name": call.name, "arguments": json.loads(call.arguments)},
    }
    return {"id": call.id, **found} if call.id else found


DECLARED, CALLS, RESULTS = "tools", "tool calls", "results of tool calls"

_PROBE_ID = "probe0001"  # nine letters and digits, as Mistral's templates want them
_PROBE_TOOLS = Turn(
    TOOLS,
    json.dumps(
        [
            {
                "type": "function",
                "function": {
                    "name": "probe_tool",
                    "description": "Probe of the tool",
                    "parameters": {
                        "type": "object",
                        "properties": {"place": {"type": "string", "description": "a place"}},
                        "required": ["place"],
                    },
                },
            }
        ]
    ),
)
_PROBE_ASKED = (_PROBE_TOOLS, Turn(USER, "Probe of the user"))
_PROBE_CALL = Turn(ASSISTANT, "", (Call("probe_tool", '{"place": "Probe of the argument"}', _PROBE_ID),))
_PROBE_RESULT = Turn(TOOL, "Probe of the result", name="probe_tool", call_id=_PROBE_ID)

TOOL_PROBES: dict[str, tuple[tuple[Turn, ...], str]] = {
    DECLARED: ((*_PROBE_ASKED, Turn(ASSISTANT, "Probe of the answer")), "probe_tool"),
    CALLS: ((*_PROBE_ASKED, _PROBE_CALL), "Probe of the argument"),
    RESULTS: (
        (*_PROBE_ASKED, _PROBE_CALL, _PROBE_RESULT, Turn(ASSISTANT, "Probe of the answer")),
        "Probe of the result",
    ),
}
"""Conversations with tools, and words that are in the text of a template that writes them."""


def tool_parts(turns: Sequence[Turn]) -> list[str]:
    """What of tools the turns have: keys of `TOOL_PROBES`."""
    has = dict.fromkeys(TOOL_PROBES, False)
    for turn in turns:
        if turn.role == TOOLS:
            has[DECLARED] = True
        elif turn.role == TOOL:
            has[RESULTS] = True
        if turn.calls:
            has[CALLS] = True
    return [name for name, there in has.items() if there]
