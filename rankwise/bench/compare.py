"""From losses to rows of a table: each method against the reference, and the sentence that follows by rule.

The primary figure is the test loss. The margin of "no worse" and the choice of learning rates use validation rows only.

Rules, in this order, for the difference d of a method's test loss from the reference's, with its 95 % interval, and p
corrected for the number of rows (Holm):

    better      d < 0 and p < 0.05
    no worse    the interval ends below the margin
    worse       d > 0 and p < 0.05
    undecided   none of these; or fewer than two seeds are there; or a run of the method or of the reference failed, for
                the runs that are left are the better part
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from rankwise.bench.statistics import Array, Interval, holm, interval, share
from rankwise.errors import counted

BETTER, NO_WORSE, WORSE, UNDECIDED, REFERENCE = "better", "no worse", "worse", "undecided", "reference"
LEVEL_OF_TESTS = 0.05
LEAST_SEEDS = 2

Losses = Mapping[str, Mapping[str, Mapping[int, Sequence[float]]]]
"""Of a method: by split, task and seed, each example's loss."""


@dataclass(frozen=True)
class Row:
    """A method in a table of comparisons.

    Args:
        name: of the method.
        seeds: those that it has on every task.
        num_shared: of them, those that the reference has as well.
        loss: mean test loss; None where no seed is complete.
        difference: of the test loss from the reference's; None for the reference, and for fewer than two seeds.
        p: of the difference, corrected for the number of rows.
        share: of the gain that the table is about, kept by the method.
        gap: mean validation loss less mean loss on training rows.
        verdict: a word, by the rules.
        by_task: mean test loss.
        num_failed: runs at the chosen rate that failed, of the method and of the reference.
    """

    name: str
    seeds: tuple[int, ...]
    num_shared: int
    loss: float | None = None
    difference: Interval | None = None
    p: float | None = None
    share: Interval | None = None
    gap: float | None = None
    verdict: str = UNDECIDED
    by_task: Mapping[str, float] | None = None
    num_failed: int = 0


@dataclass(frozen=True)
class Plan:
    """What is compared with what.

    Args:
        tasks: that count, equally.
        reference: the method that the others are compared with.
        margin: in nats, of "no worse"; None: that is never said.
        share_of: the methods from and to which the gain goes.
        num_seeds: that there should be.
        apart: a run trains one task: runs of a seed on different tasks are different runs.
        failed: by method, how many of its runs at the chosen rate failed.
    """

    tasks: Sequence[str]
    reference: str
    margin: float | None
    share_of: tuple[str, str] | None
    num_seeds: int
    apart: bool = False
    failed: Mapping[str, int] = field(default_factory=dict)


def complete_seeds(losses: Losses, tasks: Sequence[str]) -> tuple[int, ...]:
    """The seeds with results on every task."""
    there = [set(losses.get("test", {}).get(task, {})) for task in tasks]
    return tuple(sorted(set.intersection(*there))) if there else ()


def arrays(losses: Losses, split: str, tasks: Sequence[str], seeds: Sequence[int]) -> list[Array]:
    """By task, the losses [S, E]."""
    return [np.array([losses[split][task][seed] for seed in seeds], dtype=np.float64) for task in tasks]


def differences(one: Losses, other: Losses, split: str, tasks: Sequence[str]) -> list[Array] | None:
    """By task, the losses of `one` less those of `other`, [S, E], on the seeds that both have; None below two seeds."""
    seeds = sorted({*complete_seeds(one, tasks)} & {*complete_seeds(other, tasks)})
    if len(seeds) < LEAST_SEEDS:
        return None
    pairs = zip(arrays(one, split, tasks, seeds), arrays(other, split, tasks, seeds), strict=True)
    return [left - right for left, right in pairs]


def mean_loss(losses: Losses, split: str, tasks: Sequence[str]) -> float | None:
    """Mean over tasks of the mean over seeds and examples; None where no seed has all tasks."""
    seeds = complete_seeds(losses, tasks)
    return float(np.mean([task.mean() for task in arrays(losses, split, tasks, seeds)])) if seeds else None


def margin_of(base: Losses, to: Losses, tasks: Sequence[str], part: float) -> float | None:
    """So large a part of the gain from `base` to `to` on validation rows, in nats; None while seeds are missing.

    A gain that is none gives no margin.
    """
    found = differences(base, to, "valid", tasks)
    if found is None:
        return None
    gain = float(np.mean([task.mean() for task in found]))
    return part * gain if gain > 0 else None


def compare(methods: Mapping[str, Losses], plan: Plan) -> list[Row]:
    """The rows of the table, in the order of `methods`."""
    rows = [_row(name, losses, methods, plan) for name, losses in methods.items()]
    tested = [index for index, row in enumerate(rows) if row.difference is not None]
    corrected = holm([rows[index].difference.p for index in tested])  # type: ignore[union-attr]
    for index, p in zip(tested, corrected, strict=True):
        rows[index] = judged(rows[index], p, plan.margin)
    return rows


def judged(row: Row, p: float, margin: float | None) -> Row:
    """A row that has a difference, with its corrected p and the word that follows."""
    assert row.difference is not None
    return replace(row, p=p, verdict=UNDECIDED if row.num_failed else verdict(row.difference, p, margin))


