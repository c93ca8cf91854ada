"""Tables of a bench as markdown: figures in, text out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from rankwise.bench.compare import Plan, Row, sentence
from rankwise.bench.gaps import Gap, gap_sentence
from rankwise.bench.rates import RateRow
from rankwise.bench.several import OWN, Change, Worst, highest
from rankwise.bench.statistics import Interval
from rankwise.errors import counted

NONE_YET = ""


@dataclass(frozen=True)
class Costs:
    """Of a method: means over its cells; None where it has none.

    `rate`: as it is written; `answers`: scores of what was generated, by name; `is_stale`: whether results of older
    code are among them.
    """

    rate: str
    parameters: int | None = None
    stored_bytes: int | None = None
    memory_bytes: float | None = None
    cpu_s: float | None = None
    flops: float | None = None
    accuracy: float | None = None
    answers: Mapping[str, float] = field(default_factory=dict)
    is_stale: bool = False


@dataclass(frozen=True)
class Page:
    """What stands around a table.

    Args:
        title, note: above it.
        facts: a line each, below the note.
        failed: cells that failed, with the reason.
        picture: its file name; None: none was drawn.
        conclusion: what follows from all rows.
    """

    title: str
    note: str
    facts: Sequence[str]
    failed: Mapping[str, str] = field(default_factory=dict)
    picture: str | None = None
    conclusion: str = ""


@dataclass(frozen=True)
class Several:
    """What a table of several tasks shows beside the mean: see `rankwise.bench.several`.

    Args:
        by_task: by task and method.
        worst: of each method but the reference.
        changes: since earlier points of runs.
        sentences: in the order in which they are printed.
    """

    by_task: Mapping[str, Mapping[str, Row]]
    worst: Sequence[Worst]
    changes: Sequence[Change]
    sentences: Sequence[str]


def comparison_page(
    page: Page, rows: Sequence[Row], costs: Mapping[str, Costs], plan: Plan, gaps: Sequence[Gap] = ()
) -> str:
    """A table of comparisons, its sentences and its picture; `gaps`: against the method that `share_of` leads to."""
    headings = ["method", "seeds", "trained", "stored", "memory", "CPU", "FLOPs", "rate", "test loss"]
    headings += [f"against {plan.reference} [95 %]", "p (Holm)"]
    if plan.share_of is not None:
        headings.append(f"share of {plan.share_of[1]}'s gain [95 %]")
    headings.append("gap")
    with_accuracy = any(cost.accuracy is not None for cost in costs.values())
    headings += ["accuracy"] if with_accuracy else []
    scores = list(dict.fromkeys(name for cost in costs.values() for name in cost.answers))
    headings += scores
    body = []
    for row in rows:
        cost = costs[row.name]
        cells = _costs_and_loss(row, cost)
        if plan.share_of is not None:
            cells.append(_interval(row.share, "{:.1%}"))
        cells.append(_number(row.gap, "{:+.4f}"))
        cells += [_number(cost.accuracy, "{:.1%}")] if with_accuracy else []
        cells += [_number(cost.answers.get(name), "{:.1f}") for name in scores]
        body.append([*cells, f"**{row.verdict}**"])
    parts = [*_head(page), _table([*headings, "verdict"], body)]
    if len(plan.tasks) > 1:
        parts += ["Test loss by task:", _by_task(rows, plan.tasks)]
    sentences = [sentence(row, plan) for row in rows]
    if plan.share_of is not None and gaps:
        to = plan.share_of[1]
        parts += [f"Gap (validation less training loss) against {to}:", _gaps(rows, gaps, to)]
        sentences += [gap_sentence(gap, to) for gap in gaps]
    sentences += [page.conclusion] if page.conclusion else []
    parts += ["\n".join(f"- {text}" for text in sentences), *_foot(page)]
    return "\n\n".join(parts) + "\n"


def several_page(page: Page, rows: Sequence[Row], costs: Mapping[str, Costs], plan: Plan, found: Several) -> str:
    """A table of methods on several tasks: their mean, each task, the worst one, what was forgotten; sentences."""
    headings = ["method", "seeds", "parameters", "stored", "memory", "CPU", "FLOPs", "rate", "mean test loss"]
    headings += [f"against {plan.reference} [95 %]", "p (Holm)", "gap"]
    with_accuracy = any(cost.accuracy is not None for cost in costs.values())
    headings += ["accuracy"] if with_accuracy else []
    body, worst_of = [], {one.name: one for one in found.worst}
    for row in rows:
        cost = costs[row.name]
        cells = [*_costs_and_loss(row, cost), _number(row.gap, "{:+.4f}")]
        cells += [_number(cost.accuracy, "{:.1%}")] if with_accuracy else []
        body.append([*cells, f"**{row.verdict}**"])
    parts = [*_head(page), _table([*headings, "verdict"], body)]
    parts += ["Test loss by task, and its difference:", _each_task(rows, plan, found.by_task)]
    parts += ["Worst task:", _worst(rows, worst_of, plan)]
    if found.changes:
        parts += ["What the rest of the run changed:", _changes(found.changes)]
    parts += ["\n".join(f"- {text}" for text in found.sentences), *_foot(page)]
    return "\n\n".join(parts) + "\n"


def _gaps(rows: Sequence[Row], gaps: Sequence[Gap], to: str) -> str:
    own = {row.name: row.gap for row in rows}
    body = [
        [
            gap.name, _number(own[gap.name], "{:+.4f}"), _interval(gap.difference, "{:+.4f}"),
            _number(gap.p, "{:.2g}"), gap.word,
        ]
        for gap in gaps
    ]  # fmt: skip
    return _table(["method", "gap", f"against {to} [95 %]", "p (Holm)", "overfits"], body)


def _costs_and_loss(row: Row, cost: Costs) -> list[str]:
    """The cells that rows of both tables begin with: the method to its p."""
    return [
        row.name + (" †" if cost.is_stale else ""), f"{len(row.seeds)}", _count(cost.parameters),
        _bytes(cost.stored_bytes), _bytes(cost.memory_bytes), _number(cost.cpu_s, "{:,.0f} s"), _flops(cost.flops),
        cost.rate, _number(row.loss, "{:.4f}"), _interval(row.difference, "{:+.4f}"), _number(row.p, "{:.2g}"),
    ]  # fmt: skip


def _each_task(rows: Sequence[Row], plan: Plan, by_task: Mapping[str, Mapping[str, Row]]) -> str:
    body = []
    for row in rows:
        own = [by_task[task][row.name] for task in plan.tasks]
        body.append([row.name, *(_loss_and_difference(one) for one in own)])
    return _table(["method", *plan.tasks], body)


def _loss_and_difference(row: Row) -> str:
    loss = _number(row.loss, "{:.4f}")
    if row.difference is None:
        return loss
    return f"{loss}, {_interval(row.difference, '{:+.4f}')}, {row.verdict}"


def _worst(rows: Sequence[Row], worst_of: Mapping[str, Worst], plan: Plan) -> str:
    headings = ["method", "highest test loss", "farthest above, on validation rows", f"there against {plan.reference}"]
    body = []
    for row in rows:
        top, worst = highest(row), worst_of.get(row.name)
        cells = [row.name, "" if top is None else f"{top[1]:.4f} ({top[0]})"]
        if worst is None or worst.row is None:
            body.append([*cells, "", "", "", ""])
            continue
        found = worst.row
        cells += [worst.task or "", _interval(found.difference, "{:+.4f}"), _number(found.p, "{:.2g}"), found.verdict]
        body.append(cells)
    return _table([*headings, "p (Holm)", "verdict"], body)


def _changes(found: Sequence[Change]) -> str:
    body = [
        [
            one.name, "own first stage" if one.since == OWN else "before its vector", ", ".join(one.tasks),
            f"{one.before:.4f}", f"{one.after:.4f}", _interval(one.difference, "{:+.4f}"), _number(one.p, "{:.2g}"),
            one.word,
        ]
        for one in found
    ]  # fmt: skip
    return _table(["method", "since", "tasks", "then", "at the end", "change [95 %]", "p (Holm)", "verdict"], body)


def rates_page(page: Page, rows: Sequence[RateRow], sentences: Sequence[str]) -> str:
    """A table of rates and what follows from it."""
    grid = sorted({rate for row in rows for rate in (*row.losses, *row.missing)})
    body, above = [], []
    for row in rows:
        cells = [f"{row.losses[rate]:.4f}" if rate in row.losses else NONE_YET for rate in grid]
        marked = [f"**{cell}**" if rate == row.best else cell for rate, cell in zip(grid, cells, strict=True)]
        body.append([row.name, *marked, ", ".join(f"{rate:g}" for rate in row.likely)])
        differences = (_interval(row.differences.get(rate), "{:+.4f}") for rate in grid)
        above.append(
            [row.name, *("best" if rate == row.best else d for rate, d in zip(grid, differences, strict=True))]
        )
    headings = ["method", *(f"{rate:g}" for rate in grid)]
    parts = [*_head(page), "Validation loss by learning rate:"]
    parts += [_table([*headings, "not told apart (Holm)"], body)]
    parts += ["Its difference from the best rate's [95 %]:", _table(headings, above)]
    return "\n\n".join([*parts, "\n".join(f"- {text}" for text in sentences), *_foot(page)]) + "\n"


def _head(page: Page) -> list[str]:
    parts = [f"# {page.title}", *([page.note.strip()] if page.note else [])]
    return [*parts, "\n".join(f"- {fact}" for fact in page.facts)]


def _foot(page: Page) -> list[str]:
    parts = []
    if page.failed:
        parts.append(
            f"{counted(len(page.failed), 'cell')} failed:\n\n"
            + "\n".join(f"- `{name}`: {reason}" for name, reason in page.failed.items())
        )
    if page.picture:
        parts.append(f"![quality against trained parameters]({page.picture})")
    return parts


def _by_task(rows: Sequence[Row], tasks: Sequence[str]) -> str:
    body = [[row.name, *(_number((row.by_task or {}).get(task), "{:.4f}") for task in tasks)] for row in rows]
    return _table(["method", *tasks], body)


def _table(headings: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = ["| " + " | ".join(headings) + " |", "|---" * len(headings) + "|"]
    return "\n".join([*lines, *("| " + " | ".join(row) + " |" for row in rows)])


def _number(value: float | None, form: str) -> str:
    return NONE_YET if value is None else form.format(value)


def _interval(value: Interval | None, form: str) -> str:
    if value is None:
        return NONE_YET
    return f"{form.format(value.mean)} [{form.format(value.low)}, {form.format(value.high)}]"


def _flops(value: float | None) -> str:
    """To three digits; nothing for cells that were run before they were counted."""
    return NONE_YET if value is None else f"{value:.2e}" if value else "0"


def _count(value: int | None) -> str:
    if value is None:
        return NONE_YET
    return f"{value / 1e6:.2f}M" if value >= 1e6 else f"{value / 1e3:.1f}k" if value >= 1e3 else str(value)


def _bytes(value: float | None) -> str:
    if value is None:
        return NONE_YET
    return f"{value / 2**30:.2f} GiB" if value >= 2**30 else f"{value / 2**20:.1f} MiB" if value else "0"
