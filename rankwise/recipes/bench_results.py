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
    try:
        rate = bench.chosen_rate(method, known)
        cells = [cell for seed in bench.suite.seeds for cell in bench.cells_at(method, seed, rate, known)]
    except NotYet:
        return []
    found = [(cell, bench.usable(cell, known)) for cell in cells]
    return [(cell, record) for cell, record in found if record is not None]


def found_of(bench: Bench, known: Contents) -> dict[str, dict[str, dict[int, Record]]]:
    """Results at each method's chosen rate, by task and seed; those of a cell on all tasks, taken apart."""
    found: dict[str, dict[str, dict[int, Record]]] = {}
    for method in bench.suite.methods:
        found[method] = {task: {} for task in bench.suite.tasks}
        for cell, record in records_of(bench, method, known):
            for task in bench.suite.tasks if cell.every is not None else [cell.task]:
                found[method][task][cell.seed] = record if cell.every is None else record.of_task(task)
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
