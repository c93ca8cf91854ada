"""A bench on disk: its tasks, suites and store; which cells a suite consists of, and what is known of each.

A bench is a folder: `tasks.yaml`, `suites/NAME.yaml`, `store.jsonl`, `tables/`.
"""

from __future__ import annotations

import fnmatch
import importlib.metadata
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path
from statistics import fmean
from typing import Any

from rankwise.bench.code_version import CodeVersion, code_version
from rankwise.bench.kinds import ADAPTER, BASE
from rankwise.bench.store import Contents, Record, Store
from rankwise.bench.suite import COMPARISON, Method, Suite, suite_from
from rankwise.data.config import DataConfig
from rankwise.data.sources import content_hash, expand
from rankwise.errors import RequestError, did_you_mean
from rankwise.files import sha256_bytes, sha256_file
from rankwise.models.embedded import EMBEDDED
from rankwise.recipes.resume import FREE
from rankwise.recipes.run import RunConfig, build_run, run_document
from rankwise.recipes.run_yaml import absolute_paths, read_yaml
from rankwise.train.needs import NEEDS

CELL_MODULE = "rankwise.recipes.bench_cell"
"""What computes a cell: its source, and all that it imports, is the code's version."""

DEFAULT_FOLDER = Path("benchmarks") / "quality"
SUITES, TASKS, STORE, TABLES = "suites", "tasks.yaml", "store.jsonl", "tables"
THREADS = 1
"""Of each worker. Part of a cell's identity: sums over another number of threads round differently."""


@dataclass(frozen=True)
class Cell:
    """One run of a suite: a method on a task with a seed at a rate."""

    method: str
    task: str
    seed: int
    lr: float | None
    kind: str
    run: RunConfig
    cut: int | None = None

    @property
    def name(self) -> str:
        """`method/task/seed`, with the rate behind it: what `--only` is matched with."""
        return f"{self.method}/{self.task}/{self.seed}" + (f"@{self.lr:g}" if self.lr is not None else "")

    @cached_property
    def settings(self) -> dict[str, Any]:
        """What decides the result, apart from the code: settings that are not the default, data and base by content."""
        document, default = run_document(self.run), _defaults()
        skipped = {"adapter", "ranks"} if self.kind != ADAPTER else set[str]()
        found = {
            f"{section}.{name}": value
            for section, values in document.items()
            if isinstance(values, dict) and section not in skipped
            for name, value in values.items()
            if f"{section}.{name}" not in FREE and value != default[section].get(name)
        }
        if self.kind == BASE:  # nothing is trained: only what is read, and how a new head is drawn, counts
            found = {key: value for key, value in found.items() if not key.startswith("train.")}
            found["train.objective"], found["train.precision"] = self.run.train.objective, self.run.train.precision
        if self.kind == BASE and not _has_new_head(self.run):
            found.pop("train.seed", None)
        elif self.seed:
            found["train.seed"] = self.seed
        for split in ("train", "valid", "test"):
            found[f"data.{split}"] = _content(getattr(self.run.data, split))
        if self.cut is not None:
            found["cut"] = self.cut
        return found | {"kind": self.kind, "threads": THREADS, "model.name": base_identity(self.run.model.name)}

    @property
    def identity(self) -> str:
        """Names the cell, whatever code computes it."""
        return _digest(self.settings)

    @property
    def family(self) -> str:
        """Names the method on its model: the settings without seed, data and rate."""
        apart = ("train.seed", "train.lr", "data.train", "data.valid", "data.test")
        return _digest({key: value for key, value in self.settings.items() if key not in apart})


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


