"""Paths to files, and files to records: folders, patterns, archives and Hub data sets; every failure becomes a fault.

A file may hold several parts (the members of a zip archive); each is read, and its format recognised, by itself. What
stops the reading of a part (a truncated archive, a missing right, damaged pages) is its last fault and names the line
from which on rows are lost. Nothing is silently left out: a folder's files that are no data files are noted.
"""

from __future__ import annotations

import glob  # a pattern may be absolute, which Path.glob does not take
import lzma
import os
import zipfile
import zlib
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import cast

from rankwise.data.config import HUB_PREFIX, PARAGRAPH
from rankwise.data.file_kinds import (
    COMPRESSIONS,
    FILE_KINDS,
    MAGIC_BYTES,
    ZIP_SUFFIX,
    check_content,
    guessed_kind,
    is_data_file,
    named_compression,
    named_kind,
    suffixes,
)  # fmt: skip
from rankwise.data.hub_rows import hub_hash, read_hub
from rankwise.data.readers.records import Fault, Item, UnreadableError
from rankwise.data.readers.text_files import read_paragraphs
from rankwise.data.streams import Stream
from rankwise.errors import RequestError, did_you_mean
from rankwise.files import sha256_file

NOT_ROWS = frozenset({"dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json"})
"""What `datasets` writes beside its Arrow files."""

_SPLITS = {"train": ("train",), "other": ("valid", "dev", "test", "eval")}
_FAILURES = (OSError, EOFError, zlib.error, lzma.LZMAError, zipfile.BadZipFile, NotImplementedError)
"""What the layers below raise for a file that can't be read: truncated, damaged, not theirs, no right."""

_SHOWN = 5


@dataclass(frozen=True)
class Part:
    """Rows that are read together. `name`: the file's, and for a member of an archive `archive.zip/member`."""

    name: str
    kind: str
    items: Callable[[], Iterator[Item]]


def expand(paths: str | Sequence[str], notes: list[str] | None = None) -> list[str]:
    """The files that paths, folders and patterns name, in the order given; inside of these in the order of names.

    Args:
        paths: a path, a folder, a pattern, a data set of the Hub (`hf:owner/name/split`), or a list of these.
        notes: takes what was left out of folders.

    Raises: RequestError for what isn't there, all of it in one message.
    """
    files: list[str] = []
    missing: list[str] = []
    for path in [paths] if isinstance(paths, str) else paths:
        try:
            files += _expanded(path, [] if notes is None else notes)
        except RequestError as error:
            missing.append(str(error))
    if missing:
        raise RequestError("; ".join(missing))
    if len(set(files)) < len(files):
        twice = next(file for file, count in Counter(files).items() if count > 1)
        raise RequestError(f"data file '{twice}' is named twice; name it once")
    return files


def content_hash(file: str) -> str:
    """SHA-256 of a file's bytes, or of a Hub data set's rows."""
    return hub_hash(file) if file.startswith(HUB_PREFIX) else sha256_file(file)


def parts(file: str, text_rows: str) -> Iterator[Part]:
    """What is read of one file that `expand` gave. `text_rows`: what a row of plain text is, a line or a paragraph.

    Raises: RequestError for a file whose kind can't be told.
    """
    if file.startswith(HUB_PREFIX):
        yield Part(file, "Hub data set", lambda: _guarded(lambda: read_hub(file)))
    elif file.lower().endswith(ZIP_SUFFIX):
        yield from _archive(file, text_rows)
    else:
        kind = named_kind(file) or _guess(file)
        compression = named_compression(file)
        shown = FILE_KINDS_SHOWN.get(kind, kind) + (f", {compression}" if compression else "")
        yield Part(file, shown, lambda: _guarded(lambda: _opened(file, kind, compression, text_rows)))


FILE_KINDS_SHOWN = {"jsonl": "JSONL", "json": "JSON", "csv": "CSV", "tsv": "TSV", "parquet": "Parquet",
                    "arrow": "Arrow", "text": "text"}  # fmt: skip


def _expanded(path: str, notes: list[str]) -> list[str]:
    if path.startswith(HUB_PREFIX) or os.path.isfile(path):  # noqa: PTH113 (a name that is too long is no file)
        return [path]
    if os.path.isdir(path):  # noqa: PTH112
        return _folder(path, notes)
    if glob.has_magic(path):
        found = glob.glob(path, recursive=True)  # noqa: PTH207
        matches = sorted(match for match in found if Path(match).is_file())
        if not matches:
            raise RequestError(f"no data file matches '{path}'")
        return matches
    raise RequestError(_missing(path))


def _missing(path: str) -> str:
    if os.path.islink(path):  # noqa: PTH114
        return f"data file '{path}' is a symbolic link that leads to no file, or round in a circle"
    if os.path.exists(path):  # noqa: PTH110
        return f"data file '{path}' is no regular file; copy what it gives into one"
    if "://" in path:
        return f"data file '{path}' is an address; download it first, or write {HUB_PREFIX}owner/name/split for the Hub"
    folder = Path(path).parent
    if not os.path.isdir(folder):  # noqa: PTH112
        return f"data file '{path}' does not exist; nor does its folder"
    there = [item.name for item in folder.iterdir() if item.is_file()]
    return f"data file '{path}' does not exist{did_you_mean(Path(path).name, sorted(there))}"


