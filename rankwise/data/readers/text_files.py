"""Plain text: a line is a row, or a paragraph is."""

from __future__ import annotations

from collections.abc import Iterator

from rankwise.data.readers.lines import Line, lines, not_utf8
from rankwise.data.readers.records import MAX_ROW_BYTES, Fault, Item, Record
from rankwise.data.streams import Stream

FIELD = "text"


def read_lines(stream: Stream) -> Iterator[Item]:
    """Each line that is not blank, as the field `text`."""
    for line in lines(stream):
        yield _item([line]) if line.content.strip() or line.fault is not None else None


def read_paragraphs(stream: Stream) -> Iterator[Item]:
    """Lines up to a blank one, with the line breaks between them, as the field `text`."""
    paragraph: list[Line] = []
    length = 0
    for line in lines(stream):
        if line.content.strip() or line.fault is not None:
            length += len(line.content)
            paragraph.append(
                line if length <= MAX_ROW_BYTES else Line(line.number, b"", "part of a too long paragraph")
            )
            continue
        if paragraph:
            yield _item(paragraph)
        paragraph, length = [], 0
    if paragraph:
        yield _item(paragraph)


def _item(paragraph: list[Line]) -> Item:
    parts: list[str] = []
    for line in paragraph:
        if line.fault is not None:
            return Fault(line.number, f"the line {line.fault}" if line.content else f"the line is {line.fault}")
        try:
            parts.append(line.content.decode("utf-8").removesuffix("\n").removesuffix("\r"))
        except UnicodeDecodeError as error:
            return Fault(line.number, not_utf8(line.content, error))
    return Record(paragraph[0].number, {FIELD: "\n".join(parts)})