@dataclass(frozen=True)
class Bench:
    """A suite with the tasks, the store and the code that it is about."""

    name: str
    folder: Path
    suite: Suite
    tasks: Mapping[str, Mapping[str, Any]]
    accepts_stale: bool = False
    """Whether results of older code count, where there are no others: in reports, which mark them."""

    @property
    def store(self) -> Store:
        """Where all suites of the bench keep their cells."""
        return Store(self.folder / STORE)

    @cached_property
    def code(self) -> CodeVersion:
        """Of what computes cells, now."""
        return code_version(CELL_MODULE)

    def cell(self, method: str, task: str, seed: int, lr: float | None) -> Cell:
        """The cell of a method on a task.

        Raises: RequestError for settings that can't be.
        """
        asked = self.suite.methods[method]
        document = run_of(self.tasks[task], asked, seed, lr)
        try:
            run = build_run(absolute_paths(document, self.folder))
        except RequestError as error:
            raise RequestError(f"{method} on {task}: {error}") from None
        return Cell(method, task, seed, lr, asked.kind, run, asked.cut)

    def tuning_cells(self, method: str) -> list[Cell]:
        """The cells from which a method's rate is chosen, or of a table of rates, all."""
        suite = self.suite
        rates = suite.methods[method].rates
        return [self.cell(method, task, suite.tuning.seed, lr) for lr in rates for task in suite.tuning_tasks]

    def chosen_rate(self, method: str, known: Contents) -> float | None:
        """The rate with the lowest mean validation loss on the tuning seed.

        Raises: NotYet while some of its cells are missing.
        """
        rates = self.suite.methods[method].rates
        if not self.suite.is_tuned(method):
            return rates[0]
        losses: dict[float | None, list[float]] = {rate: [] for rate in rates}
        for cell in self.tuning_cells(method):
            record = self.usable(cell, known)
            if record is None:
                if self.failed(cell, known) is None:
                    raise NotYet(cell.name)
                losses.pop(cell.lr, None)  # a rate at which training fails is not chosen
            elif cell.lr in losses:
                losses[cell.lr].append(fmean(record.losses["valid"]))
        if not losses:
            raise NotYet(f"{method}: training failed at every rate")
        return min(losses, key=lambda rate: fmean(losses[rate]))

    def cells(self, method: str, known: Contents) -> Iterator[Cell]:
        """All cells of a method that are known by now: those of its grid first, then those at the chosen rate."""
        suite = self.suite
        if suite.table != COMPARISON:
            for seed in suite.seeds:
                for lr in suite.methods[method].rates:
                    yield from (self.cell(method, task, seed, lr) for task in suite.tasks)
            return
        if suite.is_tuned(method):
            yield from self.tuning_cells(method)
        try:
            rate = self.chosen_rate(method, known)
        except NotYet:
            return
        for seed in suite.seeds:
            yield from (self.cell(method, task, seed, rate) for task in suite.tasks)

    def plan(self, known: Contents, only: Sequence[str] = ()) -> list[Cell]:
        """The suite's cells in the order in which they are run: every method's first seeds before anyone's last.

        Cells that several methods share, or that appear twice, stand once.

        Raises: RequestError for a pattern of `only` that no method, task or cell fits.
        """
        of_each = [list(self.cells(method, known)) for method in self.suite.methods]
        order = sorted((cell for cells in of_each for cell in cells), key=lambda cell: cell.seed)
        unique = {cell.identity: cell for cell in reversed(order)}
        found = [cell for cell in order if unique.get(cell.identity) is cell]
        if not only:
            return found
        for pattern in only:
            if not any(matches(pattern, name) for name in self._names()):
                names = sorted({part for name in self._names() for part in name.split("/")[:2]})
                raise RequestError(f"--only {pattern} matches no cell{did_you_mean(pattern, names)}")
        return [cell for cell in found if any(matches(pattern, cell.name) for pattern in only)]

    def _names(self) -> Iterator[str]:
        for method, asked in self.suite.methods.items():
            for task in self.suite.tasks:
                for seed in self.suite.seeds:
                    yield from (_named(method, task, seed, rate) for rate in asked.rates)

    def usable(self, cell: Cell, known: Contents) -> Record | None:
        """The cell's result by this code, or by code that is known to give the same; else a stale one, if accepted."""
        found = known.find(cell.identity, self.code.name)
        return known.stale(cell.identity, self.code.name) if found is None and self.accepts_stale else found

    def is_done(self, cell: Cell, known: Contents) -> bool:
        """Whether the cell has a result that is not stale."""
        return known.find(cell.identity, self.code.name) is not None

    def failed(self, cell: Cell, known: Contents) -> Record | None:
        """The record of a failure by this code, where nothing better is known."""
        return None if self.is_done(cell, known) else known.find(cell.identity, self.code.name, "failed")


def _named(method: str, task: str, seed: int, lr: float | None) -> str:
    return f"{method}/{task}/{seed}" + (f"@{lr:g}" if lr is not None else "")


class NotYet(Exception):  # noqa: N818 (a state, not an error)
    """A rate can't be chosen before its grid has been run."""


def matches(pattern: str, name: str) -> bool:
    """Whether `lora-*`, `lora-r4/movies`, `*/movies/0` and the like mean a cell: its name, or how that begins."""
    parts = name.split("@")[0].split("/")
    beginnings = ["/".join(parts[:count]) for count in range(1, len(parts) + 1)]
    return any(fnmatch.fnmatchcase(candidate, pattern) for candidate in (name, *beginnings))


def run_of(task: Mapping[str, Any], method: Method, seed: int, lr: float | None) -> dict[str, Any]:
    """The run file's mapping of a cell."""
    train = {**task.get("train", {}), **method.train, "seed": seed}
    if lr is not None:
        train["lr"] = lr
    document: dict[str, Any] = {**task, "train": train}
    if method.kind == ADAPTER:
        document |= {"adapter": {**method.adapter}, "ranks": {**method.ranks}}
    return document


def open_bench(name: str) -> Bench:
    """The suite at the path `name`, or of that name in `benchmarks/quality/suites` under the current folder.

    Raises: RequestError for files that are missing or wrong.
    """
    path = Path(name)
    if path.suffix != ".yaml":
        suites = DEFAULT_FOLDER / SUITES
        path = suites / f"{name}.yaml"
        if not path.is_file():
            known = sorted(file.stem for file in suites.glob("*.yaml"))
            raise RequestError(f"there is no suite '{name}' in '{suites}'{did_you_mean(name, known)}")
    path = path.absolute()
    document = read_yaml(path)
    folder = path.parent.parent
    if not (folder / TASKS).is_file():
        raise RequestError(f"'{path}' is in no bench: there is no {TASKS} in '{folder}'")
    tasks = read_yaml(folder / TASKS)
    templates = {task: values for task, values in tasks.items() if not task.startswith(".")}
    for task, values in templates.items():
        if not isinstance(values, Mapping) or set(values) - {"model", "data", "train"}:
            raise RequestError(f"{TASKS}: '{task}' must hold a run file's model:, data: and train:, without the others")
    return Bench(path.stem, folder, suite_from(document, list(templates)), templates)
