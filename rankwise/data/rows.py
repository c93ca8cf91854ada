"""JSONL files to rows of canonical turns, with every bad line found in one pass.

Lines are read as bytes, so that a line that is not UTF-8 is a problem of that line and not of the file. Blank lines
are skipped and counted; a byte order mark and CRLF line ends are accepted. Lines count from 1.
"""

from __future__ import annotations

import glob  # a pattern may be absolute, which Path.glob does not take
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rankwise.data.config import AUTO
from rankwise.data.formats import FORMATS, RowError, Turns, detect, type_name
from rankwise.errors import RequestError, counted, did_you_mean

_SHOWN_PROBLEMS = 5
_OTHER_SUFFIXES = {".csv", ".tsv", ".parquet", ".arrow", ".gz", ".zip", ".zst", ".bz2", ".xz"}
_UTF16_MARKS = (b"\xff\xfe", b"\xfe\xff")
_UTF8_MARK = b"\xef\xbb\xbf"


@dataclass(frozen=True)
class Problem:
    """One line that can't be used, and why. Lines count from 1."""

    file: str
    line: int
    reason: str

    def __str__(self) -> str:
        return f"{self.file}:{self.line}: {self.reason}"


class BadRows(RequestError):  # noqa: N818 (it is a list of them)
    """Rows that can't be used: all of them, in `problems`; the message shows the first few."""

    def __init__(self, problems: Sequence[Problem]):
        self.problems = list(problems)
        shown = "; ".join(str(problem) for problem in self.problems[:_SHOWN_PROBLEMS])
        rest = len(self.problems) - _SHOWN_PROBLEMS
        more = f"; and {rest} more (`rankwise data preview` lists all)" if rest > 0 else ""
        super().__init__(f"{counted(len(self.problems), 'bad row')}, correct or remove: {shown}{more}")


@dataclass(frozen=True)
class Row:
    """One row, and where it stands."""

    file: str
    line: int
    turns: Turns


@dataclass(frozen=True)
class Rows:
    """What the files hold. `format`: the formats found, joined by commas; `why`: one reason for each file."""

    rows: tuple[Row, ...]
    problems: tuple[Problem, ...]
    format: str
    why: str
    num_blank: int


def num_leaked(rows: Rows, training: Rows) -> int:
    """How many of `rows` are training rows too, compared as turns, letter by letter."""
    seen = {row.turns for row in training.rows}
    return sum(row.turns in seen for row in rows.rows)


def leak_warning(split: str, count: int) -> str:
    """What is said of leaked rows."""
    return f"{split}: {counted(count, 'row')} also in the training files"


def read_rows(paths: str | Sequence[str], format: str = AUTO) -> Rows:
    """Reads all files. Bad lines are in `problems`: nothing is raised for them.

    Args:
        paths: a path, a pattern, or a list of these.
        format: a name of `FORMATS`, or `auto` to recognise each file by its keys.

    Raises: RequestError for a missing file, one that is not JSONL, or rows whose format can't be told.
    """
    rows: list[Row] = []
    problems: list[Problem] = []
    formats: dict[str, None] = {}
    reasons: list[str] = []
    num_blank = 0
    files = expand(paths)
    for file in files:
        lines, bad, blank = _objects(file)
        num_blank += blank
        problems += bad
        if not lines:
            if not bad:
                problems.append(Problem(file, 1, "the file has no rows"))
            continue
        name, why = detect(lines, file) if format == AUTO else (format, "as set")
        formats[name] = None
        reasons.append(f"{file}: {name} ({why})")
        good, bad = _converted(lines, name, file)
        rows += good
        problems += bad
    place = {file: index for index, file in enumerate(files)}
    problems.sort(key=lambda problem: (place[problem.file], problem.line))
    return Rows(tuple(rows), tuple(problems), ", ".join(formats), "; ".join(reasons), num_blank)


