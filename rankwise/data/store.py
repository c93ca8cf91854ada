"""Examples on disk: written once, a chunk at a time, then memory-mapped and made again one by one when asked for.

A folder with two files: `examples.bin`, one record after another, and `index.bin`, one fixed-size line an example:
where its record begins, what its row says (a hash), how long it is. Nothing in memory grows with the number of
examples but the pages of these two files that were touched, which are the kernel's to drop.

A record is the length of its JSON in bytes [4 bytes], the JSON, then whole numbers of 4 bytes each. In the JSON stands
one value for each field of `Example`: token ids as their count (the numbers follow), labels as the runs that are
trained on, a text that is part of the example's `text` as its place there. Fields are written by their types, so a new
field of `Example` needs nothing here but another `FORMAT`.
"""

from __future__ import annotations

import json
import mmap
from array import array
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, get_type_hints

import numpy as np

from rankwise.data.example import Example
from rankwise.models.batch import IGNORED

FORMAT = 3
"""Of the two files; a cache of another one is made anew."""

EXAMPLES, INDEX = "examples.bin", "index.bin"
INDEX_DTYPE = np.dtype(
    [
        ("offset", "<i8"),  # of the record, in bytes
        ("key", "<u8"),  # hash of what the row says
        ("group", "<u8"),  # hash of its group, 0 for none
        ("line", "<i8"),
        ("file", "<i4"),  # number of its file in the store's list
        ("tokens", "<i4"),
        ("trained", "<i4"),
        ("longest", "<i4"),  # tokens of its longest sequence
        ("highest", "<i4"),  # its highest token id
    ]
)
RELEASE_BYTES = 64 * 2**20
"""Pages of a mapped file are handed back after so many bytes were read: the process' own memory stays flat."""

_INT32 = "i"
_JSON = json.JSONEncoder(ensure_ascii=False, separators=(",", ":"))
_NOT_WRITTEN = ("source", "file", "line", "task")
"""Fields that are in the index, or known only of all rows together."""

_HINTS = get_type_hints(Example)
_FIELDS = tuple(field.name for field in fields(Example) if field.name not in _NOT_WRITTEN)
_NUMBERS = tuple(name for name in _FIELDS if _HINTS[name] == tuple[int, ...])
_TEXTS = tuple(name for name in _FIELDS if _HINTS[name] is str and name != "text")


def packed(example: Example) -> bytes:
    """The record of an example."""
    values: dict[str, Any] = {name: getattr(example, name) for name in _FIELDS}
    arrays: list[array[int]] = []
    for name in _NUMBERS:
        numbers = values[name]
        if name == "labels" and (edges := _runs(example.input_ids, numbers)) is not None:
            values[name] = [len(edges)]  # a list: runs of labels that are the tokens' own
            numbers = edges
        else:
            values[name] = len(numbers)
        arrays.append(array(_INT32, numbers))
    for name in _TEXTS:
        text = values[name]
        if len(text) > 8 and (start := example.text.find(text)) >= 0:
            values[name] = [start, start + len(text)]
    head = _JSON.encode(list(values.values())).encode()
    return b"".join([len(head).to_bytes(4, "little"), head, *arrays])


def _runs(ids: Sequence[int], labels: Sequence[int]) -> list[int] | None:
    """Where runs of labels that are the tokens' own begin and end; None where others than IGNORED stand beside them."""
    if len(labels) != len(ids):
        return None
    trained = bytes(map(IGNORED.__ne__, labels))  # and edges by searching it: all of it without a loop in Python
    edges: list[int] = []
    start = trained.find(1)
    while start >= 0:
        end = trained.find(0, start)
        end = len(trained) if end < 0 else end
        if labels[start:end] != ids[start:end]:
            return None
        edges += (start, end)
        start = trained.find(1, end)
    return edges


def unpacked(record: bytes, source: str, file: str, line: int) -> Example:
    """The example of a record. `source` is the instruction that its file's prompts share, which is taken off."""
    length = int.from_bytes(record[:4], "little")
    values = dict(zip(_FIELDS, json.loads(record[4 : 4 + length]), strict=True))
    numbers = np.frombuffer(record, dtype="<i4", offset=4 + length)
    place = 0
    for name in _NUMBERS:
        is_runs = isinstance(values[name], list)
        count = values[name][0] if is_runs else values[name]
        part = numbers[place : place + count].tolist()
        place += count
        values[name] = _labels(values["input_ids"], part) if is_runs else tuple(part)
    for name in _TEXTS:
        if isinstance(values[name], list):
            values[name] = values["text"][slice(*values[name])]
    values["spans"], values["weights"] = _tuples(values["spans"]), _tuples(values["weights"])
    return Example(**values, source=values["prompt_text"].removeprefix(source), file=file, line=line)


def _labels(ids: tuple[int, ...], edges: Sequence[int]) -> tuple[int, ...]:
    labels = [IGNORED] * len(ids)
    for start, end in zip(edges[::2], edges[1::2], strict=True):
        labels[start:end] = ids[start:end]
    return tuple(labels)


def _tuples(value: Any) -> Any:
    """JSON's lists as the tuples that they were."""
    return tuple(_tuples(item) for item in value) if isinstance(value, list) else value


@dataclass(frozen=True)
class Records:
    """A chunk's examples as they are written. `index`: offsets are from the chunk's beginning, files as in `files`."""

    data: bytes
    index: np.ndarray
    files: tuple[str, ...]


