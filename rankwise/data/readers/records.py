"""What readers give: a record with its line, or a fault. Nothing here knows what a row means.

Readers are generators: one record at a time is in memory (a batch of them in columnar files). What is wrong with one
record is a `Fault`, after which the next one follows; what ends the whole file is raised as `UnreadableError`, or as
one of the exceptions of the layers below (a truncated archive, a missing right), and becomes the file's last fault in
`rankwise.data.sources`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

MAX_ROW_BYTES = 16 * 2**20
"""The longest line or record that is held in memory: far beyond what any `max_length` keeps."""

MAX_DEPTH = 100
"""Lists and objects inside each other."""


@dataclass(frozen=True, slots=True)
class Record:
    """One object, and where it begins: lines, or rows where the file has no lines, count from 1."""

    line: int
    value: Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Fault:
    """Why there is no record at this line. `ends_file`: nothing after it can be read."""

    line: int
    reason: str
    ends_file: bool = False


Item = Record | Fault | None
"""None: a blank line, which is skipped."""


class UnreadableError(Exception):
    """The file can't be read, from `line` on."""

    def __init__(self, reason: str, line: int = 1):
        super().__init__(reason)
        self.line = line


def type_name(value: Any) -> str:
    """A value's type in words, with its article."""
    if value is None:
        return "null"
    names = {
        bool: "a boolean", int: "a number", float: "a number", str: "a string", list: "a list", dict: "an object",
        bytes: "bytes",
    }  # fmt: skip
    return names.get(type(value), f"a value of type {type(value).__name__}")


def flaw(value: Any) -> str | None:
    """What makes a parsed value unusable: half of a surrogate pair, or lists and objects too deep in each other."""
    level: list[Any] = [value]
    for _ in range(MAX_DEPTH + 1):
        inside: list[Any] = []
        for item in level:
            if isinstance(item, str):
                if not _is_text(item):
                    return "holds half of a surrogate pair (\\ud800 to \\udfff), which is no character"
            elif isinstance(item, Mapping):
                inside += item.keys()
                inside += item.values()
            elif isinstance(item, (list, tuple)):
                inside += item
        if not inside:
            return None
        level = inside
    return f"lists and objects are nested more than {MAX_DEPTH} deep"


def header_flaw(names: Iterable[str]) -> str | None:
    """What is wrong with the names of a file's columns: one that stands twice."""
    seen: set[str] = set()
    for name in names:
        if name in seen:
            return f"the column '{name}' stands twice; rename one"
        seen.add(name)
    return None


def _is_text(text: str) -> bool:
    if text.isascii():
        return True
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True
