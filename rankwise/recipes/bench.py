"""A bench on disk: its tasks, suites and store; which cells a suite consists of, and what is known of each.

A bench is a folder: `tasks.yaml`, `suites/NAME.yaml`, `store.jsonl`, `tables/`.
"""

from __future__ import annotations

import fnmatch
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from statistics import fmean
from typing import Any

from rankwise.bench.code_version import CodeVersion, code_version
from rankwise.bench.kinds import ADAPTER, BASE, OF_ALL, TASKS
from rankwise.bench.store import Contents, Record, Store
from rankwise.bench.suite import RATES, Answers, Method, Suite, suite_from
from rankwise.bench.suite_checks import check_document, check_suite, check_tasks
from rankwise.errors import RequestError, did_you_mean
from rankwise.recipes.bench_cells import (
    ALL,
    ANSWERS,
    Cell,
    OfAll,
    Work,
    kept_folder,
    named,
    run_of,
    run_of_all,
    work_of,
)
from rankwise.recipes.run import RunConfig, build_run
from rankwise.recipes.run_yaml import absolute_paths, read_yaml

CELL_MODULE = "rankwise.recipes.bench_cell"
"""What computes a cell: its source, and all that it imports, is the code's version."""
ALL_MODULE = "rankwise.recipes.bench_of_all"
"""Likewise for a cell on all tasks."""
ANSWERS_MODULE = "rankwise.recipes.bench_answers"
"""Likewise for a cell with answers."""
MODULES = (CELL_MODULE, ALL_MODULE, ANSWERS_MODULE)

