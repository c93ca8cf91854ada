from __future__ import annotations

import json

import pytest

from rankwise.data.config import Reading
from rankwise.data.rows import BadRows, Problem, expand, read_rows
from rankwise.errors import RequestError
from tests.data.builders import FIXTURES, WRITTEN, messages, turns, write_rows

FAULTS = [json.loads(line) for line in (FIXTURES / "broken" / "faults.jsonl").read_text().splitlines()]
BROKEN = sorted({fault["file"] for fault in FAULTS})
WORDS = {
    "bad_json": "not JSON",
    "bad_utf8": "not UTF-8: byte 0xFF",
    "missing_field": "is missing",
    "wrong_type": "must be",
    "empty_answer": "is empty",
}


@pytest.mark.parametrize("format", ["auto", "as named"])
@pytest.mark.parametrize("file", BROKEN)
def test_every_fault_is_found_and_nothing_else(file, format):
    name = file.removeprefix("broken/").removeprefix("single/").split(".")[0]
    expected = {fault["line"]: fault for fault in FAULTS if fault["file"] == file}
    rows = read_rows(str(FIXTURES / file), Reading("auto" if format == "auto" else name))
    assert [problem.line for problem in rows.problems] == sorted(expected)
    for problem in rows.problems:
        fault = expected[problem.line]
        assert problem.file == str(FIXTURES / file)
        assert WORDS[fault["fault"]] in problem.reason
        if fault["fault"] in ("missing_field", "wrong_type", "empty_answer"):
            assert problem.reason.startswith(fault["detail"].split(" ")[0] + " ")
    assert [row.line for row in rows.rows] == [line for line in range(1, 21) if line not in expected]
    assert rows.format == name


def test_there_are_broken_files_of_every_format():
    assert {file.removeprefix("broken/single/").split(".")[0] for file in BROKEN if "single" in file} == set(WRITTEN)
    assert len(BROKEN) == 6 * len(WRITTEN)


def test_good_files_hold_the_same_conversations():
    files = {name: read_rows(str(FIXTURES / f"{name}.jsonl")) for name in WRITTEN}
    assert all(not rows.problems and len(rows.rows) == 20 for rows in files.values())
    asked = {name: [row.turns for row in rows.rows] for name, rows in files.items()}
    assert asked["messages"] == asked["sharegpt"] == asked["prompt_completion"]
    assert [row[-1] for row in asked["alpaca"]] == [row[-1] for row in asked["messages"]]


def test_marks_line_ends_and_blank_lines(tmp_path):
    path = tmp_path / "rows.jsonl"
    row = json.dumps(messages("q", "a\u2028b")).encode()
    path.write_bytes(b"\xef\xbb\xbf" + row + b"\r\n\r\n" + row + b"\r\n   \n" + row)
    rows = read_rows(str(path))
    assert [row.line for row in rows.rows] == [1, 3, 5]
    assert (rows.num_blank, rows.problems) == (2, ())
    assert rows.rows[0].turns == turns("q", "a\u2028b")


def test_a_raw_line_separator_does_not_end_a_line(tmp_path):
    path = write_rows(tmp_path / "rows.jsonl", [messages("q", "a\u2028b\u0085c")])
    assert read_rows(path).rows[0].turns[1].content == "a\u2028b\u0085c"


@pytest.mark.parametrize(
    ("line", "words"),
    [
        (b"[1, 2]", "the line is a list, must be an object"),
        (b"null", "the line is null, must be an object"),
        (b'{"text": "\\ud83d"}', "half of a surrogate pair"),
        (b'{"text": ' + b"[" * 100_000, "not JSON"),
        (b'{"text": ' + b"1" * 5000 + b"}", "not JSON"),
    ],
)
def test_lines_that_are_no_rows(tmp_path, line, words):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b'{"text": "\\ud83d\\ude00"}\n' + line + b"\n")
    rows = read_rows(str(path))
    assert [problem.line for problem in rows.problems] == [2]
    assert words in rows.problems[0].reason
    assert rows.rows[0].turns[0].content == "\N{GRINNING FACE}"


@pytest.mark.parametrize("content", [b"", b"\n \n", b"\xef\xbb\xbf"])
def test_a_blank_file_is_a_problem(tmp_path, content):
    path = tmp_path / "blank.jsonl"
    path.write_bytes(content)
    assert read_rows(str(path)).problems == (Problem(str(path), 1, "the file has no rows", of_file=True),)


def test_a_file_of_bad_lines_only(tmp_path):
    path = tmp_path / "bad.jsonl"
    path.write_bytes(b"nonsense\n\xff\n")
    assert [problem.line for problem in read_rows(str(path)).problems] == [1, 2]


def test_missing_files_name_the_nearest(tmp_path):
    write_rows(tmp_path / "train.jsonl", [])
    with pytest.raises(RequestError, match=r"trian.jsonl' does not exist; did you mean 'train.jsonl'"):
        read_rows(str(tmp_path / "trian.jsonl"))
    with pytest.raises(RequestError, match="nor does its folder"):
        read_rows(str(tmp_path / "no" / "train.jsonl"))
    with pytest.raises(RequestError, match="no data file matches"):
        read_rows(str(tmp_path / "*.json"))


def test_lists_and_patterns(tmp_path):
    one, two = (write_rows(tmp_path / f"{name}.jsonl", [{"text": name}]) for name in ("b", "a"))
    assert expand([one, two]) == [one, two]
    assert expand(str(tmp_path / "*.jsonl")) == [two, one]
    odd = write_rows(tmp_path / "odd[1].jsonl", [{"text": "odd"}])
    assert expand(odd) == [odd]
    with pytest.raises(RequestError, match="named twice"):
        expand([one, str(tmp_path / "*.jsonl")])


def test_files_of_several_formats(tmp_path):
    files = [
        write_rows(tmp_path / "a.jsonl", [messages("q", "a"), {"messages": 3}]),
        write_rows(tmp_path / "b.jsonl", [{"prompt": "q", "completion": "a"}, {"prompt": "q", "completion": ""}]),
    ]
    rows = read_rows(files)
    assert rows.format == "messages, prompt_completion"
    assert [(problem.file, problem.line) for problem in rows.problems] == [(files[0], 2), (files[1], 2)]
    assert {row.turns for row in rows.rows} == {turns("q", "a")}
    assert "b.jsonl: prompt_completion (2 of 2 rows have prompt and completion; JSONL)" in rows.why


def test_bad_rows_show_the_first_and_keep_all():
    error = BadRows([Problem("f", line, "text is empty") for line in range(1, 9)])
    assert error.code == 2
    assert len(error.problems) == 8
    assert error.message == (
        "8 bad rows, correct or remove: first f:1: text is empty (`rankwise data preview` lists all 8)"
    )
    assert str(error).splitlines()[1:] == error.details
    assert error.details == [f"f:{line}: text is empty" for line in range(1, 9)]
    many = BadRows([Problem("f", line, "text is empty") for line in range(1, 1030)])
    assert (len(many.details), many.details[-2:]) == (21, ["f:20: text is empty", "and 1,009 more"])
    assert BadRows([Problem("f", 2, "text is empty")]).message == "1 bad row, correct or remove: f:2: text is empty"
