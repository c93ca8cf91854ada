"""The cache of encoded rows: a folder for each content, found by a hash of everything that decides the tokens.

The name of a folder is a hash of the data files' bytes and names, the tokenizer as it is loaded, the template, every
setting that affects tokens, and the versions of what computes them. So nothing in it can be out of date: what changes
gets another name. A folder is written under a temporary name and renamed, one process at a time for each name, with
hashes of its files, which are compared before it is used; a damaged one is made anew, and that is said.

Folders that were not used for longest are removed when all of them take more than MOST_BYTES. Removing any of them, or
the whole cache, is safe at any time: `rm -r ~/.cache/rankwise/data`. A run that reads one keeps its open files.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from rankwise.data.config import AUTO, OFF
from rankwise.errors import RequestError, WriteError
from rankwise.files import obstacle, replacing_folder, sha256_bytes, sha256_file, write_json
from rankwise.say import Say

RECORD = "record.json"
HOME_VARIABLE = "RANKWISE_CACHE"
MOST_BYTES = 20 * 2**30
LEAST_BYTES = 2**20
"""`auto` caches data of this size and more: less than that is encoded as fast as it is read back."""
STALE_S = 24 * 60 * 60
"""A temporary folder that old is what a killed process left."""


def cache_folder(setting: str, data_bytes: int) -> Path | None:
    """Where to cache data of that size, or None for nowhere.

    `auto`: in $RANKWISE_CACHE, or rankwise/data in the user's cache folder; nothing below LEAST_BYTES.
    """
    if setting == OFF or (setting == AUTO and data_bytes < LEAST_BYTES):
        return None
    if setting != AUTO:
        return Path(setting)
    if HOME_VARIABLE in os.environ:
        return Path(os.environ[HOME_VARIABLE]).expanduser() / "data"
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "rankwise" / "data"


@dataclass(frozen=True)
class Entry:
    """An open entry: its folder, what was recorded of it, and whether it was there already."""

    folder: Path
    content: dict[str, Any]
    was_there: bool


@contextlib.contextmanager
def entry(root: Path, parts: Mapping[str, Any], build: Callable[[Path], dict[str, Any]], say: Say) -> Iterator[Entry]:
    """The entry for `parts`, built if it is not there or damaged; it can't be removed by this cache inside the block.

    Args:
        root: the cache's folder.
        parts: everything that decides the content, as JSON's values.
        build: writes files into the folder given, and returns what to record of them.
        say: takes a line for people.

    Raises: RequestError when the cache can't be written to; WriteError when its disk is full.
    """
    if (reason := obstacle(root)) is not None:
        raise RequestError(f"the data cache can't be made: {reason}; set data.cache to another folder, or to off")
    root.mkdir(parents=True, exist_ok=True)
    name = sha256_bytes(json.dumps(parts, sort_keys=True).encode())[:32]
    folder = root / name
    with _locked(root / f"{name}.lock", say):
        record = _whole(folder, say)
        was_there = record is not None
        if record is None:
            for left in root.glob(f".{name}.*"):  # by a process that was killed while it had the lock
                shutil.rmtree(left, ignore_errors=True)
            record = _build(folder, parts, build)
            _shrink(root, folder)
        os.utime(folder / RECORD)  # used now
        yield Entry(folder, record["content"], was_there)


@contextlib.contextmanager
def _locked(path: Path, say: Say) -> Iterator[None]:
    lock = FileLock(path)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        say("waiting for another process, which encodes the same data")
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


def _build(folder: Path, parts: Mapping[str, Any], build: Callable[[Path], dict[str, Any]]) -> dict[str, Any]:
    record: dict[str, Any] = {"parts": dict(parts)}
    try:
        with replacing_folder(folder) as temporary:
            record["content"] = build(temporary)
            record["files"] = {
                path.name: {"bytes": path.stat().st_size, "sha256": sha256_file(path)}
                for path in sorted(temporary.iterdir())
            }
            record["sha256"] = _digest(record)
            write_json(temporary / RECORD, record)
    except WriteError as error:
        raise WriteError(str(folder), f"{error.reason} (the data cache; or set data.cache=off)") from error
    return record


def _digest(record: Mapping[str, Any]) -> str:
    return sha256_bytes(json.dumps({k: v for k, v in record.items() if k != "sha256"}, sort_keys=True).encode())


def _whole(folder: Path, say: Say) -> dict[str, Any] | None:
    """The record of a whole entry; None for none or, which is said, a damaged one."""
    if not folder.exists():
        return None
    record: Any = None
    try:
        record = json.loads((folder / RECORD).read_text(encoding="utf-8"))
        if record["sha256"] != _digest(record):
            damage = f"{RECORD} was changed"
        else:
            damage = next(filter(None, (_damage(folder / name, told) for name, told in record["files"].items())), None)
    except (OSError, ValueError, KeyError, TypeError) as error:
        damage = f"{RECORD} can't be read ({error})"
    if damage is None:
        return record
    say(f"the data cache in '{folder}' is damaged: {damage}; encoding the rows again")
    return None


def _damage(file: Path, told: Mapping[str, Any]) -> str | None:
    size = file.stat().st_size
    if size != told["bytes"]:
        return f"{file.name} has {size} bytes, should have {told['bytes']}"
    return None if sha256_file(file) == told["sha256"] else f"{file.name} was changed"


def _shrink(root: Path, keep: Path) -> None:
    """Removes the entries that were not used for longest, and what killed processes left, until the rest is small."""
    now = time.time()
    found: list[tuple[float, int, Path]] = []
    for path in root.iterdir():
        with contextlib.suppress(OSError):  # another process removes as well
            if path.name.startswith(".") and path.name.endswith((".tmp", ".old")):
                if now - path.stat().st_mtime > STALE_S:
                    shutil.rmtree(path, ignore_errors=True)
            elif (path / RECORD).is_file():
                size = sum(file.stat().st_size for file in path.iterdir())
                found.append(((path / RECORD).stat().st_mtime, size, path))
    total = sum(size for _, size, _ in found)
    for _, size, path in sorted(found):
        if total <= MOST_BYTES:
            return
        if path != keep:
            shutil.rmtree(path, ignore_errors=True)
            total -= size
