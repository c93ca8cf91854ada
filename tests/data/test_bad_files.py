"""What is wrong with files is said with file, line and reason; nothing is raised, nothing is left out."""

from __future__ import annotations

import builtins
import json
import os
import subprocess
import sys

import pytest

from rankwise.data.config import Reading
from rankwise.data.readers import lines as line_reader
from rankwise.data.readers.records import MAX_ROW_BYTES
from rankwise.data.rows import Problem, read_rows
from rankwise.errors import RequestError
from tests.data.builders import write_rows

GOOD = b'{"text": "good"}'


def problems_of(path, content: bytes) -> list[tuple[int, str]]:
    path.write_bytes(content)
    return [(problem.line, problem.reason) for problem in read_rows(str(path)).problems]


@pytest.mark.parametrize(
    ("line", "words"),
    [
        (b'{"text": "a\0b"}', "the line holds a NUL byte, at byte 12 of the line"),
        (b"\0" * 20, "the line holds a NUL byte, at byte 1"),
        (b'{"text": "\xff"}', "not UTF-8: byte 0xFF at byte 11 of the line"),
        (b'{"text": "a", "text": "b"}', "the key 'text' stands twice in one object"),
        (b'{"text": "a", "more": {"x": 1, "x": 2}}', "the key 'x' stands twice"),
        (b'{"text": NaN}', "holds NaN, which is no JSON value"),
        (b'{"text": "a", "x": [-Infinity]}', "holds -Infinity"),
        (b'{"text": "a", "x": 1e999}', "holds the number 1e999, which is too large"),
        (b'{"text": "a", "x": ' + b"9" * 5000 + b"}", "Exceeds the limit (4300 digits)"),
        (b'{"text": "a"} {"text": "b"}', "not JSON: more follows the value at column 15"),
        (b'{"text": "a", "x": ' + b"[" * 150 + b"]" * 150 + b"}", "nested more than 100 deep"),
        (b'{"text": "a", "x": ' + b'{"x":' * 90_000 + b"1" + b"}" * 90_001, "nested more than 100 deep"),
        (b'{"text": "\\udc00"}', "half of a surrogate pair"),
        (b'{"\\ud800": 1, "text": "x"}', "half of a surrogate pair"),
        (b'{"text": "cut', "not JSON: Unterminated string starting at column 10"),
        (b'"text"', "the line is a string, must be an object"),
    ],
)  # fmt: skip
def test_lines_of_jsonl(tmp_path, line, words):
    ((number, reason),) = problems_of(tmp_path / "rows.jsonl", GOOD + b"\n" + line + b"\n" + GOOD)
    assert number == 2
    assert words in reason and "\n" not in reason and len(reason) < 200


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b'[{"text": "a"},\n {"text": "b", "text": "c"},\n 3,\n {"text": NaN}]',
         [(2, "the key 'text' stands twice in one object"), (3, "the element is a number, must be an object"),
          (4, "holds NaN, which is no JSON value")]),
        (b'[{"text": "a"},\n{"text": }]', [(2, "not JSON: Expecting value at column 10")]),
        (b'[{"text": "a"}\n{"text": "b"}]', [(2, "not JSON: a comma is missing, or the list is not closed")]),
        (b'[{"text": "a"},\n', [(2, "not JSON: Expecting value at column 1")]),
        (b'[{"text": "a"}] x', [(1, "not JSON: more follows the value")]),
        (b'[\n{"text": "\xe4"}]', [(2, "not UTF-8: byte 0xE4")]),
        (b"[]", [(1, "the file has no rows")]),
        (b" ", [(1, "the file has no rows")]),
        (b'"text"', [(1, "the file is a string, must be an object")]),
        (b"\xff\xfe[\0", [(1, "is UTF-16; save it as UTF-8")]),
    ],
)  # fmt: skip
def test_json_files(tmp_path, content, expected):
    assert problems_of(tmp_path / "rows.json", content) == expected


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b"text,x\na,1\nb\nc,3,4\n\nd,5\n",
         [(3, "the row has 1 field, the header 2"), (4, "the row has 3 fields, the header 2")]),
        (b'text,x\n"a"b,1\nc,2\n', [(2, "the row has text behind the closing quote of field 1")]),
        (b'text\na\n"b\nc\n', [(3, "a quote is opened and not closed: nothing from here on can be read")]),
        (b"text,text\na,b\n", [(1, "the column 'text' stands twice; rename one")]),
        (b"text\n\xff\nb\n", [(2, "the row is not UTF-8: byte 0xFF at byte 1 of the line")]),
        (b'text\n"a\n\xff"\nb\n', [(2, "the row is not UTF-8: byte 0xFF at byte 1 of the line")]),
        (b"text\na\0b\n", [(2, "the row holds a NUL byte, at byte 2 of the line")]),
        (b"\xff,text\na,b\n", [(1, "the header is not UTF-8: byte 0xFF at byte 1 of the line")]),
        (b"text\n", [(1, "the file has no rows")]),
        (b"", [(1, "the file has no rows")]),
    ],
)  # fmt: skip
def test_csv_files(tmp_path, content, expected):
    assert problems_of(tmp_path / "rows.csv", content) == expected


def test_quotes_inside_of_fields(tmp_path):
    path = tmp_path / "rows.tsv"
    path.write_bytes(b'text\tx\n5" tall\t1\n"say ""hi"""\t""\nplain "quoted" word\t2\r\n')
    assert [row.turns[0].content for row in read_rows(str(path)).rows] == ['5" tall', 'say "hi"', 'plain "quoted" word']