def expand(paths: str | Sequence[str]) -> list[str]:
    """The files that paths and patterns name, in the order given; a pattern's in the order of their names.

    Raises: RequestError for what isn't there.
    """
    files: list[str] = []
    for path in [paths] if isinstance(paths, str) else paths:
        if Path(path).is_file():
            files.append(path)
        elif glob.has_magic(path):
            found = glob.glob(path, recursive=True)  # noqa: PTH207
            matches = sorted(match for match in found if Path(match).is_file())
            if not matches:
                raise RequestError(f"no data file matches '{path}'")
            files += matches
        elif Path(path).is_dir():
            raise RequestError(f"data file '{path}' is a folder; name its files, as in '{path.rstrip('/')}/*.jsonl'")
        else:
            folder = Path(path).parent
            if not folder.is_dir():
                raise RequestError(f"data file '{path}' does not exist; nor does its folder")
            there = [item.name for item in folder.iterdir() if item.is_file()]
            raise RequestError(f"data file '{path}' does not exist{did_you_mean(Path(path).name, sorted(there))}")
    twice = next((file for file in files if files.count(file) > 1), None)
    if twice is not None:
        raise RequestError(f"data file '{twice}' is named twice; name it once")
    return files


def _objects(file: str) -> tuple[list[tuple[int, Mapping[str, Any]]], list[Problem], int]:
    """The JSON objects of a file with their lines, its unreadable lines, and how many lines are blank."""
    if Path(file).suffix.lower() in _OTHER_SUFFIXES:
        raise RequestError(f"data file '{file}' is not JSONL, the only kind read yet; convert it to one object a line")
    objects: list[tuple[int, Mapping[str, Any]]] = []
    problems: list[Problem] = []
    num_blank = 0
    for line, content in _lines(file):
        if not content.strip():
            num_blank += 1
            continue
        try:
            objects.append((line, _parsed(content)))
        except RowError as reason:
            problems.append(Problem(file, line, str(reason)))
    if not objects and problems and _is_one_list(file):
        raise RequestError(f"data file '{file}' is one JSON list; write one object a line instead (JSONL)")
    return objects, problems, num_blank


def _lines(file: str) -> Iterator[tuple[int, bytes]]:
    with open(file, "rb") as stream:
        for line, content in enumerate(stream, start=1):
            if line == 1:
                if content.startswith(_UTF16_MARKS):
                    raise RequestError(f"data file '{file}' is UTF-16; save it as UTF-8")
                content = content.removeprefix(_UTF8_MARK)
            yield line, content


def _parsed(content: bytes) -> Mapping[str, Any]:
    try:
        text = content.decode("utf-8")
    except UnicodeDecodeError as error:
        raise RowError(f"not UTF-8: byte 0x{content[error.start]:02X} at byte {error.start + 1} of the line") from None
    try:
        value = json.loads(text)
    except json.JSONDecodeError as error:
        raise RowError(f"not JSON: {error.msg} at column {error.colno}") from None
    except (ValueError, RecursionError) as error:
        raise RowError(f"not JSON: {error}") from None
    if not isinstance(value, dict):
        raise RowError(f"the line is {type_name(value)}, must be an object")
    if b"\\ud" in content.lower():  # half of a surrogate pair is valid JSON, but no text
        try:
            json.dumps(value, ensure_ascii=False).encode("utf-8")
        except UnicodeEncodeError:
            raise RowError("holds half of a surrogate pair (\\ud800 to \\udfff), which is no character") from None
    return value


def _is_one_list(file: str) -> bool:
    content = Path(file).read_bytes().removeprefix(_UTF8_MARK).lstrip()
    if not content.startswith(b"["):
        return False
    try:
        return isinstance(json.loads(content), list)
    except ValueError:
        return False


def _converted(lines: Sequence[tuple[int, Mapping[str, Any]]], name: str, file: str) -> tuple[list[Row], list[Problem]]:
    rows: list[Row] = []
    problems: list[Problem] = []
    for line, value in lines:
        try:
            rows.append(Row(file, line, FORMATS[name].turns(value)))
        except RowError as reason:
            problems.append(Problem(file, line, str(reason)))
    return rows, problems
