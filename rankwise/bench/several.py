"""Methods on several tasks against a reference: each task, the worst one, and what later training changed.

The mean over tasks is compared as in any table (`rankwise.bench.compare`). Beside it, each by the same intervals and
rules, and corrected (Holm) for the number of its own tests in the table:

- each task by itself, with a margin of its own;
- the worst task: the one on which a method is farthest above the reference on validation rows. It is chosen there, so
  that its difference on test rows is not the largest of several by chance;
- changes: the test loss of a task at the end less that at an earlier point of the same run, on the same seeds and rows:
  after the first stage that trained it (forgetting), or before its vector was learned (a new task).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from rankwise.bench.compare import (
    BETTER,
    LEAST_SEEDS,
    NO_WORSE,
    UNDECIDED,
    WORSE,
    Losses,
    Plan,
    Row,
    arrays,
    compare,
    complete_seeds,
    differences,
    judged,
    size_of,
    verdict,
)
from rankwise.bench.statistics import Interval, holm, interval

OWN, BEFORE = "test-own", "test-before"
FORGETS, KEEPS, GAINS = "forgets", "keeps", "gains"


@dataclass(frozen=True)
class Worst:
    """A method's worst task, chosen on validation rows, and its row there; None where two seeds are not there yet."""

    name: str
    task: str | None = None
    row: Row | None = None


@dataclass(frozen=True)
class Change:
    """What the rest of a run did to tasks that it had trained, or to a new one.

    Args:
        name: of the method.
        since: the split that the end is compared with: `OWN` or `BEFORE`.
        tasks: those that have it.
        before: mean test loss then.
        after: mean test loss at the end.
        difference: of them; None for fewer than two seeds.
        p: corrected for the number of changes in the table.
        by_task: the mean difference on each task.
    """

    name: str
    since: str
    tasks: tuple[str, ...]
    before: float
    after: float
    difference: Interval | None
    by_task: Mapping[str, float]
    p: float | None = None
    word: str = UNDECIDED


def rows_by_task(
    methods: Mapping[str, Losses], plan: Plan, margins: Mapping[str, float | None]
) -> dict[str, dict[str, Row]]:
    """By task and method, the row of the task alone; p is corrected for all tasks and methods together."""
    found = {
        task: {row.name: row for row in compare(methods, replace(plan, tasks=[task], margin=None, share_of=None))}
        for task in plan.tasks
    }
    places = [(task, name) for task, rows in found.items() for name, row in rows.items() if row.difference is not None]
    raw = [_interval(found[task][name]).p for task, name in places]
    for (task, name), p in zip(places, holm(raw), strict=True):
        found[task][name] = judged(found[task][name], p, margins.get(task))
    return found


def _interval(row: Row | Change) -> Interval:
    assert row.difference is not None
    return row.difference


def worst_tasks(
    methods: Mapping[str, Losses],
    plan: Plan,
    by_task: Mapping[str, Mapping[str, Row]],
    margins: Mapping[str, float | None],
) -> list[Worst]:
    """The worst task of each method but the reference; p is corrected for the number of methods."""
    found: list[Worst] = []
    for name, losses in methods.items():
        if name == plan.reference:
            continue
        above = {task: differences(losses, methods[plan.reference], "valid", [task]) for task in plan.tasks}
        means = {task: float(array[0].mean()) for task, array in above.items() if array is not None}
        if len(means) < len(plan.tasks):
            found.append(Worst(name))
            continue
        task = max(means, key=lambda one: means[one])
        found.append(Worst(name, task, by_task[task][name]))
    tested = [index for index, one in enumerate(found) if one.row is not None and one.row.difference is not None]
    raw = [_interval(_row(found[index])).p for index in tested]
    for index, p in zip(tested, holm(raw), strict=True):
        one = found[index]
        found[index] = replace(one, row=judged(_row(one), p, margins.get(one.task or "")))
    return found


def _row(one: Worst) -> Row:
    assert one.row is not None
    return one.row


