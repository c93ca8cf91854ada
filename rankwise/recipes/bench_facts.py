"""What is said around a table: of what its results are, where and by which code they were computed, what failed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from rankwise.bench.compare import NO_WORSE, Losses, differences, margin_of
from rankwise.bench.store import DONE, Contents, Record
from rankwise.bench.suite import RATES, Margin, Suite
from rankwise.errors import counted
from rankwise.recipes.bench import Bench
from rankwise.recipes.bench_cells import Cell
from rankwise.recipes.bench_results import is_stale, num_missing, used_of

BUSY_LOAD = 2.0
"""A load average above which times are said to be noisy."""


def facts_of(bench: Bench, known: Contents) -> list[str]:
    """Lines for the head of the table, a line each."""
    suite, used = bench.suite, list(used_of(bench, known))
    stale = [(cell, record) for cell, record in used if is_stale(bench, cell, known)]
    minutes = sum(record.figures["cpu_s"] for _, record in used) / 60
    store = [record for record in known.records if record.status == DONE]
    facts = [
        f"Tasks: {', '.join(suite.tasks)}, each counting the same. Seeds: {len(suite.seeds)}, the same for every "
        "method: start, order of rows, new heads.",
        f"{counted(len(used), 'cell')} of this table are in the store, {num_missing(bench, known):,} are missing"
        f"{_failed_of(bench, known)}; {minutes:.0f} CPU-minutes of training and measuring.",
        f"All suites of the store together: {counted(len({record.cell for record in store}), 'cell')}; "
        f"{sum(record.figures['cpu_s'] for record in store) / 3600:.1f} CPU-hours{_again(store)}.",
    ]
    if suite.table != RATES and any(suite.is_tuned(method) for method in suite.methods):
        facts.append(
            f"The learning rate of methods with a grid is that of the lowest validation loss on seed "
            f"{suite.tuning.seed} of {', '.join(suite.tuning_tasks)}{_of_all_tuning(suite)}. That seed is one of the "
            "table's, too."
        )
    if suite.answers is not None:
        facts.append(
            f"chrF and BLEU: of greedy answers, at most {suite.answers.max_new_tokens} tokens long, to the first "
            f"{suite.answers.rows} test rows of each task on seed {suite.answers.seed}, for the rows that have them; "
            "means over tasks, without intervals."
        )
    if used:
        facts.append(_where(used))
    if stale:
        cell, record = stale[0]
        changed = known.changed_files(record.code, bench.code_for(cell.settings).files)
        facts.append(
            f"† {counted(len(stale), 'cell')} stale: computed by older code that later changes could alter "
            f"({', '.join(changed[:4])}{', ...' if len(changed) > 4 else ''})."
        )
    return facts


def _again(store: Sequence[Record]) -> str:
    """Of finished records of a store, how many are of cells that were there already."""
    again = len(store) - len({record.cell for record in store})
    return f", with {again:,} that were computed again" if again else ""


def _of_all_tuning(suite: Suite) -> str:
    """Where methods on all tasks have grids."""
    if not any(suite.is_tuned(name) and method.is_of_all for name, method in suite.methods.items()):
        return ""
    return "; of methods with cells on all tasks, of their mean over all of them"


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


def margin_fact(gain: Margin | None, losses: Mapping[str, Losses], tasks: Sequence[str]) -> str:
    """How large the margin is, and what it is a share of."""
    if gain is None:
        return f'No margin: "{NO_WORSE}" is never said.'
    base, to = losses[gain.base], losses[gain.to]
    margin = margin_of(base, to, tasks, gain.share)
    if margin is not None:
        size = f"{margin:.4f} nats"
    elif differences(base, to, "valid", tasks) is None:
        size = "not known before two seeds of both have been run"
    else:
        size = f'which is none: "{NO_WORSE}" is never said'
    rule = f"{gain.share:.0%} of the gain from {gain.base} to {gain.to} on validation rows"
    return f'Margin of "{NO_WORSE}": {rule}, {size}.'


def _failed_of(bench: Bench, known: Contents) -> str:
    """How many of the missing ones have been tried."""
    missing = [cell.name for cell in bench.plan(known) if bench.usable(cell, known) is None]
    failed = len(failed_cells(bench, known).keys() & missing)
    return f" ({failed:,} of them failed, see below)" if failed else ""


def failed_cells(bench: Bench, known: Contents) -> dict[str, str]:
    """By cell, why it failed."""
    found = {cell.name: bench.failed(cell, known) for cell in bench.plan(known)}
    return {name: record.body["reason"] for name, record in found.items() if record is not None}