DEFAULT_FOLDER = Path("benchmarks") / "quality"
SUITES, TASKS_FILE, STORE, TABLES, KEPT = "suites", "tasks.yaml", "store.jsonl", "tables", "adapters"


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
        """Of what computes cells on one task, now."""
        return code_version(CELL_MODULE)

    @cached_property
    def _other_code(self) -> dict[str, CodeVersion]:
        return {module: code_version(module) for module in MODULES if module != CELL_MODULE}

    def code_for(self, settings: Mapping[str, Any]) -> CodeVersion:
        """Of what computes a cell of these settings, now."""
        module = module_for(settings)
        return self.code if module == CELL_MODULE else self._other_code[module]

    def cell(self, method: str, task: str, seed: int, lr: float | None) -> Cell:
        """The cell of a method on a task.

        Raises: RequestError for settings that can't be.
        """
        key = (method, task, seed, lr)
        if key not in self._made:
            asked = self.suite.methods[method]
            run = self._run(run_of(self.tasks[task], asked, seed, lr), f"{method} on {task}")
            answers = self._answers(method, task, seed, run)
            self._made[key] = Cell(method, task, seed, lr, asked.kind, run, asked.cut, answers=answers)
        return self._made[key]

    def _answers(self, method: str, task: str, seed: int, run: RunConfig) -> Answers | None:
        asked = self.suite.answers
        if asked is None or method not in asked.methods or seed != asked.seed:
            return None
        if run.train.objective != "sft":
            raise RequestError(
                f"answers has no effect: '{task}' is of objective {run.train.objective}, which asks for none; "
                "leave it out"
            )
        return asked

    @cached_property
    def _made(self) -> dict[tuple[object, ...], Cell]:
        """Cells that have been asked for: a runner asks for all of them after each that is done."""
        return {}

    def cell_of_all(self, method: str, seed: int, lr: float | None, known: Contents) -> Cell:
        """The cell of a method on all tasks of the suite.

        Raises: RequestError for settings that can't be; NotYet while the rate of its adapters can't be chosen.
        """
        asked, names = self.suite.methods[method], self.suite.tasks
        rate = None if asked.singles is None else self.chosen_rate(asked.singles, known)
        key = (method, ALL, seed, lr, rate)
        if key in self._made:
            return self._made[key]
        alone = Method(kind=BASE)
        runs = {task: self._run(run_of(self.tasks[task], alone, seed, None), f"{method} on {task}") for task in names}
        sources: dict[str, Cell] = {}
        if asked.singles is not None:
            sources = {task: self.cell(asked.singles, task, seed, rate) for task in names}
        trained = names if asked.added is None else names[:-1]
        run = runs[names[0]]
        if asked.kind == TASKS:
            document = run_of_all({task: self.tasks[task] for task in trained}, asked, seed, lr)
            run = self._run(document, method)
        settings = {name: getattr(asked, name) for name in ("combine", "gate", "new_task") if getattr(asked, name)}
        self._made[key] = Cell(method, ALL, seed, lr, asked.kind, run, None, OfAll(runs, sources, settings))
        return self._made[key]

    def _run(self, document: Mapping[str, Any], where: str) -> RunConfig:
        try:
            return build_run(absolute_paths(document, self.folder))
        except RequestError as error:
            raise RequestError(f"{where}: {error}") from None

    def cells_at(self, method: str, seed: int, lr: float | None, known: Contents) -> list[Cell]:
        """The cells of a method with a seed at a rate: one for each task, or one for all. Raises: as `cell_of_all`."""
        if self.suite.methods[method].is_of_all:
            return [self.cell_of_all(method, seed, lr, known)]
        return [self.cell(method, task, seed, lr) for task in self.suite.tasks]

    def tuning_cells(self, method: str, known: Contents) -> list[Cell]:
        """The cells from which a method's rate is chosen, or of a table of rates, all. Raises: as `cell_of_all`."""
        suite = self.suite
        rates, seed = suite.methods[method].rates, suite.tuning.seed
        if suite.methods[method].is_of_all:
            return [self.cell_of_all(method, seed, lr, known) for lr in rates]
        return [self.cell(method, task, seed, lr) for lr in rates for task in suite.tuning_tasks]

    def chosen_rate(self, method: str, known: Contents) -> float | None:
        """The rate with the lowest mean validation loss on the tuning seed.

        Raises: NotYet while some of its cells are missing.
        """
        asked = self.suite.methods[method]
        if isinstance(asked.lr, str):
            return self.chosen_rate(asked.lr, known)
        if not self.suite.is_tuned(method):
            return asked.rates[0]
        losses: dict[float | None, list[float]] = {rate: [] for rate in asked.rates}
        for cell in self.tuning_cells(method, known):
            record = self.usable(cell, known)
            if record is None:
                if self.failed(cell, known) is None:
                    raise NotYet(cell.name)
                losses.pop(cell.lr, None)  # a rate at which training fails is not chosen
            elif cell.lr in losses:
                losses[cell.lr].append(mean_loss(record.losses, "valid"))
        if not losses:
            raise NotYet(f"{method}: training failed at every rate")
        return min(losses, key=lambda rate: fmean(losses[rate]))

    def cells(self, method: str, known: Contents) -> Iterator[Cell]:
        """All cells of a method that are known by now: those of its grid first, then those at the chosen rate."""
        suite = self.suite
        if suite.table == RATES:
            for seed in suite.seeds:
                for lr in suite.methods[method].rates:
                    yield from self.cells_at(method, seed, lr, known)
            return
        try:
            if suite.is_tuned(method):
                yield from self.tuning_cells(method, known)
            rate = self.chosen_rate(method, known)
            for seed in suite.seeds:
                yield from self.cells_at(method, seed, rate, known)
        except NotYet:
            return

    def plan(self, known: Contents, only: Sequence[str] = ()) -> list[Cell]:
        """The suite's cells in the order in which they are run: every method's first seeds before anyone's last.

        Cells that several methods share, or that appear twice, stand once.

        Raises: RequestError for a pattern of `only` that no method, task or cell fits.
        """
        of_each = [list(self.cells(method, known)) for method in self.suite.methods]
        order = sorted((cell for cells in of_each for cell in cells), key=lambda cell: cell.seed)
        unique: dict[str, Cell] = {}
        for cell in order:
            unique.setdefault(cell.identity, cell)
        found = list(unique.values())
        if not only:
            return found
        for pattern in only:
            if not any(matches(pattern, name) for name in self._names()):
                names = sorted({part for name in self._names() for part in name.split("/")[:2]})
                raise RequestError(f"--only {pattern} matches no cell{did_you_mean(pattern, names)}")
        return [cell for cell in found if any(matches(pattern, cell.name) for pattern in only)]

    def unplanned(self, known: Contents, only: Sequence[str] = ()) -> list[str]:
        """The names, without rates, of cells that `plan` does not hold yet: a rate that they need is not chosen.

        A cell that is at the chosen rate in the method's grid counts there alone.
        """
        found = [name for method in self.suite.methods for name in self._unplanned(method, known)]
        return [name for name in found if not only or any(matches(pattern, name) for pattern in only)]

    def _unplanned(self, method: str, known: Contents) -> list[str]:
        suite, asked = self.suite, self.suite.methods[method]
        if suite.table == RATES:
            return []
        grid = set[str]()
        found: list[str] = []
        if suite.is_tuned(method):
            tasks = (ALL,) if asked.is_of_all else suite.tuning_tasks
            grid = {named(method, task, suite.tuning.seed, None) for task in tasks}
            try:
                self.tuning_cells(method, known)
            except NotYet:
                found += [name for name in sorted(grid) for _ in asked.rates]
        try:
            rate = self.chosen_rate(method, known)
            for seed in suite.seeds:
                self.cells_at(method, seed, rate, known)
        except NotYet:
            tasks = (ALL,) if asked.is_of_all else suite.tasks
            names = [named(method, task, seed, None) for seed in suite.seeds for task in tasks]
            return found + [name for name in names if name not in grid]
        return found

    def _names(self) -> Iterator[str]:
        for method, asked in self.suite.methods.items():
            for task in (ALL,) if asked.is_of_all else self.suite.tasks:
                for seed in self.suite.seeds:
                    yield from (named(method, task, seed, rate) for rate in asked.rates)

    def usable(self, cell: Cell, known: Contents) -> Record | None:
        """The cell's result by this code, or by code that is known to give the same; else a stale one, if accepted."""
        code = self.code_for(cell.settings).name
        found = known.find(cell.identity, code)
        return known.stale(cell.identity, code) if found is None and self.accepts_stale else found

    def is_done(self, cell: Cell, known: Contents) -> bool:
        """Whether the cell has a result that is not stale."""
        return known.find(cell.identity, self.code_for(cell.settings).name) is not None

    def failed(self, cell: Cell, known: Contents) -> Record | None:
        """The record of a failure by this code, where nothing better is known."""
        if self.is_done(cell, known):
            return None
        return known.find(cell.identity, self.code_for(cell.settings).name, "failed")

    def work(self, cell: Cell, known: Contents) -> Work:
        """What a worker does for a cell: adapters that others begin with lie in a folder beside the store."""
        is_kept = cell.kind == ADAPTER and cell.method in self.suite.kept
        sources = {} if cell.every is None else cell.every.sources
        return work_of(
            cell, self._kept(cell, known) if is_kept else None,
            {task: self._kept(source, known) for task, source in sources.items()},
        )  # fmt: skip

    def _kept(self, cell: Cell, known: Contents) -> Path:
        now = self.code.name
        alike = sorted(old for family, old, new in known.same if family == cell.family and new == now)
        return kept_folder(self.folder / KEPT, cell, [now, *alike])


