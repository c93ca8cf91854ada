"""JSON by lines (JSONL), and JSON files: a list of rows, an object of columns, or `{"data": [rows]}`.

Stricter than Python's own parser, which takes NaN and Infinity, lets the last of two equal keys win in silence, and
gives an infinite number for 1e999: each of these is a fault of its row. A JSON file is parsed one element of its list
at a time, but its text is in memory at once; JSONL is read line by line.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator, Mapping
from io import BytesIO
from typing import Any

from rankwise.data.readers.lines import UTF8_MARK, check_encoding, lines, not_utf8
from rankwise.data.readers.records import MAX_DEPTH, Fault, Item, Record, UnreadableError, flaw, type_name
from rankwise.data.streams import Stream

MAX_JSON_BYTES = 2**30
_ROWS_KEY = "data"
_BLANK = re.compile(r"[ \t\n\r]*")
_NOT_BLANK = re.compile(rb"\S")


class _Decoder:
    """A JSON decoder that notes what it should not have accepted, and goes on."""

    def __init__(self) -> None:
        self._flaws: list[str] = []
        self._json = json.JSONDecoder(object_pairs_hook=self._object, parse_constant=self._constant,
                                      parse_float=self._float)  # fmt: skip

    def at(self, text: str, start: int) -> tuple[Any, int, str | None]:
        """The value that begins at `start`, where it ends, and what is wrong with it.

        Raises: ValueError (with position: JSONDecodeError) for what is not JSON.
        """
        self._flaws.clear()
        try:
            value, end = self._json.raw_decode(text, start)
        except RecursionError:
            raise ValueError(f"lists and objects are nested more than {MAX_DEPTH} deep") from None
        return value, end, self._flaws[0] if self._flaws else _flaw(value, text, start, end)

    def _object(self, pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) < len(pairs):
            seen: set[str] = set()
            twice = next(key for key, _ in pairs if key in seen or seen.add(key))
            self._flaws.append(f"the key '{twice}' stands twice in one object")
        return found

    def _constant(self, name: str) -> None:
        self._flaws.append(f"holds {name}, which is no JSON value")

    def _float(self, text: str) -> float:
        value = float(text)
        if not math.isfinite(value):
            self._flaws.append(f"holds the number {text[:20]}, which is too large")
        return value


def _flaw(value: Any, text: str, start: int, end: int) -> str | None:
    """`flaw(value)`, looked for where the value's text has what each flaw needs: UTF-8 has no halves of pairs."""
    is_deep = text.count("[", start, end) + text.count("{", start, end) > MAX_DEPTH
    return flaw(value) if is_deep or text.find("\\u", start, end) >= 0 else None


def read_jsonl(stream: Stream) -> Iterator[Item]:
    """One object a line; a blank line is skipped."""
    decoder = _Decoder()
    is_first = True
    for line in lines(stream):
        content = line.content.strip()
        if not content and line.fault is None:
            yield None
            continue
        if is_first:
            _check_one_object_a_line(content, line.number)
            is_first = False
        if line.fault is not None:
            yield Fault(line.number, f"the line {line.fault}" if line.content else f"the line is {line.fault}")
            continue
        yield _item(line.number, line.content.rstrip(b"\r\n"), decoder)


def _item(number: int, content: bytes, decoder: _Decoder) -> Item:
    try:
        text = content.decode("utf-8")
        start = _after_blank(text, 0)
        value, end, wrong = decoder.at(text, start)
    except UnicodeDecodeError as error:
        return Fault(number, not_utf8(content, error))
    except json.JSONDecodeError as error:
        return Fault(number, f"not JSON: {error.msg.removesuffix(' at')} at column {error.pos + 1}")
    except ValueError as error:  # a whole number of more than 4,300 digits, or nesting
        return Fault(number, f"not JSON that can be read: {_short(error)}")
    after = _after_blank(text, end)
    if after < len(text):
        return Fault(number, f"not JSON: more follows the value at column {after + 1}")
    return _record(number, value, wrong, "the line")


def _record(number: int, value: Any, wrong: str | None, what: str) -> Record | Fault:
    if wrong is not None:
        return Fault(number, wrong)
    if not isinstance(value, dict):
        return Fault(number, f"{what} is {type_name(value)}, must be an object")
    return Record(number, value)


