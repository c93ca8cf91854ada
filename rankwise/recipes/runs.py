"""`rankwise runs`: the runs below a folder, each with how far it came and how good it was. Read only; without torch."""

from __future__ import annotations

import datetime
import fcntl
import json
import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml

from rankwise.errors import RequestError
from rankwise.recipes.names import (
    FAILED,
    FINISHED,
    LOCK_FILE,
    METRICS_FILE,
    PROVENANCE_FILE,
    RUN_FILE,
    RUNNING,
    STATUS_FILE,
    STOPPED,
    SUMMARY_FILE,
)

INTERRUPTED = "interrupted"
"""It was running, and nobody holds it: it was killed."""
BROKEN = "broken"
"""Its files can't be read."""
STATUSES = (RUNNING, FINISHED, STOPPED, INTERRUPTED, FAILED, BROKEN)

TRACES = (LOCK_FILE, METRICS_FILE, SUMMARY_FILE, PROVENANCE_FILE, STATUS_FILE)
"""A folder with a run file is a run's output when one of these is there too."""

Row = dict[str, Any]

SORTS: dict[str, Callable[[Row], Any]] = {
    "when": lambda row: -row["seconds"],
    "name": lambda row: row["name"],
    "status": lambda row: STATUSES.index(row["status"]),
    "step": lambda row: -row["step"],
    "best": lambda row: row["best_valid_loss"],
    "loss": lambda row: row["final_loss"],
}


def list_runs(folder: str, sort: str = "when") -> dict[str, Any]:
    """`folder` and `runs`: a row for each run in it or below, in the order that `sort` names; what has none comes last.

    Raises: RequestError when the folder is not there. A run's own troubles are in its row.
    """
    root = Path(folder).expanduser()
    if not root.is_dir():
        raise RequestError(f"there is no folder '{folder}'")
    rows = [_row(path, root, problem) for path, problem in _found(root)]
    key = SORTS[sort]
    rows.sort(key=lambda row: row["name"])
    rows.sort(key=lambda row: (True, 0) if (value := key(row)) is None else (False, value))
    for row in rows:
        del row["seconds"]
    return {"folder": str(root), "runs": rows}


def _found(root: Path) -> Iterator[tuple[Path, str | None]]:
    """Output folders of runs, and folders that can't be looked into, each with the reason."""
    closed: list[tuple[Path, str]] = []

    def note(error: OSError) -> None:
        closed.append((Path(error.filename), f"can't be read: {error.strerror}"))

    for place, folders, files in os.walk(root, onerror=note):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        if RUN_FILE in files and any(name in files for name in TRACES):
            folders.clear()  # what is below belongs to the run
            yield Path(place), None
    yield from closed


def _row(path: Path, root: Path, problem: str | None) -> Row:
    row: Row = {
        "name": str(path.relative_to(root)) if path != root else path.resolve().name, "path": str(path),
        "status": BROKEN, "step": 0, "steps": None, "best_valid_loss": None, "final_loss": None, "seconds": 0.0,
        "when": None, "problem": problem,
    }  # fmt: skip
    if problem is not None:
        return row
    try:
        row |= _read(path)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, yaml.YAMLError) as error:
        row["problem"] = " ".join(str(error).split()) or type(error).__name__
    return row


def _read(path: Path) -> Row:
    files = [path / name for name in (METRICS_FILE, SUMMARY_FILE, STATUS_FILE, RUN_FILE)]
    seconds = max(file.stat().st_mtime for file in files if file.exists())
    lines = _lines(path / METRICS_FILE)
    losses = [line["valid_loss"] for line in lines if "valid_loss" in line]
    summary, status = (_json(path / name) for name in (SUMMARY_FILE, STATUS_FILE))
    last = lines[-1] if lines else {"step": 0, "loss": None}
    row: Row = {
        "status": _status(path, summary, status),
        "step": int(last["step"]),
        "steps": status["num_steps"] if status else _planned(path / RUN_FILE),
        "best_valid_loss": min(losses) if losses else None,
        "final_loss": last["loss"],
        "seconds": seconds,
        "when": datetime.datetime.fromtimestamp(seconds).astimezone().isoformat(timespec="seconds"),
    }
    if row["status"] == FAILED:
        row["problem"] = status["message"] if status else None
    return row


def _status(path: Path, summary: Mapping[str, Any] | None, status: Mapping[str, Any] | None) -> str:
    if is_held(path / LOCK_FILE):
        return RUNNING
    noted = status["status"] if status else (FINISHED if summary else RUNNING)
    if noted not in STATUSES:
        raise ValueError(f"{STATUS_FILE} says '{noted}', which is no status")
    return INTERRUPTED if noted == RUNNING else noted


def is_held(lock: Path) -> bool:
    """Whether a live run holds this lock file, which is left as it is."""
    try:
        with open(lock, "rb") as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except FileNotFoundError:
        return False
    except BlockingIOError:
        return True
    return False


def _json(path: Path) -> dict[str, Any] | None:
    if not path.exists():
        return None
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except ValueError:
        found = None
    if not isinstance(found, dict):
        raise ValueError(f"{path.name} is cut off or not JSON")
    return found


def _lines(path: Path) -> list[dict[str, Any]]:
    """Whole lines; a run that is going on may be writing the last one."""
    text = path.read_text(encoding="utf-8") if path.exists() else ""
    lines: list[dict[str, Any]] = []
    for number, line in enumerate(text.split("\n")[:-1], start=1):
        try:
            lines.append(json.loads(line))
        except ValueError:
            raise ValueError(f"{path.name}, line {number}: not JSON") from None
    return lines


def _planned(run_file: Path) -> int | None:
    """Steps by the run file, where they are not counted in epochs."""
    return yaml.safe_load(run_file.read_text(encoding="utf-8"))["train"]["steps"]
