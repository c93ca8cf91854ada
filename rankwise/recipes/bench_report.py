"""A suite's table from the store: nothing is trained, and the same store gives the same text."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from statistics import fmean
from typing import Any

import numpy as np

from rankwise.bench.compare import NO_WORSE, Losses, Plan, Row, compare, margin_of, sentence
from rankwise.bench.kinds import FULL
from rankwise.bench.markdown import Costs, Page, comparison_page, rates_page
from rankwise.bench.picture import Point, draw
from rankwise.bench.rates import LEAST_SEEDS, RateRow, rate_row, rate_sentences
from rankwise.bench.store import Contents, Record
from rankwise.bench.suite import COMPARISON, Margin
from rankwise.errors import counted
from rankwise.files import write_text
from rankwise.recipes.bench import TABLES, Bench, Cell, NotYet, open_bench

BUSY_LOAD = 2.0
"""A load average above which times are said to be noisy."""


@dataclass(frozen=True)
class Report:
    """A table's text, its rows as values, a sentence for each, and what is drawn."""

    text: str
    rows: list[dict[str, Any]]
    sentences: list[str]
    points: list[Point] = field(default_factory=list)


def bench_report(name: str, write: bool = True) -> dict[str, Any]:
    """Writes `tables/NAME.md` and `NAME.png`: `table`, `picture`, `rows`, `sentences`, `cells`, `stale`, `missing`, ...

    Raises: RequestError for a suite or store that can't be read.
    """
    bench = dataclasses.replace(open_bench(name), accepts_stale=True)
    known = bench.store.read()
    report = _comparison(bench, known) if bench.suite.table == COMPARISON else _rates(bench, known)
    path = bench.folder / TABLES / f"{bench.name}.md"
    picture = path.with_suffix(".png") if report.points else None
    if write:
        if picture is not None:
            draw(report.points, bench.suite.title, picture)
        write_text(path, report.text)
    used = list(_used(bench, known))
    return {
        "suite": bench.name, "table": str(path), "picture": None if picture is None else str(picture),
        "rows": report.rows, "sentences": report.sentences,
        "cells": len(used), "stale": sum(_is_stale(bench, cell, known) for cell, _ in used),
        "missing": _num_missing(bench, known), "cpu_s": sum(record.figures["cpu_s"] for _, record in used),
    }  # fmt: skip


def _used(bench: Bench, known: Contents) -> Iterator[tuple[Cell, Record]]:
    """The suite's cells that have a result."""
    for cell in bench.plan(known):
        record = bench.usable(cell, known)
        if record is not None:
            yield cell, record


def _is_stale(bench: Bench, cell: Cell, known: Contents) -> bool:
    return known.find(cell.identity, bench.code.name) is None


def _num_missing(bench: Bench, known: Contents) -> int:
    suite = bench.suite
    wanted = len(suite.methods) * len(suite.tasks) * len(suite.seeds)
    if suite.table != COMPARISON:
        wanted = sum(len(method.rates) for method in suite.methods.values()) * len(suite.tasks) * len(suite.seeds)
    there = _found(bench, known) if suite.table == COMPARISON else {}
    done = sum(len(seeds) for tasks in there.values() for seeds in tasks.values())
    if suite.table != COMPARISON:
        done = sum(1 for _ in _used(bench, known))
    return wanted - done


def _found(bench: Bench, known: Contents) -> dict[str, dict[str, dict[int, Record]]]:
    """Results at each method's chosen rate."""
    found: dict[str, dict[str, dict[int, Record]]] = {}
    for method in bench.suite.methods:
        found[method] = {task: {} for task in bench.suite.tasks}
        try:
            rate = bench.chosen_rate(method, known)
        except NotYet:
            continue
        for task in bench.suite.tasks:
            for seed in bench.suite.seeds:
                record = bench.usable(bench.cell(method, task, seed, rate), known)
                if record is not None:
                    found[method][task][seed] = record
    return found


def _losses(tasks: Mapping[str, Mapping[int, Record]]) -> Losses:
    return {
        split: {task: {seed: record.losses[split] for seed, record in seeds.items()} for task, seeds in tasks.items()}
        for split in ("train", "valid", "test")
    }


