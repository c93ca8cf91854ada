"""A cell of a bench: what decides its result, as one hash; and what a worker is told to do for it. No torch here."""

from __future__ import annotations

import importlib.metadata
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache, cached_property
from pathlib import Path
from typing import Any

from rankwise.bench.kinds import ADAPTER, BASE, OF_ALL, TASKS
from rankwise.bench.suite import Answers, Method
from rankwise.data.config import DataConfig
from rankwise.data.sources import content_hash, expand
from rankwise.errors import RequestError
from rankwise.files import sha256_bytes, sha256_file
from rankwise.models.embedded import EMBEDDED
from rankwise.recipes.resume import FREE
from rankwise.recipes.run import RunConfig, run_document
from rankwise.train.needs import NEEDS

THREADS = 1
"""Of each worker. Part of a cell's identity: sums over another number of threads round differently."""

ALL = "all"
"""Stands in place of the task in the name of a cell on all tasks."""

SPLITS = ("train", "valid", "test")

ANSWERS = "answers"
"""A cell's setting, and what its record calls the answers."""


@dataclass(frozen=True)
class OfAll:
    """What a cell on all tasks of its suite has besides.

    Args:
        runs: each task as a run of its own, in their order: the rows that are measured.
        sources: by task, the cell whose adapter it begins with; empty: there is none.
        settings: the method's `combine`, `gate` and `new_task`, those that it has.
    """

    runs: Mapping[str, RunConfig]
    sources: Mapping[str, Cell]
    settings: Mapping[str, Any]


@dataclass(frozen=True)
class Cell:
    """One run of a suite: a method on a task, or on all, with a seed at a rate."""

    method: str
    task: str
    seed: int
    lr: float | None
    kind: str
    run: RunConfig
    cut: int | None = None
    every: OfAll | None = None
    """Of a cell on all tasks."""
    answers: Answers | None = None
    """How many test rows are answered, and how long; None: none."""

    @property
    def name(self) -> str:
        """`method/task/seed`, with the rate behind it: what `--only` is matched with."""
        return named(self.method, self.task, self.seed, self.lr)

    @cached_property
    def settings(self) -> dict[str, Any]:
        """What decides the result, apart from the code: settings that are not the default, data and base by content."""
        found: dict[str, Any] = {} if self.kind in OF_ALL and self.kind != TASKS else self._of_run()
        if self.every is None:
            found |= {f"data.{split}": _content(getattr(self.run.data, split)) for split in SPLITS}
        else:
            found |= _of_all(self.every)
        if self.cut is not None:
            found["cut"] = self.cut
        if self.answers is not None:
            found[ANSWERS] = {"rows": self.answers.rows, "max_new_tokens": self.answers.max_new_tokens}
        return found | {"kind": self.kind, "threads": THREADS, "model.name": base_identity(self.run.model.name)}

    def _of_run(self) -> dict[str, Any]:
        document, default = run_document(self.run), _defaults()
        skipped = {"adapter", "ranks"} if self.kind not in (ADAPTER, TASKS) else set[str]()
        found = {
            f"{section}.{name}": value
            for section, values in document.items()
            if isinstance(values, dict) and section not in skipped
            for name, value in values.items()
            if f"{section}.{name}" not in {*FREE, "tasks.data"} and value != default[section].get(name)
        }
        if self.kind == BASE:  # nothing is trained: only what is read, and how a new head is drawn, counts
            found = {key: value for key, value in found.items() if not key.startswith("train.")}
            found["train.objective"], found["train.precision"] = self.run.train.objective, self.run.train.precision
        if self.kind == BASE and not _has_new_head(self.run):
            found.pop("train.seed", None)
        elif self.seed:
            found["train.seed"] = self.seed
        return found

    @cached_property
    def identity(self) -> str:
        """Names the cell, whatever code computes it."""
        return _digest(self.settings)

    @cached_property
    def family(self) -> str:
        """Names the method on its model: the settings without seed, data and rate."""
        apart = ("train.seed", "train.lr", "sources")
        return _digest({key: value for key, value in self.settings.items() if key not in apart and not _is_data(key)})


def named(method: str, task: str, seed: int, lr: float | None) -> str:
    """The name of a cell."""
    return f"{method}/{task}/{seed}" + (f"@{lr:g}" if lr is not None else "")


def _is_data(key: str) -> bool:
    return key.startswith("data.") and key.rpartition(".")[2] in SPLITS


def _of_all(every: OfAll) -> dict[str, Any]:
    """Tasks in their order, which counts; their data; the adapters that they begin with; the method's own settings."""
    found: dict[str, Any] = {"tasks": list(every.runs), **every.settings}
    for task, run in every.runs.items():
        found |= {f"data.{task}.{split}": _content(getattr(run.data, split)) for split in SPLITS}
    if every.sources:
        found["sources"] = {task: cell.identity for task, cell in every.sources.items()}
        found["sources.family"] = next(iter(every.sources.values())).family
    return found


