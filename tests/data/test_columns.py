"""Any columns as fields of a format: text moves, nothing runs, and what is missing is named."""

from __future__ import annotations

import json

import pytest

from rankwise.config import build
from rankwise.data.columns import Columns
from rankwise.data.config import DataConfig, Reading
from rankwise.data.fields import RowError
from rankwise.data.preferences import both
from rankwise.data.rows import read_rows
from rankwise.errors import RequestError
from tests.data.builders import turns, write_rows

ROW = {
    "question": "Who?", "context": "Ada wrote.", "answers": {"text": ["Ada", "She"], "start": [0]}, "n": 3, "x": 0.5,
    "ok": True, "none": None, "a.b": "dotted", "a": {"b": "inside"}, "list": [1],
}  # fmt: skip


@pytest.mark.parametrize(
    ("source", "value"),
    [
        ("question", "Who?"),
        ("list", [1]),
        ("none", None),
        ("answers.text.1", "She"),
        ("a.b", "dotted"),
        ("{question}\n{context}", "Who?\nAda wrote."),
        ("{a.b} {answers.text.0}", "dotted Ada"),
        ("{n} {x} {ok}", "3 0.5 true"),
        ("{{{n}}} {{n}}", "{3} {n}"),
        ("Q: {question}", "Q: Who?"),
    ],
)
def test_columns_and_texts(source, value):
    assert Columns({"prompt": source}).apply(ROW) == {"prompt": value}


@pytest.mark.parametrize(
    "source",
    [
        "{question.__class__}", "{question[0]}", "{question!r}", "{n:>10}", "{f()}", "{}", "{ }", "{question", "n}",
        "{{question}", "{a{b}}", "", " ",
    ],
)  # fmt: skip
def test_nothing_else_stands_between_braces(source):
    if source == "{question.__class__}":  # a path like any other: no column has it
        with pytest.raises(RequestError, match=r"takes the column 'question.__class__', which no row of 'f' has"):
            Columns({"prompt": source}).check([(1, ROW)], "f", is_start=False)
        return
    with pytest.raises(RequestError, match=r"data\.columns\.prompt"):
        Columns({"prompt": source})


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ({"context": "x"}, "column 'question' is missing, for data.columns.prompt"),
        ({"question": None}, "column 'question' is null, must be text or a number"),
        ({"question": ["x"]}, "column 'question' is a list, must be text or a number"),
    ],
)
def test_rows_that_make_no_text(row, words):
    with pytest.raises(RowError, match=words):
        Columns({"prompt": "{question}"}).apply(row)


def test_a_column_that_no_row_has_names_the_nearest(tmp_path):
    path = write_rows(tmp_path / "rows.jsonl", [ROW, ROW])
    for source, near in (("qestion", "question"), ("{contxt}", "context"), ("answers.txt", "answers.text")):
        with pytest.raises(RequestError, match=rf"which no row of .* has; did you mean '{near}'"):
            read_rows(path, Reading(columns={"prompt": source, "completion": "question"}))


def test_rows_of_any_columns_in_any_kind_of_file(tmp_path):
    reading = Reading(columns={"prompt": "{question}\n{context}", "completion": "answer"}, system="Be brief.")
    (tmp_path / "rows.csv").write_text("id,question,context,answer\n1,Who?,Ada wrote.,Ada\n2,What?,,Code\n")
    rows = [{"question": "Who?", "context": "Ada wrote.", "answer": "Ada", "text": "not read"}]
    write_rows(tmp_path / "rows.jsonl", [*rows, {"question": "Who?", "context": "x"}, {"context": "x", "answer": 3}])
    found = read_rows([str(tmp_path / "rows.csv"), str(tmp_path / "rows.jsonl")], reading)
    assert [row.turns for row in found.rows] == [
        turns("Who?\nAda wrote.", "Ada", system="Be brief."),
        turns("What?\n", "Code", system="Be brief."),
        turns("Who?\nAda wrote.", "Ada", system="Be brief."),
    ]
    assert found.format == "prompt_completion"
    assert [(problem.line, problem.reason) for problem in found.problems] == [
        (2, "completion is missing (data.columns.completion: 'answer')"),
        (3, "column 'question' is missing, for data.columns.prompt"),
    ]


