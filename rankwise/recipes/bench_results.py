"""What the store has of a suite: the results that its table is made of, and which are missing or stale."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from rankwise.bench.compare import Losses
from rankwise.bench.store import Contents, Record
from rankwise.recipes.bench import Bench, NotYet
from rankwise.recipes.bench_cells import Cell


def used_of(bench: Bench, known: Contents) -> Iterator[tuple[Cell, Record]]:
    """The suite's cells that have a result."""
    for cell in bench.plan(known):
        record = bench.usable(cell, known)
        if record is not None:
            yield cell, record


def is_stale(bench: Bench, cell: Cell, known: Contents) -> bool:
    """Whether the result is of code that may give another one now."""
    return known.find(cell.identity, bench.code_for(cell.settings).name) is None


def num_missing(bench: Bench, known: Contents) -> int:
    """How many of the suite's cells have no result, those of grids and those that can't be planned yet among them."""
    planned = sum(bench.usable(cell, known) is None for cell in bench.plan(known))
    return planned + len(bench.unplanned(known))


def records_of(bench: Bench, method: str, known: Contents) -> list[tuple[Cell, Record]]:
    """Results at the method's chosen rate."""
    found = [(cell, bench.usable(cell, known)) for cell in _chosen_cells(bench, method, known)]
    return [(cell, record) for cell, record in found if record is not None]


def _chosen_cells(bench: Bench, method: str, known: Contents) -> list[Cell]:
    """Those at the method's chosen rate; none while it can't be chosen."""
    try:
        rate = bench.chosen_rate(method, known)
        return [cell for seed in bench.suite.seeds for cell in bench.cells_at(method, seed, rate, known)]
    except NotYet:
        return []


def found_of(bench: Bench, known: Contents) -> dict[str, dict[str, dict[int, Record]]]:
    """Results at each method's chosen rate, by task and seed; those of a cell on all tasks, taken apart."""
    found: dict[str, dict[str, dict[int, Record]]] = {}
    for method in bench.suite.methods:
        found[method] = {task: {} for task in bench.suite.tasks}
        for cell, record in records_of(bench, method, known):
            for task in bench.suite.tasks if cell.every is not None else [cell.task]:
                found[method][task][cell.seed] = record if cell.every is None else record.of_task(task)
    return found


def num_failed(bench: Bench, known: Contents) -> dict[str, int]:
    """By method, how many cells at its chosen rate failed and have no result; methods without any are left out."""
    found: dict[str, int] = {}
    for method in bench.suite.methods:
        cells = _chosen_cells(bench, method, known)
        failed = sum(bench.usable(cell, known) is None and bench.failed(cell, known) is not None for cell in cells)
        if failed:
            found[method] = failed
    return found


def losses_of(tasks: Mapping[str, Mapping[int, Record]]) -> Losses:
    """By split, task and seed, each example's loss."""
    splits = {split: None for seeds in tasks.values() for record in seeds.values() for split in record.losses}
    return {
        split: {
            task: {seed: record.losses[split] for seed, record in seeds.items() if split in record.losses}
            for task, seeds in tasks.items()
        }
        for split in splits or ("train", "valid", "test")
    }
