from __future__ import annotations

import pytest

from rankwise.data.formats import FORMATS, RowError, Turn, detect
from rankwise.data.preferences import first
from rankwise.errors import RequestError
from tests.data.builders import turns

ROWS = {
    "translation": {"translation": {"en": "q", "fr": "a"}},
    "messages": {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]},
    "prompt_completion": {"prompt": "q", "completion": "a"},
    "text": {"text": "q a"},
    "alpaca": {"instruction": "q", "output": "a"},
    "preference": {"prompt": "q", "chosen": "a", "rejected": "b"},
    "sharegpt": {"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]},
}


HEADS = {"label", "labels", "tags", "pairs"}
"""Formats whose rows are in test_label_formats.py."""


def test_every_format_has_a_row_here():
    assert set(ROWS) == set(FORMATS) - HEADS


@pytest.mark.parametrize("name", ROWS)
def test_each_is_read_and_recognised_alone(name):
    expected = (Turn("text", "q a"),) if name == "text" else turns("q", "a")
    assert first(FORMATS[name].turns(ROWS[name])) == expected
    assert detect([(1, ROWS[name])], "f")[0] == name


def test_the_reason_says_what_was_seen():
    rows = [(line, ROWS["alpaca"]) for line in (1, 2, 3)] + [(4, {"instruction": "q"})]
    assert detect(rows, "f") == ("alpaca", "3 of 4 rows have instruction and output")


@pytest.mark.parametrize(
    ("rows", "words"),
    [
        ([{"messages": [], "text": ""}], r"messages \(1 of 1 row\) and text .*; line 1 has the keys messages, text"),
        ([ROWS["alpaca"], ROWS["text"]], r"text \(1 of 2 rows\) and alpaca \(1 of 2 rows\)"),
        ([{"question": "q", "reply": "a"}], "line 1 has the keys question, reply; known formats: messages"),
        ([{}], "line 1 has no keys"),
    ],
)  # fmt: skip
def test_none_or_several_are_refused(rows, words):
    with pytest.raises(RequestError, match=words):
        detect(list(enumerate(rows, start=1)), "f")


@pytest.mark.parametrize(
    ("row", "content"),
    [
        ({"instruction": "Do.", "input": "This.", "output": "a"}, "Do.\n\nThis."),
        ({"instruction": "Do.", "input": "", "output": "a"}, "Do."),
        ({"instruction": "Do.", "input": None, "output": "a"}, "Do."),
        ({"instruction": "", "input": "This.", "output": "a"}, "This."),
    ],
)
def test_alpaca_input_follows_its_instruction(row, content):
    assert FORMATS["alpaca"].turns(row) == turns(content, "a")


def test_system_prompts():
    alpaca = {"system": "s", "instruction": "q", "output": "a"}
    assert FORMATS["alpaca"].turns(alpaca) == turns("q", "a", system="s")
    assert FORMATS["sharegpt"].turns({"system": "s", **ROWS["sharegpt"]}) == turns("q", "a", system="s")
    assert FORMATS["sharegpt"].turns({"system": "", **ROWS["sharegpt"]}) == turns("q", "a")
    with_turn = {"conversations": [{"from": "system", "value": "s"}, *ROWS["sharegpt"]["conversations"]]}
    assert FORMATS["sharegpt"].turns(with_turn) == turns("q", "a", system="s")


def test_sharegpt_reads_role_and_content_too():
    row = {"conversations": ROWS["messages"]["messages"]}
    assert FORMATS["sharegpt"].turns(row) == turns("q", "a")


def conversation(*roles: str, **more: object) -> dict:
    return {"messages": [{"role": role, "content": "x", **more} for role in roles]}


@pytest.mark.parametrize(
    ("name", "row", "words"),
    [
        ("messages", {}, "messages is missing"),
        ("messages", {"messages": "x"}, "messages is a string, must be a list"),
        ("messages", {"messages": []}, "messages is empty"),
        ("messages", {"messages": ["x"]}, r"messages\[0\] is a string, must be an object"),
        ("messages", {"messages": [{"content": "x"}]}, r"messages\[0\].role is missing"),
        ("messages", {"messages": [{"role": "user", "content": ["x"]}]}, r"messages\[0\].content\[0\] is a string"),
        ("messages", conversation("user"), "no assistant turn"),
        ("messages", conversation("user", "user", "assistant"), r"messages\[1\] is a user turn but follows another"),
        ("messages", conversation("user", "assistant", "assistant"), r"messages\[2\] is an assistant turn but follows"),
        ("messages", conversation("assistant"), r"messages\[0\] is an assistant turn but comes first"),
        ("messages", conversation("system", "assistant"), r"messages\[1\] is an assistant turn but comes first"),
        ("messages", conversation("user", "system", "assistant"), r"messages\[1\] is a system turn"),
        ("messages", conversation("user", "assistant", "user"), "ends with a user turn"),
        ("messages", conversation("user", "asistant"), r"messages\[1\].role is 'asistant'; did you mean 'assistant'"),
        ("messages", conversation("user", "tool"), "no assistant turn"),
        ("messages", conversation("user", "tool", "assistant"), r"messages\[1\] is a tool turn but follows no"),
        ("messages", conversation("user", "assistant", weight=0), "no assistant turn that is trained on"),
        ("messages", conversation("user", "assistant", thinking="hm"), r"messages\[0\].thinking is not read"),
        ("messages", {**conversation("user", "assistant"), "tools": [{}]}, r"tools\[0\].name is missing"),
        ("prompt_completion", {"prompt": "q", "completion": " \n"}, "completion is empty"),
        ("prompt_completion", {"prompt": "", "completion": "a"}, "prompt is empty"),
        ("prompt_completion", {"prompt": "q", "completion": None}, "completion is null, must be a string"),
        ("prompt_completion", {"prompt": True, "completion": "a"}, "prompt is a boolean, must be a string"),
        ("text", {"text": {}}, "text is an object, must be a string"),
        ("alpaca", {"instruction": "", "input": "", "output": "a"}, "instruction is empty"),
        ("alpaca", {"instruction": "q", "input": 1, "output": "a"}, "input is a number, must be a string"),
        ("alpaca", {"instruction": "q", "output": "a", "history": [["q", "a"]]}, "history is not read"),
        ("sharegpt", {"conversations": [{"from": "human"}]}, r"conversations\[0\].value is missing"),
        ("sharegpt", {"conversations": [{"from": "robot", "value": "x"}]}, r"conversations\[0\].from is 'robot'"),
    ],
)  # fmt: skip
def test_bad_rows_say_what_is_wrong(name, row, words):
    with pytest.raises(RowError, match=words):
        FORMATS[name].turns(row)


def test_one_row_is_one():
    assert detect([(1, ROWS["text"])], "f") == ("text", "1 of 1 row has text")
    assert detect([(1, ROWS["text"]), (2, ROWS["text"])], "f") == ("text", "2 of 2 rows have text")