def _row(name: str, losses: Losses, methods: Mapping[str, Losses], plan: Plan) -> Row:
    tasks = plan.tasks
    loss = mean_loss(losses, "test", tasks)
    valid, train = (mean_loss(losses, split, tasks) for split in ("valid", "train"))
    seeds = complete_seeds(losses, tasks)
    shared = {*seeds} & {*complete_seeds(methods[plan.reference], tasks)}
    row = Row(
        name, seeds, len(shared), loss, gap=None if valid is None or train is None else valid - train,
        share=_share(name, methods, plan), by_task=_by_task(losses, tasks),
        num_failed=sum(plan.failed.get(one, 0) for one in {name, plan.reference}),
    )  # fmt: skip
    if name == plan.reference:
        return replace(row, verdict=REFERENCE)
    found = differences(losses, methods[plan.reference], "test", tasks)
    return row if found is None else replace(row, difference=interval(found, apart=plan.apart))


def _by_task(losses: Losses, tasks: Sequence[str]) -> dict[str, float]:
    return {task: loss for task in tasks if (loss := mean_loss(losses, "test", [task])) is not None}


def _share(name: str, methods: Mapping[str, Losses], plan: Plan) -> Interval | None:
    """(base - method) / (base - to) on the seeds that all three have."""
    if plan.share_of is None or name in plan.share_of:
        return None
    base, to = (methods[one] for one in plan.share_of)
    seeds = set(complete_seeds(base, plan.tasks)) & set(complete_seeds(to, plan.tasks))
    seeds &= set(complete_seeds(methods[name], plan.tasks))
    if len(seeds) < LEAST_SEEDS:
        return None
    chosen = sorted(seeds)
    below, above, own = (arrays(one, "test", plan.tasks, chosen) for one in (base, to, methods[name]))
    gain = [b - t for b, t in zip(below, above, strict=True)]
    if np.mean([task.mean() for task in gain]) <= 0:
        return None
    return share([b - o for b, o in zip(below, own, strict=True)], gain, apart=plan.apart)


def verdict(difference: Interval, p: float, margin: float | None) -> str:
    """The word that follows by the rules from the difference, its corrected p, and the margin."""
    if difference.mean < 0 and p < LEVEL_OF_TESTS:
        return BETTER
    if margin is not None and difference.high < margin:
        return NO_WORSE
    if difference.mean > 0 and p < LEVEL_OF_TESTS:
        return WORSE
    return UNDECIDED


def sentence(row: Row, plan: Plan) -> str:
    """The row in words, by rule."""
    if row.verdict == REFERENCE:
        return f"{row.name} is what the others are compared with."
    if row.num_failed:
        found = "" if row.difference is None else f"; test loss {size_of(row.difference)} in what is left"
        return f"{row.name} is undecided against {plan.reference}: {row.num_failed} of their runs failed{found}."
    if row.difference is None:
        return (
            f"{row.name} is undecided: {row.num_shared} of {plan.num_seeds} seeds have been run on every task, for it "
            f"and for {plan.reference}; {LEAST_SEEDS} are needed."
        )
    found, size = row.difference, size_of(row.difference)
    few = f" (after {row.num_shared} of {plan.num_seeds} seeds)" if row.num_shared < plan.num_seeds else ""
    if row.verdict == BETTER:
        why = f"test loss {size}, p = {row.p:.2g} after Holm"
    elif row.verdict == NO_WORSE:
        why = f"test loss {size}, all of it below the margin of {plan.margin:.4f}"
        if found.low > 0:
            why += "; the difference is sure, and smaller than the margin"
    elif row.verdict == WORSE:
        why = f"test loss {size}, p = {row.p:.2g} after Holm"
    else:
        above = "" if plan.margin is None else f" and reaches the margin of {plan.margin:.4f}"
        why = f"test loss {size}, which holds 0{above}"
        if found.low > 0 or found.high < 0:
            why = f"test loss {size}, p = {row.p:.2g} after Holm for {row.name} among the rows of the table"
    word = {BETTER: "better than", NO_WORSE: "no worse than", WORSE: "worse than", UNDECIDED: "undecided against"}
    return f"{row.name} is {word[row.verdict]} {plan.reference}{few}: {why}."


def size_of(found: Interval) -> str:
    """An interval in nats."""
    return f"{found.mean:+.4f} nats [{found.low:+.4f}, {found.high:+.4f}]"


def default_sentence(rows: Sequence[Row], plan: Plan, setting: str) -> str:
    """Whether the table justifies another default of a setting than the reference, by rule: a row that is better."""
    reference = plan.reference
    missing = sum(row.num_shared < plan.num_seeds for row in rows)
    if missing:
        return f"The default of {setting} is not decided yet: {counted(missing, 'row')} without all seeds."
    better = [row.name for row in rows if row.verdict == BETTER]
    if better:
        others = f"one of {', '.join(better)}" if better[1:] else better[0]
        return f"The default of {setting}: better than {reference}, {others} is justified for tasks like these."
    open_rows = sum(row.verdict == UNDECIDED for row in rows)
    rest = f" ({open_rows} undecided)" if open_rows else ""
    return f"The default of {setting}: no row is better than {reference}{rest}, so none but {reference} is justified."
