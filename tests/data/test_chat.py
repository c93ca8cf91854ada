"""Conversations: roles, tools and their calls, text parts, answers that are not trained on, and what is refused."""

from __future__ import annotations

import json

import pytest

from rankwise.data.chat import ROLES
from rankwise.data.fields import Call, RowError, Turn
from rankwise.data.formats import FORMATS
from tests.data.builders import turns

CALL = {"id": "call_1", "type": "function", "function": {"name": "weather", "arguments": '{"place": "Rome"}'}}
TOOL = {"type": "function", "function": {"name": "weather", "parameters": {"type": "object", "properties": {}}}}
AGENT = {
    "tools": [TOOL],
    "messages": [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Rome?"},
        {"role": "assistant", "content": None, "tool_calls": [CALL]},
        {"role": "tool", "tool_call_id": "call_1", "name": "weather", "content": "sunny"},
        {"role": "assistant", "content": "Sunny."},
    ],
}
CALLED = Call("weather", '{"place": "Rome"}', "call_1")


def of(*items: dict, **row: object) -> tuple[Turn, ...]:
    return FORMATS["messages"].turns({"messages": list(items), **row})


def ask(text: str = "q") -> dict:
    return {"role": "user", "content": text}


def reply(text: object = "a", **more: object) -> dict:
    return {"role": "assistant", "content": text, **more}


def result(text: str = "r", **more: object) -> dict:
    return {"role": "tool", "content": text, **more}


def test_tools_calls_and_results():
    assert FORMATS["messages"].turns(AGENT) == (
        Turn("tools", json.dumps([TOOL])),
        Turn("system", "Be brief."),
        Turn("user", "Rome?"),
        Turn("assistant", "", (CALLED,)),
        Turn("tool", "sunny", name="weather", call_id="call_1"),
        Turn("assistant", "Sunny."),
    )


@pytest.mark.parametrize(
    "call",
    [
        CALL,
        {"id": "call_1", "function": {"name": "weather", "arguments": {"place": "Rome"}}},
        {"id": "call_1", "name": "weather", "arguments": {"place": "Rome"}},
    ],
)
def test_calls_in_every_spelling(call):
    assert of(ask(), reply("", tool_calls=[call]))[1].calls == (CALLED,)
    assert of(ask(), reply("", tool_calls=json.dumps([call])))[1].calls == (CALLED,)


def test_the_older_function_call():
    old = of(ask(), reply(None, function_call={"name": "f", "arguments": "{}"}), {"role": "function", "name": "f",
             "content": "1"}, reply())  # fmt: skip
    assert old[1].calls == (Call("f", "{}"),)
    assert old[2] == Turn("tool", "1", name="f")


def test_sharegpt_with_functions():
    row = {
        "tools": json.dumps([TOOL["function"]]),
        "system": "s",
        "conversations": [
            {"from": "human", "value": "Rome?"},
            {"from": "function_call", "value": '{"name": "weather", "arguments": {"place": "Rome"}}'},
            {"from": "observation", "value": "sunny"},
            {"from": "gpt", "value": "Sunny."},
        ],
    }
    found = FORMATS["sharegpt"].turns(row)
    assert json.loads(found[0].content) == [TOOL]
    assert [turn.role for turn in found] == ["tools", "system", "user", "assistant", "tool", "assistant"]
    assert found[3].calls == (Call("weather", '{"place": "Rome"}'),)


@pytest.mark.parametrize("name", ROLES)
def test_every_role_name_in_both_spellings(name):
    call = '{"name": "f", "arguments": {}}'
    before = {
        "system": [], "user": [], "assistant": ["user"], "call": ["user"], "tool": ["user", "function_call"],
    }[ROLES[name]]  # fmt: skip
    behind = {"system": ["user", "assistant"], "user": ["assistant"], "assistant": [], "call": [], "tool": ["gpt"]}
    names = [*before, name, *behind[ROLES[name]]]
    texts = [call if ROLES[role] == "call" else "x" for role in names]
    of_messages = of(*({"role": role, "content": text} for role, text in zip(names, texts, strict=True)))
    row = {"conversations": [{"from": role, "value": text} for role, text in zip(names, texts, strict=True)]}
    mixed = {"conversations": [{"role": role, "value": text} for role, text in zip(names, texts, strict=True)]}
    assert of_messages == FORMATS["sharegpt"].turns(row) == FORMATS["sharegpt"].turns(mixed)


def test_text_parts_are_joined():
    parts = [{"type": "text", "text": "one "}, {"type": "text", "text": "two"}]
    assert of(ask(), reply(parts)) == turns("q", "one two")


@pytest.mark.parametrize("kind", ["image_url", "image", "input_audio", "video", "thinking"])
def test_other_parts_are_refused(kind):
    with pytest.raises(RowError, match=rf"messages\[0\].content\[1\] is of type '{kind}': only text"):
        of({"role": "user", "content": [{"type": "text", "text": "x"}, {"type": kind}]}, reply())