@cache
def _defaults() -> dict[str, Any]:
    return run_document(RunConfig(data=DataConfig(train="any")))


def _digest(settings: Mapping[str, Any]) -> str:
    return sha256_bytes(json.dumps(settings, sort_keys=True).encode())[:16]


def _has_new_head(run: RunConfig) -> bool:
    return NEEDS[run.train.objective].task_type in ("SEQ_CLS", "TOKEN_CLS")


def _content(files: Any) -> str:
    """One hash for the contents of data files, in their order."""
    assert files is not None
    return sha256_bytes("".join(_file_hash(path) for path in expand(files)).encode())[:16]


@cache
def _file_hash(path: str) -> str:
    return content_hash(path)


@cache
def base_identity(name: str) -> str:
    """The base by its content: package and version of an embedded model, hashes of a folder's files.

    Raises: RequestError for a model of the Hub, whose content may change, and a package that is not installed.
    """
    if name in EMBEDDED:
        package = EMBEDDED[name].distribution
        try:
            return f"{package} {importlib.metadata.version(package)}"
        except importlib.metadata.PackageNotFoundError:
            raise RequestError(f"model '{name}' needs the package {package}; run `make setup`") from None
    folder = Path(name)
    if not folder.is_dir():
        raise RequestError(f"the bench takes an embedded model or a folder, not '{name}': its content must be fixed")
    files = sorted([folder / "config.json", *folder.glob("*.safetensors"), *folder.glob("tokenizer*.json")])
    return sha256_bytes("".join(sha256_file(file) for file in files if file.is_file()).encode())[:16]


# --- run files -------------------------------------------------------------------------------------------------------


def run_of(task: Mapping[str, Any], method: Method, seed: int, lr: float | None) -> dict[str, Any]:
    """The run file's mapping of a cell on one task."""
    train = {**task.get("train", {}), **method.train, "seed": seed}
    if lr is not None:
        train["lr"] = lr
    document: dict[str, Any] = {**task, "train": train}
    if method.kind == ADAPTER:
        document |= {"adapter": {**method.adapter}, "ranks": {**method.ranks}}
    return document


def run_of_all(tasks: Mapping[str, Mapping[str, Any]], method: Method, seed: int, lr: float | None) -> dict[str, Any]:
    """The run file's mapping of a run on several tasks, which differ in their files only.

    Raises: RequestError where they differ in more.
    """
    first, *others = tasks
    common = _without_files(tasks[first])
    for other in others:
        if _without_files(tasks[other]) != common:
            raise RequestError(
                f"tasks '{first}' and '{other}' differ in more than their files, and a run on several has one model "
                "and one way of training; make them alike, or give the others in the method's train:"
            )
    files = {name: {split: task["data"][split] for split in ("train", "valid")} for name, task in tasks.items()}
    document = run_of({**tasks[first], **common}, method, seed, lr)
    section = {**method.tasks, "data": files}
    return document | {"tasks": section} | ({"adapter": {**method.adapter}} if method.singles is None else {})


def _without_files(task: Mapping[str, Any]) -> dict[str, Any]:
    return {**task, "data": {key: value for key, value in task["data"].items() if key not in SPLITS}}


# --- work ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Source:
    """An adapter that a cell begins with: the run that it is of, and the folder that it is in, or is to be left in."""

    document: Mapping[str, Any]
    folder: str


@dataclass(frozen=True)
class Work:
    """What a worker does: all that `Cell` says, as plain values.

    Args:
        document: the cell's run.
        kind, cut: as of the cell.
        keep: the folder that its adapter is left in, for others; None: it is not kept.
        runs, sources, settings: as in `OfAll`, of a cell on all tasks.
        answers: as of the cell.
    """

    document: Mapping[str, Any]
    kind: str
    cut: int | None = None
    keep: str | None = None
    runs: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    sources: Mapping[str, Source] = field(default_factory=dict)
    settings: Mapping[str, Any] = field(default_factory=dict)
    answers: Answers | None = None


def work_of(cell: Cell, keep: Path | None, kept: Mapping[str, Path]) -> Work:
    """The work of a cell. `kept`: by task, where the adapter is, or is to be left, that it begins with."""
    every = cell.every or OfAll({}, {}, {})
    return Work(
        run_document(cell.run), cell.kind, cell.cut, None if keep is None else str(keep),
        {task: run_document(run) for task, run in every.runs.items()},
        {task: Source(run_document(source.run), str(kept[task])) for task, source in every.sources.items()},
        every.settings, cell.answers,
    )  # fmt: skip


def kept_folder(root: Path, cell: Cell, codes: Sequence[str]) -> Path:
    """Where an adapter is kept that code of any of these versions makes alike; the first one's where none is there."""
    folders = [root / f"{cell.identity}-{code}" for code in codes]
    return next((folder for folder in folders if folder.is_dir()), folders[0])
