"""The store: one JSON document a line, only ever added to, each with a checksum of its own.

Two kinds of lines: `cell`, a run's results or the reason why it failed, and `same`, the record that code of another
version gives the same results to the last bit. Writers take a lock; a line is written whole, synced, and only then does
it count. What a crash left of a last line is recognised, passed over when reading, and cut off before the next line.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from filelock import FileLock

from rankwise.errors import RequestError, WriteError
from rankwise.files import sha256_bytes

CELL, SAME = "cell", "same"
DONE, FAILED = "done", "failed"
CHECKSUM = "sha256"
PARTS = ("losses", "units", "correct", "routed")
"""What a cell holds by split."""


@dataclass(frozen=True)
class Record:
    """A line of the store about a cell.

    Args:
        cell: what was asked for: the identity of run, data, base and seed, without the code's version.
        family: the same without seed, data and learning rate.
        code: the version of the code that computed it.
        status: `done` or `failed`.
        body: the whole line.
    """

    cell: str
    family: str
    code: str
    status: str
    body: Mapping[str, Any]

    @property
    def figures(self) -> Mapping[str, Any]:
        """Sizes, times and the like."""
        return self.body["figures"]

    @property
    def losses(self) -> Mapping[str, list[float]]:
        """By split (`train`, `valid`, `test`), the loss of each example in the order of its file, in nats.

        Of a cell on all tasks, by `TASK/SPLIT`.
        """
        return self.body["losses"]

    def of_task(self, task: str) -> Record:
        """Of a cell on all tasks, what there is on one of them, as a cell on that one has it."""
        parts = {
            name: {key.split("/", 1)[1]: value for key, value in self.body[name].items() if key.startswith(f"{task}/")}
            for name in PARTS
            if name in self.body
        }
        return replace(self, body={**self.body, **parts})


@dataclass
class Contents:
    """What a store holds."""

    records: list[Record] = field(default_factory=list)
    codes: dict[str, Mapping[str, str]] = field(default_factory=dict)
    """The digests of the source files of each version of the code."""
    same: set[tuple[str, str, str]] = field(default_factory=set)
    """(family, old code, new code): a cell of the family gave the same bits under both."""
    torn: int = 0
    """Bytes of a last line that was never finished."""

    def find(self, cell: str, code: str, status: str = DONE) -> Record | None:
        """The record of a cell by this version of the code, or by one that is known to give the same."""
        for record in self._of(cell, status):
            if record.code == code or (record.family, record.code, code) in self.same:
                return record
        return None

    def stale(self, cell: str, code: str) -> Record | None:
        """The newest finished record of a cell, where no record counts for this version of the code."""
        if self.find(cell, code) is not None:
            return None
        return next(iter(self._of(cell, DONE)), None)

    def changed_files(self, old: str, new: Mapping[str, str]) -> list[str]:
        """Source files that are not as they were in version `old`."""
        before = self.codes.get(old, {})
        return sorted(name for name in {*before, *new} if before.get(name) != new.get(name))

    def _of(self, cell: str, status: str) -> Iterator[Record]:
        """Newest first."""
        return (record for record in reversed(self.records) if record.cell == cell and record.status == status)


def checksum(document: Mapping[str, Any]) -> str:
    """Of a line without its own checksum."""
    plain = {key: value for key, value in document.items() if key != CHECKSUM}
    return sha256_bytes(json.dumps(plain, sort_keys=True, ensure_ascii=False).encode())[:16]


class Store:
    """The file `path`, which need not exist yet."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def read(self) -> Contents:
        """Everything in it.

        Raises: RequestError for a line that is not one of a store, or that was changed since it was written.
        """
        contents = Contents()
        if not self.path.exists():
            return contents
        *lines, rest = self.path.read_bytes().split(b"\n")
        contents.torn = len(rest)
        for number, line in enumerate(lines, 1):
            self._take(contents, number, line)
        return contents

    def _take(self, contents: Contents, number: int, line: bytes) -> None:
        where = f"'{self.path}', line {number}"
        try:
            document = json.loads(line)
            stated = document[CHECKSUM]
        except (ValueError, KeyError, TypeError):
            raise RequestError(f"{where} is no line of a store; restore the file, or remove the line") from None
        if stated != checksum(document):
            raise RequestError(f"{where} was changed after it was written; restore it, or remove it and run it again")
        if document["kind"] == SAME:
            contents.same.update((family, document["old"], document["new"]) for family in document["families"])
        else:
            contents.records.append(
                Record(document["cell"], document["family"], document["code"], document["status"], document)
            )
        contents.codes.update(document.get("code_files", {}))

    def append(self, document: Mapping[str, Any], code: str, code_files: Mapping[str, str]) -> bool:
        """Adds a line, with the files of version `code` where the store has not got them yet.

        Returns whether it was added: not where the same cell by the same code is finished already.

        Raises: RequestError for a store that can't be read; WriteError when the line can't be written.
        """
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with FileLock(f"{self.path}.lock"):
                return self._append(document, code, code_files)
        except OSError as error:
            raise WriteError(str(self.path), error.strerror or str(error)) from error

    def _append(self, document: Mapping[str, Any], code: str, code_files: Mapping[str, str]) -> bool:
        contents = self.read()
        if document["kind"] == CELL and contents.find(document["cell"], code) is not None:
            return False
        line = dict(document)
        if code not in contents.codes:
            line["code_files"] = {code: dict(code_files)}
        line[CHECKSUM] = checksum(line)
        text = json.dumps(line, ensure_ascii=False, allow_nan=False) + "\n"
        with open(self.path, "ab") as file:
            if contents.torn:
                file.truncate(file.tell() - contents.torn)
            file.write(text.encode())
            file.flush()
            os.fsync(file.fileno())
        return True
