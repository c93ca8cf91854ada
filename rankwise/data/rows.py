"""Files to rows of canonical turns, one at a time, with every row that can't be used found in one pass.

The format of a file is recognised by its first `DETECT_ROWS` rows, which are all that is held of it. What can't be used
is a `Problem` with file, line and reason, never an exception and never left out.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from rankwise.data.columns import Columns
from rankwise.data.config import AUTO, BY_KEYS, ERROR, Reading
from rankwise.data.fields import ANSWERS, PREFERENCES, SYSTEM, TOOLS, RowError, Turn, Turns
from rankwise.data.formats import FORMATS, detect
from rankwise.data.preferences import REJECTED
from rankwise.data.readers.records import Fault, Item, Record, type_name
from rankwise.data.sources import Part, expand, parts
from rankwise.errors import RequestError, counted

__all__ = ["BadRows", "Findings", "Problem", "Row", "Rows", "expand", "iter_rows", "problem_lines",
           "read_rows"]  # fmt: skip

DETECT_ROWS = 1000
SHOWN_PROBLEMS = 20


@dataclass(frozen=True)
class Problem:
    """One line that can't be used, and why. Lines count from 1. `of_file`: nor can the rest of the file."""

    file: str
    line: int
    reason: str
    of_file: bool = False

    def __str__(self) -> str:
        return f"{self.file}:{self.line}: {self.reason}"


class BadRows(RequestError):  # noqa: N818 (it is a list of them)
    """Rows that can't be used: all of them in `problems`; as text, a line for each of the first twenty."""

    def __init__(self, problems: Sequence[Problem]):
        self.problems = list(problems)
        super().__init__("\n".join([f"{counted(len(self.problems), 'bad row')}, correct or remove:", *self.details]))

    @property
    def message(self) -> str:
        """One line: how many, and the first."""
        count = counted(len(self.problems), "bad row")
        if len(self.problems) == 1:
            return f"{count}, correct or remove: {self.problems[0]}"
        rest = f"(`rankwise data preview` lists all {len(self.problems):,})"
        return f"{count}, correct or remove: first {self.problems[0]} {rest}"

    @property
    def details(self) -> list[str]:
        """A line for each problem, up to `SHOWN_PROBLEMS`."""
        return problem_lines(self.problems)


def problem_lines(problems: Sequence[Problem], most: int = SHOWN_PROBLEMS) -> list[str]:
    """A line for each problem, and how many more there are."""
    rest = len(problems) - most
    return [str(problem) for problem in problems[:most]] + ([f"and {rest:,} more"] if rest > 0 else [])


def tolerated(problems: Sequence[Problem], on_bad_row: str) -> tuple[str, ...]:
    """What is said of rows that are left out, by `data.on_bad_row`.

    Raises: BadRows when that is error, or a file can't be read to its end, which is no matter of rows.
    """
    if not problems:
        return ()
    if on_bad_row == ERROR or any(problem.of_file for problem in problems):
        raise BadRows(problems)
    more = "" if len(problems) == 1 else "; data preview lists all"
    count = counted(len(problems), "row")
    return (f"{count} left out because of data.on_bad_row=skip, the first {problems[0]}{more}",)


@dataclass(frozen=True)
class Row:
    """One row, and where it stands."""

    file: str
    line: int
    turns: Turns
    group: str | None = None
    """Its value in the column by which rows are split."""


@dataclass(frozen=True)
class Rows:
    """What the files hold. `format`: the formats found, joined by commas; `why`: one reason for each file."""

    rows: tuple[Row, ...]
    problems: tuple[Problem, ...]
    format: str
    why: str
    num_blank: int
    notes: tuple[str, ...] = ()


@dataclass
class Findings:
    """What a pass over files finds beside their rows. It is complete when the pass is."""

    formats: dict[str, None] = field(default_factory=dict)
    """Names, in the order found."""
    reasons: list[str] = field(default_factory=list)
    """Why each file has its format."""
    notes: list[str] = field(default_factory=list)
    num_blank: int = 0


def read_rows(paths: str | Sequence[str], reading: Reading = BY_KEYS) -> Rows:
    """Reads all files. Bad lines are in `problems`: nothing is raised for them.

    Args:
        paths: a path, a folder, a pattern, a data set of the Hub, or a list of these.
        reading: their format, and what a row of a text file is.

    Raises: RequestError for a missing file, one whose kind can't be told, or rows whose format can't be.
    """
    found = Findings()
    rows: list[Row] = []
    problems: list[Problem] = []
    for item in iter_rows(paths, found, reading):
        if isinstance(item, Row):
            rows.append(item)
        else:
            problems.append(item)
    formats, why = ", ".join(found.formats), "; ".join(found.reasons)
    return Rows(tuple(rows), tuple(problems), formats, why, found.num_blank, tuple(found.notes))