def _comparison(bench: Bench, known: Contents) -> Report:
    suite = bench.suite
    assert suite.reference is not None
    found = _found(bench, known)
    losses = {method: _losses(tasks) for method, tasks in found.items()}
    gain = suite.margin
    margin = None if gain is None else margin_of(losses[gain.base], losses[gain.to], suite.tasks, gain.share)
    share_of = None if suite.share_of is None else (suite.share_of.base, suite.share_of.to)
    plan = Plan(suite.tasks, suite.reference, margin, share_of, len(suite.seeds))
    rows = compare(losses, plan)
    costs = {method: _costs(bench, method, found[method], known) for method in suite.methods}
    points = _points(rows, costs, len(suite.seeds))
    picture = f"{bench.name}.png" if points else None
    facts = [*_facts(bench, known), _margin_fact(gain, margin)]
    page = Page(suite.title, suite.note, facts, _failed(bench, known), picture)
    documents = [_document(row, costs[row.name], plan) for row in rows]
    sentences = [sentence(row, plan) for row in rows]
    return Report(comparison_page(page, rows, costs, plan), documents, sentences, points)


def _points(rows: list[Row], costs: Mapping[str, Costs], num_seeds: int) -> list[Point]:
    points = []
    for row in rows:
        parameters = costs[row.name].parameters
        if row.loss is not None and parameters is not None:
            name = row.name if len(row.seeds) == num_seeds else f"{row.name} ({len(row.seeds)} of {num_seeds} seeds)"
            points.append(Point(name, parameters, row.loss, row.difference.half if row.difference else 0.0))
    return points


def _document(row: Row, cost: Costs, plan: Plan) -> dict[str, Any]:
    difference = row.difference
    return {
        "method": row.name, "verdict": row.verdict, "sentence": sentence(row, plan), "seeds": len(row.seeds),
        "loss": row.loss, "p": row.p, "stale": cost.is_stale, "trainable_parameters": cost.parameters,
        "flops": cost.flops,
        "difference": None if difference is None else [difference.mean, difference.low, difference.high],
    }  # fmt: skip


def _costs(bench: Bench, method: str, tasks: Mapping[str, Mapping[int, Record]], known: Contents) -> Costs:
    rate = _rate_text(bench, method, known)
    records = [record for seeds in tasks.values() for record in seeds.values()]
    if not records:
        return Costs(rate)
    figures = [record.figures for record in records]
    right = [np.mean(record.body["correct"]["test"]) for record in records if record.body["correct"].get("test")]
    return Costs(
        rate, figures[0]["trainable_parameters"], figures[0]["adapter_bytes"],
        fmean(one["peak_memory_bytes"] for one in figures), fmean(one["cpu_s"] for one in figures),
        fmean(one["flops"] for one in figures) if all("flops" in one for one in figures) else None,
        float(np.mean(right)) if right else None,
        any(_is_old(bench, record, known) for record in records),
    )  # fmt: skip


def _is_old(bench: Bench, record: Record, known: Contents) -> bool:
    return known.find(record.cell, bench.code.name) is None


def _rate_text(bench: Bench, method: str, known: Contents) -> str:
    """The rate, and where it stands in its grid."""
    rates = [rate for rate in bench.suite.methods[method].rates if rate is not None]
    if not rates:
        return ""
    grid = ", ".join(f"{rate:g}" for rate in rates)
    try:
        rate = bench.chosen_rate(method, known)
    except NotYet:
        return f"to be chosen of {grid}"
    assert rate is not None
    if not bench.suite.is_tuned(method):
        return f"{rate:g}"
    edge = ", at the edge" if rate in (rates[0], rates[-1]) else ""
    return f"{rate:g} (of {grid}{edge})"


