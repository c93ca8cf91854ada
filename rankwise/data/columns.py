"""Any columns as the fields of a format: `data.columns: {prompt: "{question}\\n{context}", completion: answer}`.

A value without braces is a column, taken as it is, of whatever type. One with braces is a text in which `{column}`
stands for a column's text or number; `{{` and `}}` are braces. A column may be a path: `answers.text.0` goes into
objects by their keys, and into lists by position. That is all there is: no code, attribute, call or format is read, so
a run file can do nothing here but move text.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rankwise.data.fields import RowError, type_name
from rankwise.errors import RequestError, did_you_mean

_TOKEN = re.compile(r"\{\{|\}\}|\{([^{}]*)\}|[{}]")
_NOT_IN_NAMES = re.compile(r"[!:\[\]()]")
_ABSENT = object()


@dataclass(frozen=True)
class _Field:
    """How one field is made: of a column as it is (`column`), or of texts and columns by turns (`parts`)."""

    name: str
    source: str
    column: str | None
    parts: tuple[tuple[str, str], ...] = ()
    """(text, column behind it, or "" at the end)."""

    @property
    def columns(self) -> list[str]:
        return [self.column] if self.column is not None else [column for _, column in self.parts if column]


class Columns:
    """The mapping of a run file, checked.

    Args:
        mapping: field of a format to column or text with columns.

    Raises: RequestError for what is neither.
    """

    def __init__(self, mapping: Mapping[str, str]) -> None:
        self._fields = tuple(_field(name, source) for name, source in mapping.items())

    @property
    def names(self) -> list[str]:
        """The fields that are made."""
        return [field.name for field in self._fields]

    def apply(self, row: Mapping[str, Any]) -> dict[str, Any]:
        """The row's fields by the mapping, and no others. A column that is missing leaves its field out.

        Raises: RowError for a text whose column is missing, or no text or number.
        """
        found: dict[str, Any] = {}
        for field in self._fields:
            if field.column is None:
                found[field.name] = _text(field, row)
            elif (value := _value(row, field.column)) is not _ABSENT:
                found[field.name] = value
        return found

    def check(self, rows: Sequence[tuple[int, Mapping[str, Any]]], file: str, is_start: bool) -> None:
        """Raises: RequestError for a column that none of the rows has, naming the nearest."""
        for field in self._fields:
            for column in field.columns:
                if all(_value(row, column) is _ABSENT for _, row in rows):
                    known = dict.fromkeys(name for _, row in rows for name in _paths(row))
                    which = f"none of the first {len(rows):,} rows" if is_start else "no row"
                    raise RequestError(
                        f"data.columns.{field.name} takes the column '{column}', which {which} of '{file}' has"
                        f"{did_you_mean(column, known)}"
                    )

    def source(self, reason: str) -> str:
        """Where the field comes from that a problem's reason begins with, as the end of that reason; else nothing."""
        name = re.match(r"\w*", reason)
        field = next((each for each in self._fields if name is not None and each.name == name.group()), None)
        return "" if field is None else f" (data.columns.{field.name}: {field.source!r})"


def _field(name: str, source: str) -> _Field:
    where = f"data.columns.{name}"
    if "{" not in source and "}" not in source:
        if not source.strip():
            raise RequestError(f"{where} is empty; name a column, as in answer, or write a text with columns in braces")
        return _Field(name, source, source)
    parts: list[tuple[str, str]] = []
    text, at = "", 0
    for match in _TOKEN.finditer(source):
        text += source[at : match.start()]
        at = match.end()
        if match.group() in ("{{", "}}"):
            text += match.group()[0]
            continue
        column = match.group(1)
        if column is None:
            raise RequestError(f"{where} ({source!r}) has a brace without its other; {{{{ and }}}} stand for braces")
        if not column.strip() or _NOT_IN_NAMES.search(column):
            raise RequestError(
                f"{where} ({source!r}) has {{{column}}}: between braces stands the name of a column and nothing else"
            )
        parts.append((text, column))
        text = ""
    return _Field(name, source, None, (*parts, (text + source[at:], "")))


def _text(field: _Field, row: Mapping[str, Any]) -> str:
    written = ""
    for text, column in field.parts:
        written += text
        if not column:
            break
        value = _value(row, column)
        if value is _ABSENT:
            raise RowError(f"column '{column}' is missing, for data.columns.{field.name}")
        if isinstance(value, bool):
            written += str(value).lower()
        elif isinstance(value, (str, int, float)):
            written += str(value)
        else:
            raise RowError(
                f"column '{column}' is {type_name(value)}, must be text or a number for data.columns.{field.name}"
            )
    return written


def _value(row: Mapping[str, Any], column: str) -> Any:
    """The column of that name; or, by path, what lies in one."""
    if column in row:
        return row[column]
    value: Any = row
    for step in column.split("."):
        if isinstance(value, Mapping) and step in value:
            value = value[step]
        elif isinstance(value, list) and step.isdecimal() and int(step) < len(value):
            value = value[int(step)]
        else:
            return _ABSENT
    return value


def _paths(row: Mapping[str, Any]) -> list[str]:
    """Names that a mapping may use: of columns, and of the keys of objects in them."""
    inside = [f"{name}.{key}" for name, value in row.items() if isinstance(value, Mapping) for key in value]
    return [*row, *inside]