def records(examples: Sequence[Example], keys: Sequence[int], groups: Sequence[int]) -> Records:
    """A chunk ready to be written. `keys`, `groups`: hashes of each example's row and of its group."""
    index = np.zeros(len(examples), dtype=INDEX_DTYPE)
    files: dict[str, int] = {}
    parts: list[bytes] = []
    offset = 0
    for place, example in enumerate(examples):
        record = packed(example)
        parts.append(record)
        index[place] = (
            offset, keys[place], groups[place], example.line, files.setdefault(example.file, len(files)),
            len(example.input_ids), example.num_trained, example.longest, max(example.input_ids),
        )  # fmt: skip
        offset += len(record)
    return Records(b"".join(parts), index, tuple(files))


class StoreWriter:
    """Writes the two files of a store into `folder`, which is there; a context."""

    def __init__(self, folder: Path) -> None:
        self._examples, self._index = open(folder / EXAMPLES, "wb"), open(folder / INDEX, "wb")  # noqa: SIM115
        self.files: dict[str, int] = {}
        self.num_bytes = 0

    def __enter__(self) -> StoreWriter:
        return self

    def __exit__(self, *_: object) -> None:
        self._examples.close()
        self._index.close()

    def add(self, chunk: Records) -> None:
        """Appends a chunk."""
        numbers = np.array([self.files.setdefault(file, len(self.files)) for file in chunk.files], dtype=np.int32)
        index = chunk.index.copy()
        index["offset"] += self.num_bytes
        index["file"] = numbers[index["file"]] if len(numbers) else 0
        self._examples.write(chunk.data)
        self._index.write(index.tobytes())
        self.num_bytes += len(chunk.data)


class Store:
    """The examples of a folder that a StoreWriter wrote; the folder may be removed while they are in use.

    Args:
        folder: where the two files are.
        files: names of the rows' files, by their numbers.
        instructions: what the prompts of each file begin with.
    """

    def __init__(self, folder: Path, files: Sequence[str], instructions: Mapping[str, str]) -> None:
        self.index = np.zeros(0, dtype=INDEX_DTYPE)
        if (folder / INDEX).stat().st_size:
            self.index = np.memmap(folder / INDEX, dtype=INDEX_DTYPE, mode="r")
        self.files, self._instructions = tuple(files), dict(instructions)
        self._read_bytes = 0
        self._end = (folder / EXAMPLES).stat().st_size
        self._map: mmap.mmap | None = None
        if self._end:
            with open(folder / EXAMPLES, "rb") as file:
                self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)

    def __len__(self) -> int:
        return len(self.index)

    def example(self, row: int) -> Example:
        """The example of that number."""
        assert self._map is not None
        line = self.index[row]
        start = int(line["offset"])
        end = int(self.index[row + 1]["offset"]) if row + 1 < len(self.index) else self._end
        record = self._map[start:end]
        self._release(end - start)
        file = self.files[line["file"]]
        return unpacked(record, self._instructions.get(file, ""), file, int(line["line"]))

    def _release(self, num_bytes: int) -> None:
        """Hands pages back from time to time; they stay in the kernel's cache, and are mapped again when touched."""
        self._read_bytes += num_bytes
        if self._read_bytes > RELEASE_BYTES:
            self._read_bytes = 0
            assert self._map is not None
            self._map.madvise(mmap.MADV_DONTNEED)


class Examples(Sequence[Example]):
    """Examples of one or several stores, one after another; or some of them, in any order.

    Args:
        stores: where they are.
        rows: their numbers, counted through all stores; None: all.
    """

    def __init__(self, stores: Sequence[Store], rows: np.ndarray | None = None) -> None:
        self.stores = tuple(stores)
        self.rows = rows
        self._ends = np.cumsum([len(store) for store in stores])

    def __len__(self) -> int:
        return int(self._ends[-1]) if self.rows is None else len(self.rows)

    def __getitem__(self, place: Any) -> Any:
        """The example at that place; a slice is Examples again, nothing is read for it."""
        if isinstance(place, slice):
            every = np.arange(len(self)) if self.rows is None else self.rows
            return Examples(self.stores, every[place])
        place = range(len(self))[place]
        row = place if self.rows is None else int(self.rows[place])
        store = int(np.searchsorted(self._ends, row, side="right"))
        return self.stores[store].example(row - (int(self._ends[store - 1]) if store else 0))

    def at(self, rows: np.ndarray) -> Examples:
        """Those of the given places."""
        return Examples(self.stores, rows if self.rows is None else self.rows[rows])

    def by_file(self) -> dict[str, Examples]:
        """The examples of each file that has some, by its name, in the order of files; nothing is read for it."""
        names = [file for store in self.stores for file in store.files]
        firsts = np.cumsum([0, *(len(store.files) for store in self.stores)])
        pairs = zip(self.stores, firsts[:-1], strict=True)
        numbers = np.concatenate([np.asarray(store.index["file"]) + first for store, first in pairs])
        numbers = numbers if self.rows is None else numbers[self.rows]
        return {names[number]: self.at(np.flatnonzero(numbers == number)) for number in np.unique(numbers)}

    def column(self, name: str) -> np.ndarray:
        """One figure of each example, from the index: `key`, `group`, `tokens`, `trained`, `longest` or `highest`."""
        whole = np.concatenate([np.asarray(store.index[name]) for store in self.stores])
        return whole if self.rows is None else whole[self.rows]
