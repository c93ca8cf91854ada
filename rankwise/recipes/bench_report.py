"""A suite's table from the store: nothing is trained, and the same store gives the same text."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from statistics import fmean
from typing import Any

import numpy as np

from rankwise.bench.compare import Losses, Plan, Row, compare, default_sentence, margin_of, sentence
from rankwise.bench.gaps import gap_sentence, gaps
from rankwise.bench.kinds import FULL
from rankwise.bench.markdown import Costs, Page, Several, comparison_page, rates_page, several_page
from rankwise.bench.picture import Point, draw
from rankwise.bench.rates import LEAST_SEEDS, RateRow, rate_row, rate_sentences
from rankwise.bench.several import change_sentence, changes, rows_by_task, tasks_sentence, worst_sentence, worst_tasks
from rankwise.bench.store import Contents, Record
from rankwise.bench.suite import COMPARISON, RATES, SEVERAL, Suite
from rankwise.files import write_text
from rankwise.recipes.bench import TABLES, Bench, NotYet, open_bench
from rankwise.recipes.bench_cells import ANSWERS
from rankwise.recipes.bench_facts import facts_of, failed_cells, margin_fact
from rankwise.recipes.bench_results import found_of, is_stale, losses_of, num_failed, num_missing, records_of, used_of

OF_ALL_FACT = (
    "Parameters, stored bytes, CPU and FLOPs are of all tasks together; training the single adapters that a method "
    "begins with is not in its own. Methods that take the task of a row are told it; inferred gates are not. A seed's "
    "effect counts as the same on all tasks, since one run covers them."
)


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
    report = TABLE_OF[bench.suite.table](bench, known)
    path = bench.folder / TABLES / f"{bench.name}.md"
    picture = path.with_suffix(".png") if report.points else None
    if write:
        if picture is not None:
            draw(report.points, bench.suite.title, picture)
        write_text(path, report.text)
    used = list(used_of(bench, known))
    return {
        "suite": bench.name, "table": str(path), "picture": None if picture is None else str(picture),
        "rows": report.rows, "sentences": report.sentences,
        "cells": len(used), "stale": sum(is_stale(bench, cell, known) for cell, _ in used),
        "missing": num_missing(bench, known), "cpu_s": sum(record.figures["cpu_s"] for _, record in used),
    }  # fmt: skip


def _comparison(bench: Bench, known: Contents) -> Report:
    suite = bench.suite
    assert suite.reference is not None
    found = found_of(bench, known)
    losses = {method: losses_of(tasks) for method, tasks in found.items()}
    gain, margin = suite.margin, _margin(suite, losses, suite.tasks)
    share_of = None if suite.share_of is None else (suite.share_of.base, suite.share_of.to)
    failed = num_failed(bench, known)
    plan = Plan(suite.tasks, suite.reference, margin, share_of, len(suite.seeds), apart=True, failed=failed)
    rows = compare(losses, plan)
    costs = {method: _costs(bench, method, found[method], known) for method in suite.methods}
    points = _points(rows, costs, len(suite.seeds))
    picture = f"{bench.name}.png" if points else None
    facts = [*facts_of(bench, known), margin_fact(gain, losses, suite.tasks)]
    conclusion = "" if suite.default_of is None else default_sentence(rows, plan, suite.default_of)
    page = Page(suite.title, suite.note, facts, failed_cells(bench, known), picture, conclusion)
    moved = {gap.name: gap for gap in gaps(losses, plan)}
    documents = [
        _document(row, costs[row.name], plan)
        | {"gap": row.gap, "overfits": moved[row.name].word if row.name in moved else None}
        for row in rows
    ]
    sentences = [sentence(row, plan) for row in rows]
    sentences += [gap_sentence(gap, share_of[1]) for gap in moved.values() if share_of is not None]
    sentences += [conclusion] if conclusion else []
    return Report(comparison_page(page, rows, costs, plan, list(moved.values())), documents, sentences, points)


def _margin(suite: Suite, losses: Mapping[str, Losses], tasks: Sequence[str]) -> float | None:
    gain = suite.margin
    return None if gain is None else margin_of(losses[gain.base], losses[gain.to], tasks, gain.share)


def _several(bench: Bench, known: Contents) -> Report:
    suite = bench.suite
    assert suite.reference is not None
    found = found_of(bench, known)
    losses = {method: losses_of(tasks) for method, tasks in found.items()}
    margin = _margin(suite, losses, suite.tasks)
    margins = {task: _margin(suite, losses, [task]) for task in suite.tasks}
    plan = Plan(suite.tasks, suite.reference, margin, None, len(suite.seeds), failed=num_failed(bench, known))
    rows = compare(losses, plan)
    by_task = rows_by_task(losses, plan, margins)
    worst, moved = worst_tasks(losses, plan, by_task, margins), changes(losses, plan)
    others = [row.name for row in rows if row.name != plan.reference]
    sentences = [
        *(sentence(row, plan) for row in rows),
        *(tasks_sentence(name, by_task, plan) for name in others),
        *(worst_sentence(one, plan, margins) for one in worst),
        *(change_sentence(one, plan) for one in moved),
        *(text for method in suite.methods if (text := _routed_sentence(method, found[method])) is not None),
    ]
    costs = {method: _costs_of_all(bench, method, known) for method in suite.methods}
    points = _points(rows, costs, len(suite.seeds))
    picture = f"{bench.name}.png" if points else None
    facts = [*facts_of(bench, known), margin_fact(suite.margin, losses, suite.tasks), OF_ALL_FACT]
    page = Page(suite.title, suite.note, facts, failed_cells(bench, known), picture)
    documents = [
        _document(row, costs[row.name], plan)
        | {"tasks": {t: by_task[t][row.name].verdict for t in suite.tasks}, "losses": dict(row.by_task or {})}
        for row in rows
    ]
    text = several_page(page, rows, costs, plan, Several(by_task, worst, moved, sentences))
    return Report(text, documents, sentences, points)


def _routed_sentence(method: str, tasks: Mapping[str, Mapping[int, Record]]) -> str | None:
    """How often a gate that is given no task finds it, on test rows."""
    shares = {
        task: fmean(fmean(record.body["routed"]["test"]) for record in seeds.values())
        for task, seeds in tasks.items()
        if seeds and all("routed" in record.body for record in seeds.values())
    }
    if not shares:
        return None
    parts = ", ".join(f"{task} {share:.1%}" for task, share in shares.items())
    return f"{method} finds the task of {fmean(shares.values()):.1%} of test rows ({parts})."


def _costs_of_all(bench: Bench, method: str, known: Contents) -> Costs:
    """Of all tasks together: what cells on one task have is added up."""
    rate, records = _rate_text(bench, method, known), records_of(bench, method, known)
    if not records:
        return Costs(rate)
    by_seed: dict[int, list[Record]] = {}
    for cell, record in records:
        by_seed.setdefault(cell.seed, []).append(record)
    most = max(map(len, by_seed.values()))
    whole = [of_seed for of_seed in by_seed.values() if len(of_seed) == most]

    def total(name: str) -> float:
        return fmean(sum(record.figures[name] for record in of_seed) for of_seed in whole)

    figures = [record.figures for _, record in records]
    right = [
        fmean(values)
        for _, record in records
        for key, values in record.body["correct"].items()
        if key.rpartition("/")[2] == "test"
    ]
    return Costs(
        rate, round(total("trainable_parameters")), round(total("adapter_bytes")),
        fmean(one["peak_memory_bytes"] for one in figures), total("cpu_s"),
        total("flops") if all("flops" in one for one in figures) else None,
        fmean(right) if right else None, is_stale=any(is_stale(bench, cell, known) for cell, _ in records),
    )  # fmt: skip


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
        "flops": cost.flops, "answers": dict(cost.answers),
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
        float(np.mean(right)) if right else None, _scores(tasks),
        any(_is_old(bench, record, known) for record in records),
    )  # fmt: skip


def _scores(tasks: Mapping[str, Mapping[int, Record]]) -> dict[str, float]:
    """Means over the tasks, once the rows of all have been answered."""
    found = [[r.body[ANSWERS] for r in seeds.values() if ANSWERS in r.body] for seeds in tasks.values()]
    names = {"chrf": "chrF", "bleu": "BLEU"}
    return {shown: fmean(one[name] for (one,) in found) for name, shown in names.items()} if all(found) else {}


def _is_old(bench: Bench, record: Record, known: Contents) -> bool:
    return known.find(record.cell, bench.code_for(record.body["settings"]).name) is None


def _rate_text(bench: Bench, method: str, known: Contents) -> str:
    """The rate, and where it stands in its grid."""
    asked = bench.suite.methods[method]
    if isinstance(asked.lr, str):
        return _borrowed_rate(bench, asked.lr, known)
    rates = [rate for rate in asked.rates if rate is not None]
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


def _borrowed_rate(bench: Bench, other: str, known: Contents) -> str:
    try:
        return f"{bench.chosen_rate(other, known):g}, that of {other}"
    except NotYet:
        return f"that of {other}"


def _rates(bench: Bench, known: Contents) -> Report:
    suite = bench.suite
    rows = [_rate_row(bench, method, known) for method in suite.methods]
    full = next((name for name, method in suite.methods.items() if method.kind == FULL), None)
    page = Page(suite.title, suite.note, facts_of(bench, known), failed_cells(bench, known))
    documents = [
        {
            "method": row.name, "best": row.best, "likely": list(row.likely), "losses": dict(row.losses),
            "differences": {rate: [one.mean, one.low, one.high] for rate, one in row.differences.items()},
        }
        for row in rows
    ]  # fmt: skip
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


TABLE_OF: dict[str, Callable[[Bench, Contents], Report]] = {
    COMPARISON: _comparison,
    RATES: _rates,
    SEVERAL: _several,
}
"""By a suite's table."""