def test_answers_that_are_not_trained_on():
    found = of(ask(), reply(train=False), ask(), reply(weight=0), ask(), reply(weight=0.5), ask(), reply(train=True))
    assert [(turn.weight, turn.train) for turn in found if turn.role == "assistant"] == [
        (0, False), (0, False), (0.5, True), (1, True),
    ]  # fmt: skip
    assert of({**ask(), "train": False, "weight": 0}, reply()) == turns("q", "a")


def test_a_prompt_of_several_turns():
    row = {"prompt": [ask(), reply("one"), ask("more")], "completion": [reply("two")], "tools": [TOOL]}
    found = FORMATS["prompt_completion"].turns(row)
    assert [(turn.role, turn.train) for turn in found[1:]] == [
        ("user", True), ("assistant", False), ("user", True), ("assistant", True),
    ]  # fmt: skip
    with pytest.raises(RowError, match=r"completion\[0\] is a user turn but follows another user turn"):
        FORMATS["prompt_completion"].turns({"prompt": [ask()], "completion": [ask(), reply()]})
    with pytest.raises(RowError, match="completion has no assistant turn"):
        FORMATS["prompt_completion"].turns({"prompt": [ask(), reply()], "completion": [ask()]})


@pytest.mark.parametrize(
    ("items", "words"),
    [
        ([ask(), reply("", tool_calls=[CALL]), reply()], r"\[2\] is an assistant turn but follows tool calls, whose"),
        ([ask(), reply("", tool_calls=[CALL]), result(), ask(), reply()], r"\[3\] is a user turn but follows the re"),
        ([ask(), reply("", tool_calls=[CALL]), result(tool_call_id="x"), reply()], r"tool_call_id is 'x', the id of"),
        ([ask(), reply("", tool_calls=[CALL]), result()], "ends with a tool turn that has no answer"),
        ([{**ask(), "tool_calls": [CALL]}, reply()], r"\[0\] is a user turn with tool calls"),
        ([{**ask(), "tool_call_id": "x"}, reply()], r"\[0\].tool_call_id has no meaning in a user turn"),
        ([ask(), reply("", tool_calls=[3])], r"\[1\].tool_calls\[0\] is a number, must be an object with name"),
        ([ask(), reply("", tool_calls=[{"name": "f", "arguments": "["}])], r"arguments is a string that is not JSON"),
        ([ask(), reply("", tool_calls=[{"name": "f", "arguments": "[]"}])], r"arguments is a list, must be an object"),
        ([ask(), reply("", tool_calls=[{"name": "f", "arguments": '{"x": NaN}'}])], "a string that is not JSON"),
        ([ask(), reply("", tool_calls=[{"name": "f", "arguments": {"x": b""}}])], "can't be written as JSON: Object"),
        ([ask(), reply("", tool_calls=[{"name": "f", "arguments": '{"x": 1e999}'}])], "can't be written as JSON: Out"),
        ([ask(), reply("", tool_calls=[{"name": " "}])], r"tool_calls\[0\].name is empty"),
        ([ask(), reply("", tool_calls={"name": "f"})], r"tool_calls is an object, must be a list of calls"),
        ([ask(), reply("", tool_calls=[CALL], function_call=CALL)], "has tool_calls and function_call; keep one"),
        ([ask(), {"role": "function_call", "content": "f(x)"}], r"\[1\].content is a string that is not JSON"),
        ([ask(), {"role": "function_call", "content": ""}], r"\[1\].content is empty, must be a call as JSON"),
        ([ask(), reply("")], r"\[1\].content is empty"),
        ([ask(), reply([])], r"\[1\].content is empty"),
        ([ask(), reply([{"text": "x"}])], r"\[1\].content\[0\].type is missing"),
        ([ask(), reply(train="no")], r"\[1\].train is a string, must be true or false"),
        ([ask(), reply(weight=-1)], r"\[1\].weight is -1, must be a number from 0"),
        ([ask(), reply(weight=True)], r"\[1\].weight is a boolean, must be a number"),
        ([ask(), reply(weight=10**400)], r"\[1\].weight is 10000000000000000000, must be a number"),
        ([ask(), reply(train=True, weight=0)], r"says train true and weight 0; keep one of them"),
        ([{**ask(), "train": True}, reply()], r"\[0\] asks to train on a user turn"),
    ],
)  # fmt: skip
def test_bad_conversations(items, words):
    with pytest.raises(RowError, match=words):
        of(*items)


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ({"tools": 3}, "tools is a number, must be a list of tools"),
        ({"tools": "x"}, "tools is a string that is not JSON"),
        ({"tools": ["x"]}, r"tools\[0\] is a string, must be an object"),
        ({"tools": [{"function": 3}]}, r"tools\[0\].function is a number"),
        ({"tools": "[" * 5000}, "tools is a string that is not JSON"),
        ({"images": ["x.png"]}, "images are not read: only text can be trained on"),
        ({"system": "s"}, r"system is given twice, in system and in messages\[0\]"),
    ],
)
def test_bad_fields_beside_a_conversation(row, words):
    with pytest.raises(RowError, match=words):
        of({"role": "system", "content": "s"}, ask(), reply(), **row)


def test_no_tools_at_all():
    for nothing in (None, [], "", "[]"):
        assert of(ask(), reply(), tools=nothing) == turns("q", "a")