def _check_one_object_a_line(content: bytes, number: int) -> None:
    """Raises: UnreadableError when the first line shows that the file is JSON, but not by lines."""
    if content == b"{":
        raise UnreadableError("holds JSON over several lines; write one object a line, or name the file .json", number)
    if content == b"[" or content.startswith((b"[{", b"[ {")):
        raise UnreadableError("is one JSON list, not an object a line; name the file .json", number)


def read_json(stream: Stream) -> Iterator[Item]:
    """A list of rows, an object of columns (lists of equal length), `{"data": [rows]}`, one row; JSONL is taken too.

    Raises: UnreadableError for a file that is too large, not UTF-8, or not JSON.
    """
    content = stream.read(MAX_JSON_BYTES + 1)
    if len(content) > MAX_JSON_BYTES:
        raise UnreadableError(f"has more than {MAX_JSON_BYTES // 2**30} GiB, and JSON is read whole; write it as JSONL")
    check_encoding(content)
    content = content.removeprefix(UTF8_MARK)
    if _is_jsonl(content):
        yield from read_jsonl(BytesIO(content))
        return
    try:
        text = content.decode("utf-8")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise UnreadableError(f"not UTF-8: byte 0x{content[error.start]:02X}", line) from None
    del content
    start = _after_blank(text, 0)
    if start == len(text):
        return
    yield from _rows_of_list(text, start) if text[start] == "[" else _rows_of_object(text, start)


def _is_jsonl(content: bytes) -> bool:
    """Whether the first line is an object by itself, and more follows."""
    first = _NOT_BLANK.search(content)
    end = -1 if first is None else content.find(b"\n", first.start())
    if first is None or first.group() != b"{" or end < 0 or _NOT_BLANK.search(content, end) is None:
        return False
    try:
        json.loads(content[first.start() : end])
    except (ValueError, RecursionError):
        return False
    return True


def _rows_of_list(text: str, start: int) -> Iterator[Item]:
    decoder = _Decoder()
    line, counted_to = 1, 0
    at = _after_blank(text, start + 1)
    if text.startswith("]", at):
        _check_end(text, at + 1)
        return
    while True:
        line, counted_to = line + text.count("\n", counted_to, at), at
        value, end, wrong = _value(decoder, text, at, line)
        yield _record(line, value, wrong, "the element")
        at = _after_blank(text, end)
        if text.startswith("]", at):
            break
        if not text.startswith(",", at):
            raise UnreadableError(
                "not JSON: a comma is missing, or the list is not closed", text.count("\n", 0, at) + 1
            )
        at = _after_blank(text, at + 1)
    _check_end(text, at + 1)


def _rows_of_object(text: str, start: int) -> Iterator[Item]:
    value, end, wrong = _value(_Decoder(), text, start, 1)
    _check_end(text, end)
    if wrong is not None or not isinstance(value, dict):
        yield _record(1, value, wrong, "the file")
        return
    rows = value.get(_ROWS_KEY)
    if isinstance(rows, list) and rows and all(isinstance(row, dict) for row in rows):
        yield from (Record(number, row) for number, row in enumerate(rows, start=1))
    elif _are_columns(value):
        names = list(value)
        cells = zip(*value.values(), strict=True)
        yield from (Record(number, dict(zip(names, row, strict=True))) for number, row in enumerate(cells, start=1))
    else:
        yield Record(1, value)


def _are_columns(value: Mapping[str, Any]) -> bool:
    """Lists of equal length, and not one conversation, whose only list is of objects."""
    columns = list(value.values())
    if not columns or not all(isinstance(column, list) for column in columns):
        return False
    if len({len(column) for column in columns}) > 1:
        return False
    return any(not isinstance(cell, dict) for column in columns for cell in column)


def _value(decoder: _Decoder, text: str, at: int, line: int) -> tuple[Any, int, str | None]:
    try:
        return decoder.at(text, at)
    except json.JSONDecodeError as error:
        raise UnreadableError(
            f"not JSON: {error.msg.removesuffix(' at')} at column {error.colno}", error.lineno
        ) from None
    except ValueError as error:
        raise UnreadableError(f"not JSON that can be read: {_short(error)}", line) from None


def _check_end(text: str, end: int) -> None:
    after = _after_blank(text, end)
    if after < len(text):
        raise UnreadableError("not JSON: more follows the value", text.count("\n", 0, after) + 1)


def _after_blank(text: str, at: int) -> int:
    found = _BLANK.match(text, at)
    return at if found is None else found.end()


def _short(error: ValueError) -> str:
    return str(error).split(";")[0]