def _folder(path: str, notes: list[str]) -> list[str]:
    """The data files in a folder and the folders in it, by name. Links to folders are not followed.

    Raises: RequestError when there are none, or they are of several splits.
    """
    files: list[str] = []
    others: list[str] = []
    for folder, inside, names in os.walk(path):
        inside[:] = sorted(name for name in inside if not name.startswith("."))
        for name in sorted(name for name in names if not name.startswith(".")):
            is_rows = is_data_file(name) and name not in NOT_ROWS
            (files if is_rows else others).append(os.path.join(folder, name))  # noqa: PTH118 (as the user wrote it)
    if not files:
        raise RequestError(f"the folder '{path}' holds no data files (names that end in {', '.join(suffixes())})")
    _check_one_split(path, files)
    if others:
        shown = ", ".join(os.path.relpath(other, path) for other in others[:_SHOWN])
        more = f" and {len(others) - _SHOWN} more" if len(others) > _SHOWN else ""
        notes.append(f"of the folder '{path}' left out, since they are no data files: {shown}{more}")
    return sorted(files)


def _check_one_split(path: str, files: Sequence[str]) -> None:
    names = [Path(os.path.relpath(file, path)).as_posix().lower() for file in files]
    found = {
        split: next((name for name in names if name.rsplit("/", 1)[-1].startswith(ends)), None)
        for split, ends in _SPLITS.items()
    }
    if all(found.values()):
        raise RequestError(
            f"the folder '{path}' holds files of several splits ({found['train']}, {found['other']}); "
            "name the files of one, as in a list or a pattern"
        )


def _guess(file: str) -> str:
    """The kind of a file by its content, where its name says none; what can't be opened fails when it is read."""
    compression = named_compression(file)
    try:
        with open(file, "rb") as stream:
            opened = COMPRESSIONS[compression].open(stream) if compression else stream
            start = opened.read(MAGIC_BYTES)
    except _FAILURES:
        return "jsonl"
    kind = guessed_kind(start)
    if kind is None and start:
        raise RequestError(
            f"the kind of the data file '{file}' can't be told from its name or content; "
            f"let its name end in one of {', '.join(suffixes())}"
        )
    return kind or "jsonl"


def _opened(file: str, kind: str, compression: str | None, text_rows: str) -> Iterator[Item]:
    with open(file, "rb") as stream:
        yield from _records(stream, kind, compression, text_rows)


def _records(stream: Stream, kind: str, compression: str | None, text_rows: str) -> Iterator[Item]:
    """The records in an opened file.

    Raises: UnreadableError when its content is not what its name says; what the layers below raise.
    """
    read = read_paragraphs if kind == "text" and text_rows == PARAGRAPH else FILE_KINDS[kind].read
    if FILE_KINDS[kind].seeks:
        if compression is not None:
            raise UnreadableError(f"{FILE_KINDS_SHOWN[kind]} files are compressed inside; decompress this one")
        yield from read(stream)
        return
    start = stream.read(MAGIC_BYTES)
    stream.seek(0)
    check_content(start, compression or kind)
    yield from read(COMPRESSIONS[compression].open(stream) if compression and start else stream)


def _archive(file: str, text_rows: str) -> Iterator[Part]:
    """The data files in a zip archive, by name."""
    try:
        with zipfile.ZipFile(file) as archive:
            members = sorted(archive.infolist(), key=lambda member: member.filename)
    except _FAILURES as error:
        reason = _reason(error)
        yield Part(file, "zip", lambda: iter([Fault(1, reason, ends_file=True)]))
        return
    named = [member for member in members if not member.is_dir() and named_kind(member.filename) is not None]
    if not named:
        yield Part(file, "zip", lambda: iter([Fault(1, "the archive holds no data files", ends_file=True)]))
    for member in named:
        kind = cast(str, named_kind(member.filename))
        yield Part(f"{file}/{member.filename}", f"{FILE_KINDS_SHOWN[kind]}, zip",
                   _member(file, member, kind, text_rows))  # fmt: skip


def _member(file: str, member: zipfile.ZipInfo, kind: str, text_rows: str) -> Callable[[], Iterator[Item]]:
    def records() -> Iterator[Item]:
        if member.flag_bits & 1:
            raise UnreadableError("is encrypted; unpack it first")
        if FILE_KINDS[kind].seeks:
            raise UnreadableError(f"{FILE_KINDS_SHOWN[kind]} files are compressed inside; unpack this one")
        with zipfile.ZipFile(file) as archive:
            compression = named_compression(member.filename)
            with archive.open(member) as stream:
                yield from _records(cast(Stream, stream), kind, compression, text_rows)

    return lambda: _guarded(records)


def _guarded(records: Callable[[], Iterator[Item]]) -> Iterator[Item]:
    """The records, and what stopped their reading as the last fault."""
    line = 0
    try:
        for item in records():
            line = line + 1 if item is None else item.line
            yield item
    except UnreadableError as error:
        yield Fault(error.line, str(error), ends_file=True)
    except _FAILURES as error:
        yield Fault(line + 1, _reason(error), ends_file=True)


def _reason(error: BaseException) -> str:
    text = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    return f"can't be read from here on: {' '.join(text.split()).rstrip('.') or type(error).__name__}"