def module_for(settings: Mapping[str, Any]) -> str:
    """The module that computes a cell of these settings: one of MODULES."""
    if ANSWERS in settings:
        return ANSWERS_MODULE
    return ALL_MODULE if settings["kind"] in OF_ALL else CELL_MODULE


def mean_loss(losses: Mapping[str, Sequence[float]], split: str) -> float:
    """Of a cell on one task, or on all, each counting the same."""
    return fmean(fmean(values) for key, values in losses.items() if key.rpartition("/")[2] == split)


class NotYet(Exception):  # noqa: N818 (a state, not an error)
    """A rate can't be chosen before its grid has been run."""


def matches(pattern: str, name: str) -> bool:
    """Whether `lora-*`, `lora-r4/movies`, `*/movies/0` and the like mean a cell: its name, or how that begins."""
    parts = name.split("@")[0].split("/")
    beginnings = ["/".join(parts[:count]) for count in range(1, len(parts) + 1)]
    return any(fnmatch.fnmatchcase(candidate, pattern) for candidate in (name, *beginnings))


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
    if not (folder / TASKS_FILE).is_file():
        raise RequestError(f"'{path}' is in no bench: there is no {TASKS_FILE} in '{folder}'")
    tasks = read_yaml(folder / TASKS_FILE)
    check_tasks(tasks, TASKS_FILE)
    templates = {task: values for task, values in tasks.items() if not task.startswith(".")}
    check_document(document)
    suite = suite_from(document, list(templates))
    check_suite(suite, document)
    return Bench(path.stem, folder, suite, templates)