def iter_rows(paths: str | Sequence[str], found: Findings, reading: Reading = BY_KEYS) -> Iterator[Row | Problem]:
    """As `read_rows`, one row or problem at a time, in the order of files and lines; `found` takes the rest.

    Raises: as `read_rows`; for rows whose format can't be told once their file is reached.
    """
    for file in expand(paths, found.notes):
        for part in parts(file, reading.text_rows):
            yield from _part_rows(part, reading, found)


def _part_rows(part: Part, reading: Reading, found: Findings) -> Iterator[Row | Problem]:
    items = part.items()
    start: list[Item] = []
    records: list[tuple[int, Mapping[str, Any]]] = []
    for item in items:
        start.append(item)
        if isinstance(item, Record):
            records.append((item.line, item.value))
            if len(records) == DETECT_ROWS:
                break
    name = reading.format
    columns = None if reading.columns is None else Columns(reading.columns)
    if records:
        is_start = len(records) == DETECT_ROWS
        if columns is not None:
            columns.check(records, part.name, is_start)
        if name != AUTO:
            why = "as set"
        elif columns is not None:
            name, why = detect([(records[0][0], dict.fromkeys(columns.names))], part.name)[0], "by data.columns"
        else:
            name, why = detect(records, part.name, is_start)
        _check_effects(reading, name, part.name)
        found.formats[name] = None
        found.reasons.append(f"{part.name}: {name} ({why}; {part.kind})")
    elif not any(isinstance(item, Fault) for item in start):
        yield Problem(part.name, 1, "the file has no rows", of_file=True)
    del records
    for item in _chained(start, items):
        if item is None:
            found.num_blank += 1
        elif isinstance(item, Fault):
            yield Problem(part.name, item.line, item.reason, item.ends_file)
        else:
            yield _row(part.name, item, name, columns, reading)


def _chained(start: list[Item], rest: Iterator[Item]) -> Iterator[Item]:
    """The items of the start, let go of, then the rest."""
    start.reverse()
    while start:
        yield start.pop()
    yield from rest


def _check_effects(reading: Reading, format: str, file: str) -> None:
    """Raises: RequestError for settings that mean nothing to rows of this format."""
    known = FORMATS[format].fields
    unread = next((field for field in reading.columns or () if field not in known), None)
    if unread is not None:
        raise RequestError(
            f"data.columns.{unread} has no effect on the rows of '{file}', of format {format}, which has the fields "
            f"{', '.join(known)}; leave it out"
        )
    if reading.system is not None and FORMATS[format].rows not in (ANSWERS, PREFERENCES):
        raise RequestError(f"data.system has no effect on the rows of '{file}', of format {format}; leave it out")


def _row(file: str, record: Record, format: str, columns: Columns | None, reading: Reading) -> Row | Problem:
    try:
        value = record.value if columns is None else columns.apply(record.value)
        turns = _with_system(FORMATS[format].turns(value), reading.system)
        return Row(file, record.line, turns, _group(record.value, reading.group))
    except RowError as reason:
        source = "" if columns is None else columns.source(str(reason))
        return Problem(file, record.line, f"{reason}{source}")


def _with_system(turns: Turns, system: str | None) -> Turns:
    """The turns, with the system prompt in front where they have none; of a preference pair, in both conversations."""
    if system is None or any(turn.role == SYSTEM for turn in turns):
        return turns
    mark = next((place for place, turn in enumerate(turns) if turn.role == REJECTED), None)
    if mark is not None:
        return *_with_system(turns[:mark], system), turns[mark], *_with_system(turns[mark + 1 :], system)
    num_tools = sum(turn.role == TOOLS for turn in turns)
    return *turns[:num_tools], Turn(SYSTEM, system), *turns[num_tools:]


def _group(record: Mapping[str, Any], column: str | None) -> str | None:
    """The value by which the row is split. Raises: RowError when the row has none."""
    if column is None:
        return None
    value = record.get(column)
    if value is None or isinstance(value, (list, dict)):
        what = "is missing" if value is None else f"is {type_name(value)}, must be a text or a number"
        raise RowError(f"{column}, by which data.split_by splits, {what}")
    return str(value)
