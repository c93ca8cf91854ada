"""CSV and TSV, strictly: a header, then rows with as many fields as it has (RFC 4180, 2005).

A field that begins with a quote goes to the closing one, over line breaks and separators, with `""` for a quote; any
other field is taken as it stands, quotes in it too. Python's `csv` would read a row that has too few or too many
fields, or text behind a closing quote; and it knows no line on which a record began.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

from rankwise.data.readers.lines import Line, lines, not_utf8
from rankwise.data.readers.records import MAX_ROW_BYTES, Fault, Item, Record, UnreadableError, header_flaw
from rankwise.data.streams import Stream
from rankwise.errors import counted

_CLOSING = re.compile(r'[^"]*(?:""[^"]*)*"(?!")')


class _RaggedError(Exception):
    """Why a record's fields can't be told."""


class _OpenError(Exception):
    """The record goes on: a quote is still open."""


def read_csv(stream: Stream) -> Iterator[Item]:
    """Comma-separated rows, by the names in the first."""
    return _rows(stream, ",")


def read_tsv(stream: Stream) -> Iterator[Item]:
    """Tab-separated rows, by the names in the first."""
    return _rows(stream, "\t")


def _rows(stream: Stream, separator: str) -> Iterator[Item]:
    source = lines(stream)
    header: list[str] | None = None
    for line in source:
        if line.fault is None and not line.content.strip():
            yield None
            continue
        try:
            fields = _fields(line, source, separator)
        except _RaggedError as reason:
            if header is None:
                raise UnreadableError(f"the header {reason}", line.number) from None
            yield Fault(line.number, f"the row {reason}")
            continue
        if header is None:
            header = fields
            if wrong := header_flaw(header):
                raise UnreadableError(wrong, line.number)
        elif len(fields) != len(header):
            yield Fault(line.number, f"the row has {counted(len(fields), 'field')}, the header {len(header)}")
        else:
            yield Record(line.number, dict(zip(header, fields, strict=True)))


def _fields(line: Line, source: Iterator[Line], separator: str) -> list[str]:
    """The fields of the record that begins with `line`; takes the further lines that a quoted field goes over.

    Raises: _RaggedError when they can't be told; UnreadableError when a quote is never closed.
    """
    text = _text(line)
    parts = [text]
    length = len(line.content)
    if '"' not in text:
        return _without_end(text).split(separator)
    has_quote = True
    while True:
        if has_quote:
            try:
                return _split(_without_end("".join(parts)), separator)
            except _OpenError:
                pass
        more = next(source, None)
        if more is None or (length := length + len(more.content)) > MAX_ROW_BYTES:
            raise UnreadableError("a quote is opened and not closed: nothing from here on can be read", line.number)
        parts.append(_text(more))
        has_quote = '"' in parts[-1]


def _text(line: Line) -> str:
    if line.fault is not None:
        raise _RaggedError(line.fault if line.content else f"is {line.fault}")
    try:
        return line.content.decode("utf-8")
    except UnicodeDecodeError as error:
        raise _RaggedError(f"is {not_utf8(line.content, error)}") from None


def _without_end(text: str) -> str:
    return text.removesuffix("\n").removesuffix("\r")


def _split(text: str, separator: str) -> list[str]:
    fields: list[str] = []
    at = 0
    while True:
        if text.startswith('"', at):
            closing = _CLOSING.match(text, at + 1)
            if closing is None:
                raise _OpenError
            fields.append(text[at + 1 : closing.end() - 1].replace('""', '"'))
            at = closing.end()
            if at < len(text) and text[at] != separator:
                raise _RaggedError(f"has text behind the closing quote of field {len(fields)}")
        else:
            end = text.find(separator, at)
            end = len(text) if end < 0 else end
            fields.append(text[at:end])
            at = end
        if at >= len(text):
            return fields
        at += 1