def test_fields_of_every_type(tmp_path):
    talk = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
    path = write_rows(tmp_path / "rows.jsonl", [{"dialog": {"turns": talk}, "persona": "s"}])
    found = read_rows(path, Reading(columns={"messages": "dialog.turns", "system": "persona"}, system="not this"))
    assert [row.turns for row in found.rows] == [turns("q", "a", system="s")]


def test_optional_fields_may_be_missing_in_a_row(tmp_path):
    rows = [{"do": "x", "with": "y", "done": "z"}, {"do": "x", "done": "z"}]
    path = write_rows(tmp_path / "rows.jsonl", rows)
    found = read_rows(path, Reading(columns={"instruction": "do", "input": "with", "output": "done"}))
    assert [row.turns for row in found.rows] == [turns("x\n\ny", "z"), turns("x", "z")]


@pytest.mark.parametrize(
    ("reading", "words"),
    [
        (Reading(columns={"prompt": "question", "completion": "context", "input": "n"}), "columns.input has no effect"),
        (Reading(columns={"text": "question"}, system="s"), "data.system has no effect on the rows of .* format text"),
        (Reading(columns={"prompt": "question"}), "no format fits the rows"),
        (Reading("alpaca", columns={"prompt": "question", "completion": "context"}), "columns.prompt has no effect"),
    ],
)  # fmt: skip
def test_settings_without_effect(tmp_path, reading, words):
    path = write_rows(tmp_path / "rows.jsonl", [ROW])
    with pytest.raises(RequestError, match=words):
        read_rows(path, reading)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"columns": {}}, "data.columns is empty and has no effect"),
        ({"columns": {"promt": "x"}}, "no format has the field 'promt'; did you mean 'prompt'"),
        ({"columns": {"prompt": "{x!r}"}}, "between braces stands the name of a column and nothing else"),
        ({"columns": {"prompt": 3}}, "data.columns must be a mapping, each value text"),
        ({"system": " "}, "data.system is empty"),
        ({"system": "s", "format": "text"}, "data.system has no effect on rows of format text"),
        ({"on_bad_row": "ignore"}, "data.on_bad_row can't be 'ignore'; known: error, skip"),
        ({"text_rows": "lines"}, "data.text_rows can't be 'lines'; did you mean 'line'"),
    ],
)
def test_settings_are_checked(settings, words):
    with pytest.raises(RequestError, match=words):
        build(DataConfig, {"train": "a.jsonl", **settings}, "data")


def test_settings_are_what_reading_takes():
    columns = {"prompt": "q", "completion": "a"}
    config = build(DataConfig, {"train": "a", "columns": columns, "system": "s", "text_rows": "paragraph"}, "data")
    assert config.reading == Reading("auto", "paragraph", columns, "s")
    assert json.dumps(config.columns) == json.dumps(columns)


def test_a_system_prompt_stands_in_both_conversations_of_a_pair(tmp_path):
    path = write_rows(tmp_path / "rows.jsonl", [{"ask": "q", "good": "a", "bad": "b"}])
    columns = {"prompt": "ask", "chosen": "good", "rejected": "bad"}
    (row,) = read_rows(path, Reading(columns=columns, system="s")).rows
    assert both(row.turns) == (turns("q", "a", system="s"), turns("q", "b", system="s"))


@pytest.mark.parametrize(
    ("columns", "format"),
    [
        ({"text": "a", "label": "b"}, "label"),
        ({"text": "a", "text_pair": "c", "label": "b"}, "label"),
        ({"anchor": "a", "positive": "b", "negative": "c"}, "pairs"),
        ({"words": "d", "tags": "d"}, "tags"),
    ],
)
def test_every_format_takes_its_optional_fields(tmp_path, columns, format):
    path = write_rows(tmp_path / "rows.jsonl", [{"a": "x", "b": "y", "c": "z", "d": ["x"]}])
    found = read_rows(path, Reading(columns=columns))
    assert (found.format, found.problems, len(found.rows)) == (format, (), 1)
