"""The kinds of files that hold rows, and the compressions around them: literal tables, by the ends of names.

| kind | names end in | `line` counts |
| --- | --- | --- |
| jsonl | .jsonl, .ndjson | lines |
| json | .json | lines (rows, in an object of columns) |
| csv, tsv | .csv, .tsv, .tab | lines |
| parquet | .parquet, .pq | rows |
| arrow | .arrow, .feather, .ipc | rows |
| text | .txt | lines |

To add a kind: a generator from a binary stream to records and faults in `readers/`, and a line in `FILE_KINDS`.
"""

from __future__ import annotations

import bz2
import gzip
import io
import lzma
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, cast

from rankwise.data.readers.columnar import read_arrow, read_parquet
from rankwise.data.readers.delimited import read_csv, read_tsv
from rankwise.data.readers.json_files import read_json, read_jsonl
from rankwise.data.readers.records import Item, UnreadableError
from rankwise.data.readers.text_files import read_lines
from rankwise.data.streams import Stream

Reader = Callable[[Stream], Iterator[Item]]


@dataclass(frozen=True)
class FileKind:
    """How files of one kind are recognised and read.

    `suffixes`: ends of their names; `magic`: how their content begins, where that is certain; `seeks`: whether the
    reader jumps in the file, which a compressed one does not allow.
    """

    suffixes: tuple[str, ...]
    read: Reader
    magic: bytes | None = None
    seeks: bool = False


@dataclass(frozen=True)
class Compression:
    """One file compressed as a whole. `suffix`: the end of its name, behind that of its kind."""

    suffix: str
    magic: bytes
    open: Callable[[Stream], Stream]


def _gzip(stream: Stream) -> Stream:
    return cast(Stream, gzip.GzipFile(fileobj=stream, mode="rb"))


def _bzip2(stream: Stream) -> Stream:
    return cast(Stream, bz2.BZ2File(stream))


def _xz(stream: Stream) -> Stream:
    return cast(Stream, lzma.LZMAFile(stream))


def _zstd(stream: Stream) -> Stream:
    import pyarrow as pa

    whole: Any = pa.CompressedInputStream(pa.PythonFile(stream, mode="r"), "zstd")
    return cast(Stream, io.BufferedReader(whole))


FILE_KINDS: dict[str, FileKind] = {
    "jsonl": FileKind((".jsonl", ".ndjson"), read_jsonl),
    "json": FileKind((".json",), read_json),
    "csv": FileKind((".csv",), read_csv),
    "tsv": FileKind((".tsv", ".tab"), read_tsv),
    "parquet": FileKind((".parquet", ".pq"), read_parquet, b"PAR1\x15", seeks=True),
    "arrow": FileKind((".arrow", ".feather", ".ipc"), read_arrow, b"ARROW1\0\0", seeks=True),
    "text": FileKind((".txt",), read_lines),
}

COMPRESSIONS: dict[str, Compression] = {
    "gzip": Compression(".gz", b"\x1f\x8b", _gzip),
    "bzip2": Compression(".bz2", b"BZh", _bzip2),
    "xz": Compression(".xz", b"\xfd7zXZ\0", _xz),
    "zstd": Compression(".zst", b"\x28\xb5\x2f\xfd", _zstd),
}

ZIP_SUFFIX = ".zip"
ZIP_MAGIC = b"PK\x03\x04"
MAGIC_BYTES = 16
_SURE_BZIP2 = slice(4, 10), b"1AY&SY"
"""`BZh` alone may begin a text."""


def suffixes() -> list[str]:
    """All ends of names of data files, compressed or not."""
    ends = [suffix for kind in FILE_KINDS.values() for suffix in kind.suffixes]
    return [*ends, *(each.suffix for each in COMPRESSIONS.values()), ZIP_SUFFIX]


def named_compression(name: str) -> str | None:
    """The compression that the name says, as a key of `COMPRESSIONS`."""
    return next((key for key, each in COMPRESSIONS.items() if name.lower().endswith(each.suffix)), None)


def named_kind(name: str) -> str | None:
    """The kind that the name says, a compression's end left out, as a key of `FILE_KINDS`."""
    compression = named_compression(name)
    inner = name.lower().removesuffix(COMPRESSIONS[compression].suffix) if compression else name.lower()
    return next((key for key, kind in FILE_KINDS.items() if inner.endswith(kind.suffixes)), None)


def is_data_file(name: str) -> bool:
    """Whether the name is that of a data file or an archive of these."""
    return named_kind(name) is not None or name.lower().endswith(ZIP_SUFFIX)


def seen_kind(start: bytes) -> str | None:
    """What a file that begins so certainly is: a key of `FILE_KINDS` or of `COMPRESSIONS`, or `zip`."""
    if start.startswith(ZIP_MAGIC):
        return "zip"
    for name, compression in COMPRESSIONS.items():
        if start.startswith(compression.magic) and (name != "bzip2" or start[_SURE_BZIP2[0]] == _SURE_BZIP2[1]):
            return name
    return next((name for name, kind in FILE_KINDS.items() if kind.magic and start.startswith(kind.magic)), None)


def guessed_kind(start: bytes) -> str | None:
    """The kind of a file whose name says nothing: by its first character, JSON by lines, or else JSON."""
    seen = seen_kind(start)
    if seen is not None:
        return seen if seen in FILE_KINDS else None
    return {b"{": "jsonl", b"[": "json"}.get(start.removeprefix(b"\xef\xbb\xbf").lstrip()[:1])


def check_content(start: bytes, named: str) -> None:
    """Raises: UnreadableError when the content is certainly not what the name says, the kind or compression `named`."""
    seen = seen_kind(start)
    if seen is not None and seen != named:
        raise UnreadableError(f"is {named} by its name and {seen} by its content; rename it")