@pytest.mark.parametrize("text_rows", ["line", "paragraph"])
def test_text_files(tmp_path, text_rows):
    path = tmp_path / "rows.txt"
    path.write_bytes(b"a\n\n\xff\n\nb\0\n\nc")
    found = read_rows(str(path), Reading(text_rows=text_rows))
    assert [row.line for row in found.rows] == [1, 7]
    assert [problem.line for problem in found.problems] == [3, 5]


@pytest.mark.parametrize("content", [b"[\n" + GOOD + b"\n]", b"[" + GOOD + b"]", b'{\n"text": "a"\n}'])
def test_jsonl_that_is_json(tmp_path, content):
    ((_, reason),) = problems_of(tmp_path / "rows.jsonl", content)
    assert "name" in reason and ".json" in reason


def test_long_lines_are_bounded(tmp_path, monkeypatch):
    monkeypatch.setattr(line_reader, "MAX_ROW_BYTES", 100)
    long = b'{"text": "' + b"x" * 3 * 2**20 + b'"}'
    content = GOOD + b"\n" + long + b"\n" + GOOD
    assert problems_of(tmp_path / "rows.jsonl", content) == [(2, "the line is 3 MiB long; 0 MiB is the most")]
    assert [line for line, _ in problems_of(tmp_path / "rows.txt", content)] == [2]
    assert [line for line, _ in problems_of(tmp_path / "rows.csv", b"text\n" + content)] == [3]
    fits = b'{"text": "' + b"x" * 88 + b'"}'
    assert problems_of(tmp_path / "rows.jsonl", fits + b"\n" + fits) == []


BOUNDED = """
import resource, sys
from rankwise.data.rows import read_rows
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
rows = read_rows(sys.argv[1])
print(len(rows.rows), [(p.line, p.reason) for p in rows.problems])
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""


def test_a_line_of_100_mb_takes_little_memory(tmp_path):
    path = tmp_path / "rows.jsonl"
    with open(path, "wb") as file:
        file.write(GOOD + b'\n{"text": "')
        for _ in range(100):
            file.write(b"x" * 2**20)
        file.write(b'"}\n' + GOOD)
    done = subprocess.run([sys.executable, "-c", BOUNDED, str(path)], capture_output=True, text=True, check=True)
    found, grown = done.stdout.splitlines()
    assert found == "2 [(2, 'the line is 100 MiB long; 16 MiB is the most')]"
    assert int(grown) * 1024 < 4 * MAX_ROW_BYTES, "more memory than a few bounded lines"


def test_marks_of_other_encodings(tmp_path):
    assert problems_of(tmp_path / "a.jsonl", '{"text": "x"}'.encode("utf-16")) == [(1, "is UTF-16; save it as UTF-8")]
    assert problems_of(tmp_path / "a.csv", "text\nx".encode("utf-16")) == [(1, "is UTF-16; save it as UTF-8")]


def test_files_that_are_none(tmp_path):
    (tmp_path / "round.jsonl").symlink_to(tmp_path / "round.jsonl")
    (tmp_path / "gone.jsonl").symlink_to(tmp_path / "nothing")
    for name in ("round", "gone"):
        with pytest.raises(RequestError, match="is a symbolic link that leads to no file, or round in a circle"):
            read_rows(str(tmp_path / f"{name}.jsonl"))
    os.mkfifo(tmp_path / "pipe.jsonl")
    with pytest.raises(RequestError, match="is no regular file"):
        read_rows(str(tmp_path / "pipe.jsonl"))
    with pytest.raises(RequestError, match="is an address; download it first"):
        read_rows("https://example.org/rows.jsonl")
    for name in ("x" * 5000, "a\0b"):
        with pytest.raises(RequestError, match="does not exist"):
            read_rows(str(tmp_path / name))


def test_every_missing_file_is_named(tmp_path):
    good = write_rows(tmp_path / "good.jsonl", [{"text": "a"}])
    with pytest.raises(RequestError, match=r"one.jsonl' does not exist.*; .*two.jsonl' does not exist"):
        read_rows([str(tmp_path / "one.jsonl"), good, str(tmp_path / "two.jsonl")])


def test_no_right_to_read(tmp_path, monkeypatch):
    paths = [write_rows(tmp_path / f"{name}.jsonl", [{"text": name}]) for name in ("secret", "open")]
    opened = builtins.open

    def refusing(path, *args, **kwargs):
        if "secret" in str(path):
            raise PermissionError(13, "Permission denied", str(path))
        return opened(path, *args, **kwargs)

    monkeypatch.setattr(builtins, "open", refusing)
    found = read_rows(paths)
    assert found.problems == (Problem(paths[0], 1, "can't be read from here on: Permission denied", of_file=True),)
    assert [row.file for row in found.rows] == paths[1:]


def test_a_failing_disk_keeps_what_was_read(tmp_path, monkeypatch):
    path = write_rows(tmp_path / "rows.jsonl", [{"text": "a"}, {"text": "b"}])

    def failing(stream):
        yield from list(line_reader.lines(stream))[:1]
        raise OSError(5, "Input/output error")

    monkeypatch.setattr("rankwise.data.readers.json_files.lines", failing)
    found = read_rows(path)
    assert [row.line for row in found.rows] == [1]
    assert [str(problem) for problem in found.problems] == [f"{path}:2: can't be read from here on: Input/output error"]


def test_the_format_is_told_by_the_first_rows(tmp_path):
    rows = [{"text": "x"}] * 1000 + [{"prompt": "q", "completion": "a"}] * 2000
    path = write_rows(tmp_path / "rows.jsonl", rows)
    found = read_rows(path)
    assert "1,000 of the first 1,000 rows have text" in found.why
    assert (len(found.rows), len(found.problems)) == (1000, 2000)
    assert found.problems[0] == Problem(path, 1001, "text is missing")
    assert json.dumps([problem.line for problem in found.problems]) == json.dumps(list(range(1001, 3001)))
