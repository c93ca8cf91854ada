"""Lines of bytes, never more than `MAX_ROW_BYTES` of one in memory, and their text."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from rankwise.data.readers.records import MAX_ROW_BYTES, UnreadableError
from rankwise.data.streams import Stream

UTF8_MARK = b"\xef\xbb\xbf"
_UTF16_MARKS = (b"\xff\xfe", b"\xfe\xff")
_MIB = 2**20


@dataclass(frozen=True, slots=True)
class Line:
    """One line with its end, or as much of it as is kept. `fault`: why it can't be used."""

    number: int
    content: bytes
    fault: str | None = None


def lines(stream: Stream) -> Iterator[Line]:
    """The lines of a stream. A byte order mark is left out, and so is what a line has beyond the bound.

    Raises: UnreadableError for UTF-16.
    """
    number = 0
    while content := stream.readline(MAX_ROW_BYTES + 1):
        number += 1
        if number == 1:
            check_encoding(content)
            content = content.removeprefix(UTF8_MARK)
        if len(content) > MAX_ROW_BYTES and not content.endswith(b"\n"):
            length = len(content) + _skip_rest(stream)
            yield Line(number, b"", f"{length / _MIB:,.0f} MiB long; {MAX_ROW_BYTES // _MIB} MiB is the most")
        elif b"\0" in content:
            yield Line(number, content, f"holds a NUL byte, at byte {content.index(0) + 1} of the line")
        else:
            yield Line(number, content)


def check_encoding(start: bytes) -> None:
    """Raises: UnreadableError when a file that starts so is UTF-16."""
    if start.startswith(_UTF16_MARKS):
        raise UnreadableError("is UTF-16; save it as UTF-8")


def not_utf8(content: bytes, error: UnicodeDecodeError) -> str:
    """What is said of bytes that are not UTF-8."""
    return f"not UTF-8: byte 0x{content[error.start]:02X} at byte {error.start + 1} of the line"


def _skip_rest(stream: Stream) -> int:
    """Reads on to the end of the line, and says how many bytes that were."""
    length = 0
    while content := stream.readline(_MIB):
        length += len(content)
        if content.endswith(b"\n"):
            break
    return length
