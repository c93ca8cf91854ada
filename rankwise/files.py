"""Files that are whole or not there: written under a temporary name beside the target, synced, then renamed."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rankwise.errors import RequestError, WriteError


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _failed(path: Path, error: OSError | WriteError) -> WriteError:
    reason = error.reason if isinstance(error, WriteError) else error.strerror or str(error)
    return WriteError(str(path), reason)


def unreachable(path: str | os.PathLike[str]) -> str | None:
    """Why nobody can even look whether `path` is there, in words: no name of a file, a missing right. None: one can."""
    try:
        os.lstat(path)
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        return error.strerror or str(error)
    except ValueError:  # a NUL, half of a surrogate pair
        return "no file's name can have such characters"
    return None


def obstacle(path: str | os.PathLike[str]) -> str | None:
    """What stands in the way of making the folder `path`, in words: a file, a missing right. None: nothing does."""
    if (found := unreachable(path)) is not None:
        return found
    target = Path(path).absolute()
    for folder in (target, *target.parents):
        if folder.is_dir():
            return None if os.access(folder, os.W_OK | os.X_OK) else f"'{folder}' can't be written to"
        if folder.exists() or folder.is_symlink():
            return f"'{folder}' is not a folder"
    return None


def file_obstacle(path: str | os.PathLike[str]) -> str | None:
    """What stands in the way of writing the file `path`, or of replacing it, in words. None: nothing does."""
    target = Path(path).absolute()
    if (found := unreachable(target) or obstacle(target.parent)) is not None:
        return found
    return f"'{target}' is a folder" if target.is_dir() else None


def check_new_folder(path: str | os.PathLike[str]) -> None:
    """Raises: RequestError for an output folder that exists or can't be made."""
    if (found := unreachable(path)) is None and Path(path).exists():
        raise RequestError(f"output folder '{path}' exists; choose another, or remove it")
    if (found := found or obstacle(path)) is not None:
        raise RequestError(f"output folder '{path}' can't be made: {found}; choose another")


@contextlib.contextmanager
def replacing(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Gives a temporary file name beside `path`; it replaces `path` when the block ends well, and is removed when not.

    Raises: WriteError when the disk is full or the folder can't be written.
    """
    target = Path(path)
    temporary: Path | None = None
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        descriptor, name = tempfile.mkstemp(dir=target.parent, prefix=f".{target.name}.", suffix=".tmp")
        os.close(descriptor)
        temporary = Path(name)
        temporary.chmod(0o666 & ~_umask())
        yield temporary
        _sync(temporary)
        temporary.replace(target)
        _sync(target.parent)
    except OSError as error:
        raise _failed(target, error) from error
    finally:
        if temporary is not None:
            temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def replacing_folder(path: str | os.PathLike[str]) -> Iterator[Path]:
    """As `replacing`, for a folder: an existing folder at `path` is replaced only once the new one is complete."""
    target = Path(path)
    temporary: Path | None = None
    old: Path | None = None
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(dir=target.parent, prefix=f".{target.name}.", suffix=".tmp"))
        temporary.chmod(0o777 & ~_umask())
        yield temporary
        for file in [*sorted(temporary.rglob("*")), temporary]:
            _sync(file)
        if target.exists():
            old = Path(tempfile.mkdtemp(dir=target.parent, prefix=f".{target.name}.", suffix=".old"))
            target.rename(old / "folder")
        temporary.rename(target)
        _sync(target.parent)
    except (
        OSError,
        WriteError,
    ) as error:  # a WriteError is of a file inside: its temporary name says nothing to anyone
        if old is not None and (old / "folder").exists() and not target.exists():
            (old / "folder").rename(target)
        raise _failed(target, error) from error
    finally:
        for folder in (temporary, old):
            if folder is not None:
                shutil.rmtree(folder, ignore_errors=True)


def copy_into(source: str | os.PathLike[str], target: str | os.PathLike[str]) -> None:
    """Copies the files of the folder `source` into `target`, where other files stay; none is there before all are.

    Raises: WriteError when the disk is full or the folder can't be written.
    """
    files = [path for path in sorted(Path(source).iterdir()) if path.is_file()]
    folder = Path(target)
    with contextlib.ExitStack() as stack:
        if folder.exists():
            places = [stack.enter_context(replacing(folder / file.name)) for file in files]
        else:
            temporary = stack.enter_context(replacing_folder(folder))
            places = [temporary / file.name for file in files]
        for file, place in zip(files, places, strict=True):
            shutil.copyfile(file, place)


def remove_folder(path: str | os.PathLike[str]) -> None:
    """Removes a folder: gone at once under its name, so that a kill leaves no half of it that looks like the whole.

    What a disk does not give up at once (files that are open, on NFS) waits under a hidden name for `sweep`.

    Raises: WriteError when it can't be renamed.
    """
    target = Path(path)
    try:
        old = Path(tempfile.mkdtemp(dir=target.parent, prefix=f".{target.name}.", suffix=".old"))
        target.rename(old / "folder")
    except OSError as error:
        raise _failed(target, error) from error
    shutil.rmtree(old, ignore_errors=True)


def sweep(folder: str | os.PathLike[str]) -> None:
    """Removes from `folder` what processes that were killed have left half-written there. Nobody may be writing."""
    for leftover in [*Path(folder).glob(".*.tmp"), *Path(folder).glob(".*.old")]:
        if leftover.is_dir():
            shutil.rmtree(leftover, ignore_errors=True)  # as it was: it stays hidden
        else:
            leftover.unlink()


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def write_text(path: str | os.PathLike[str], text: str) -> None:
    """Writes `text` as UTF-8, whole or not at all."""
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: str | os.PathLike[str], value: Any) -> None:
    """Writes `value` as indented JSON, whole or not at all."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def read_json_object(path: str | os.PathLike[str]) -> dict[str, Any]:
    """The mapping in a JSON file. Raises: RequestError for a file that can't be read, or that holds another thing."""
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise RequestError(f"'{path}' can't be read: {error}") from None
    if not isinstance(content, dict):
        raise RequestError(f"'{path}' must hold a JSON object, not {type(content).__name__}")
    return content


def sha256_file(path: str | os.PathLike[str]) -> str:
    """SHA-256 of a file, as hexadecimal digits."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sha256_bytes(data: bytes) -> str:
    """SHA-256 of bytes, as hexadecimal digits."""
    return hashlib.sha256(data).hexdigest()