def _facts(bench: Bench, known: Contents) -> list[str]:
    suite, used = bench.suite, list(_used(bench, known))
    stale = [(cell, record) for cell, record in used if _is_stale(bench, cell, known)]
    minutes = sum(record.figures["cpu_s"] for _, record in used) / 60
    facts = [
        f"Tasks: {', '.join(suite.tasks)}, each counting the same. Seeds: {len(suite.seeds)}, the same for every "
        "method: start, order of rows, new heads.",
        f"{counted(len(used), 'cell')} of this table are in the store, {_num_missing(bench, known):,} are missing; "
        f"{minutes:.0f} CPU-minutes of training and measuring.",
    ]
    if suite.table == COMPARISON and any(suite.is_tuned(method) for method in suite.methods):
        facts.append(
            f"Each method's learning rate is that of the lowest validation loss on seed {suite.tuning.seed} of "
            f"{', '.join(suite.tuning_tasks)}."
        )
    if used:
        facts.append(_where(used))
    if stale:
        changed = bench.store.read().changed_files(stale[0][1].code, bench.code.files)
        facts.append(
            f"† {counted(len(stale), 'cell')} stale: computed by older code that later changes could alter "
            f"({', '.join(changed[:4])}{', ...' if len(changed) > 4 else ''})."
        )
    return facts


def _where(used: list[tuple[Cell, Record]]) -> str:
    records = [record for _, record in used]
    machines = sorted({record.body["machine"] for record in records})
    libraries = sorted({" ".join(f"{name} {value}" for name, value in r.body["versions"].items()) for r in records})
    codes = sorted({record.code for record in records})
    loads = [record.figures["load_average"] for record in records]
    text = f"Machine: {'; '.join(machines)}, one thread a cell. {'; '.join(libraries)}. Code {', '.join(codes)}."
    if max(loads) > BUSY_LOAD:
        text += (
            f" CPU-seconds were taken beside other work (load {min(loads):.1f} to {max(loads):.1f}), and are noisy; "
            "losses do not depend on it."
        )
    return text


def _margin_fact(gain: Margin | None, margin: float | None) -> str:
    if gain is None:
        return f'No margin: "{NO_WORSE}" is never said.'
    size = "not known before two seeds of both have been run" if margin is None else f"{margin:.4f} nats"
    rule = f"{gain.share:.0%} of the gain from {gain.base} to {gain.to} on validation rows"
    return f'Margin of "{NO_WORSE}": {rule}, {size}.'


def _failed(bench: Bench, known: Contents) -> dict[str, str]:
    found = {cell.name: bench.failed(cell, known) for cell in bench.plan(known)}
    return {name: record.body["reason"] for name, record in found.items() if record is not None}


def _rates(bench: Bench, known: Contents) -> Report:
    suite = bench.suite
    rows = [_rate_row(bench, method, known) for method in suite.methods]
    full = next((name for name, method in suite.methods.items() if method.kind == FULL), None)
    page = Page(suite.title, suite.note, _facts(bench, known), _failed(bench, known))
    documents = [
        {"method": row.name, "best": row.best, "likely": list(row.likely), "losses": dict(row.losses)} for row in rows
    ]
    sentences = rate_sentences(rows, full)
    return Report(rates_page(page, rows, sentences), documents, sentences)


def _rate_row(bench: Bench, method: str, known: Contents) -> RateRow:
    """Of the rates that have the most seeds on every task: all the same, for they are compared."""
    suite = bench.suite
    found: dict[float, dict[int, list[Record]]] = {}
    for rate in suite.methods[method].rates:
        assert rate is not None
        of_seed = {s: [bench.usable(bench.cell(method, t, s, rate), known) for t in suite.tasks] for s in suite.seeds}
        found[rate] = {seed: [r for r in records if r] for seed, records in of_seed.items() if all(records)}
    most = max(len(seeds) for seeds in found.values())
    seeds = set.intersection(*(set(there) for there in found.values() if len(there) == most))
    if most < LEAST_SEEDS or len(seeds) < LEAST_SEEDS:
        return rate_row(method, {}, sorted(found))
    chosen = sorted(seeds)
    tasks_of = {
        rate: [np.array([there[seed][place].losses["valid"] for seed in chosen]) for place in range(len(suite.tasks))]
        for rate, there in found.items()
        if seeds <= set(there)
    }
    return rate_row(method, tasks_of, [rate for rate in found if rate not in tasks_of])