def changes(methods: Mapping[str, Losses], plan: Plan) -> list[Change]:
    """Of every method with an earlier point, what the rest of its run changed."""
    found = [
        change
        for name, losses in methods.items()
        for since in (OWN, BEFORE)
        if (change := _change(name, losses, since, plan.tasks)) is not None
    ]
    tested = [index for index, one in enumerate(found) if one.difference is not None]
    raw = [_interval(found[index]).p for index in tested]
    for index, p in zip(tested, holm(raw), strict=True):
        one = found[index]
        word = UNDECIDED if plan.failed.get(one.name) else _word(_interval(one), p, plan.margin)
        found[index] = replace(one, p=p, word=word)
    return found


def _word(difference: Interval, p: float, margin: float | None) -> str:
    word = verdict(difference, p, margin)
    return {BETTER: GAINS, NO_WORSE: KEEPS, WORSE: FORGETS}.get(word, UNDECIDED)


def _change(name: str, losses: Losses, since: str, tasks: Sequence[str]) -> Change | None:
    there = tuple(task for task in tasks if losses.get(since, {}).get(task))
    seeds = complete_seeds(losses, tasks)
    if not there or not seeds:
        return None
    end, then = arrays(losses, "test", there, seeds), arrays(losses, since, there, seeds)
    moved = [after - before for after, before in zip(end, then, strict=True)]
    return Change(
        name, since, there, float(np.mean([one.mean() for one in then])), float(np.mean([one.mean() for one in end])),
        interval(moved) if len(seeds) >= LEAST_SEEDS else None,
        {task: float(one.mean()) for task, one in zip(there, moved, strict=True)},
    )  # fmt: skip


# --- sentences -------------------------------------------------------------------------------------------------------


def tasks_sentence(name: str, by_task: Mapping[str, Mapping[str, Row]], plan: Plan) -> str:
    """On which tasks a method is what."""
    words: dict[str, list[str]] = {}
    for task in plan.tasks:
        words.setdefault(by_task[task][name].verdict, []).append(task)
    parts = [f"{word} on {', '.join(words[word])}" for word in (BETTER, NO_WORSE, WORSE, UNDECIDED) if word in words]
    return f"{name} by task, against {plan.reference}: {'; '.join(parts)}."


def worst_sentence(worst: Worst, plan: Plan, margins: Mapping[str, float | None]) -> str:
    """A method's worst task in words."""
    if worst.row is None or worst.row.difference is None:
        return f"{worst.name}'s worst task is undecided: {LEAST_SEEDS} seeds are needed."
    found, row, margin = worst.row.difference, worst.row, margins.get(worst.task or "")
    where = f"{worst.name}'s worst task is {worst.task}, chosen on validation rows"
    if row.verdict == NO_WORSE:
        return f"{where}: no worse than {plan.reference} there, {size_of(found)}, below the margin of {margin:.4f}."
    if row.verdict == UNDECIDED:
        return f"{where}: undecided against {plan.reference} there, {size_of(found)}."
    return f"{where}: {row.verdict} than {plan.reference} there, {size_of(found)}, p = {row.p:.2g} after Holm."


def change_sentence(change: Change, plan: Plan) -> str:
    """What the rest of a run changed, in words."""
    what = "its own first stage" if change.since == OWN else "the vector of the new task was learned"
    parts = ", ".join(f"{task} {value:+.4f}" for task, value in change.by_task.items())
    if change.difference is None:
        return f"{change.name}, since {what}: undecided, {LEAST_SEEDS} seeds are needed ({parts})."
    size, sure = size_of(change.difference), f"p = {change.p:.2g} after Holm"
    if change.since == BEFORE:
        word = {GAINS: f"better, {sure}", FORGETS: f"worse, {sure}"}.get(change.word, "undecided")
        return f"{change.name}: learning the vector alone changes the test loss of {change.tasks[0]} by {size}: {word}."
    moved = f"test loss {size} since each task's own first stage"
    said = {
        FORGETS: f"forgets: {moved}, {sure}",
        GAINS: f"forgets nothing, later stages help: {moved}, {sure}",
        KEEPS: f"forgets no more than the margin of {plan.margin or 0:.4f}: {moved}",
        UNDECIDED: f"is undecided in what it forgets: {moved}",
    }[change.word]
    return f"{change.name} {said} ({parts})."


def highest(row: Row) -> tuple[str, float] | None:
    """The task with the highest test loss, whatever the reference has there."""
    if not row.by_task:
        return None
    task = max(row.by_task, key=lambda one: (row.by_task or {})[one])
    return task, row.by_task[task]
