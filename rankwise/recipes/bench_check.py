"""Stored cells run again, and every loss compared to the last bit: whether results of older code still hold."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from rankwise.bench.store import FAILED, SAME, Contents, Record
from rankwise.errors import RequestError, counted
from rankwise.recipes.bench import MODULES, Bench, module_for, open_bench
from rankwise.recipes.bench_cells import ANSWERS, Cell
from rankwise.recipes.bench_run import Worker, alone, finished, outcome_of, start
from rankwise.say import Say, silent, to_stderr


def bench_check(name: str, only: Sequence[str] = (), num_workers: int = 2, quiet: bool = False) -> dict[str, Any]:
    """Runs stored cells again and compares every loss, to the last bit: `cells`, a list of `{cell, exact, ...}`.

    Without `only`, the quickest cell of each method. Where the stored result is of older code and all is the same, the
    store notes that for the method: its results are then no longer stale. `num_workers`: processes at a time.

    Raises: RequestError for a suite that can't be read, one that has no finished cells, or a store in use.
    """
    bench = dataclasses.replace(open_bench(name), accepts_stale=True)
    say = silent if quiet else to_stderr
    with alone(bench):
        known = bench.store.read()
        chosen = _to_check(bench, known, only)
        if not chosen:
            raise RequestError(f"no finished cell of '{bench.name}' to run again; run the suite first")
        compared = _run_again(bench, chosen, known, num_workers, say)
        _note_same(bench, chosen, compared)
    result: dict[str, Any] = {"suite": bench.name, "code": bench.code.name, "cells": compared}
    unlike = [entry["cell"] for entry in compared if not entry["exact"]]
    if unlike:
        text = f"{counted(len(unlike), 'cell')} came out otherwise than stored: {', '.join(unlike)}"
        result["error"] = {"code": 1, "message": text}
    return result


def _note_same(bench: Bench, chosen: Sequence[tuple[Cell, Record]], compared: Sequence[Mapping[str, Any]]) -> None:
    """Writes down which methods' results are the same by the code that there is now."""
    for module in MODULES:
        checked = [
            (entry, record)
            for entry, (cell, record) in zip(compared, chosen, strict=True)
            if module_for(cell.settings) == module
        ]
        if not checked:
            continue
        code = bench.code_for(checked[0][1].body["settings"])
        for old in sorted({record.code for _, record in checked} - {code.name}):
            of_old = [(entry, record) for entry, record in checked if record.code == old]
            differing = {record.family for entry, record in of_old if not entry["exact"]}
            families = sorted({record.family for _, record in of_old} - differing)
            if families:
                cells = [entry["cell"] for entry, record in of_old if record.family in families]
                line = {"kind": SAME, "old": old, "new": code.name, "families": families, "cells": cells}
                bench.store.append(line, code.name, code.files)


def _to_check(bench: Bench, known: Contents, only: Sequence[str]) -> list[tuple[Cell, Record]]:
    found = [(cell, bench.usable(cell, known)) for cell in bench.plan(known, only)]
    there = [(cell, record) for cell, record in found if record is not None]
    if only:
        return there
    quickest: dict[str, tuple[Cell, Record]] = {}
    for cell, record in sorted(there, key=lambda pair: pair[1].figures["cpu_s"]):
        quickest.setdefault(record.family, (cell, record))
    return list(quickest.values())


def _run_again(
    bench: Bench, chosen: Sequence[tuple[Cell, Record]], known: Contents, num_workers: int, say: Say
) -> list[dict[str, Any]]:
    """Each of them compared, in their order."""
    found: dict[int, dict[str, Any]] = {}
    waiting, at_work = list(range(len(chosen)))[::-1], dict[int, Worker]()
    try:
        while waiting or at_work:
            while waiting and len(at_work) < num_workers:
                place = waiting.pop()
                cell = chosen[place][0]
                at_work[place] = start(cell, bench.work(cell, known))
            done = {id(worker) for worker in finished(list(at_work.values()))}
            for place in [place for place, worker in at_work.items() if id(worker) in done]:
                found[place] = _compared(*chosen[place], outcome_of(at_work.pop(place)), say)
    finally:
        for worker in at_work.values():
            worker.process.terminate()
            worker.process.join()
    return [found[place] for place in range(len(chosen))]


def _compared(cell: Cell, record: Record, outcome: Mapping[str, Any], say: Say) -> dict[str, Any]:
    entry: dict[str, Any] = {"cell": cell.name, "stored_code": record.code}
    if outcome["status"] == FAILED:
        entry |= {"exact": False, "reason": outcome["reason"]}
    else:
        pairs = [
            (old, new)
            for split, losses in record.losses.items()
            for old, new in zip(losses, outcome["losses"][split], strict=True)
        ]
        alike = all(old == new for old, new in pairs) and record.body.get(ANSWERS) == outcome.get(ANSWERS)
        entry |= {"exact": alike, "max_abs_diff": max(abs(o - n) for o, n in pairs)}
    say(f"{cell.name}: " + ("the same to the last bit" if entry["exact"] else f"differs: {entry}"))
    return entry
