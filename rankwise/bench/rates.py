"""Which learning rate is best for each method, how sure that is, and what follows: by rule.

The best rate is that of the lowest mean validation loss. Seeds and examples are drawn anew (see `statistics.lowest`);
the rates that are lowest in 95 % of the draws, most frequent first, are those that can't be told apart.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from rankwise.bench.statistics import LEVEL, Array, lowest

LEAST_SEEDS = 2


@dataclass(frozen=True)
class RateRow:
    """A method in a table of rates.

    Args:
        name: of the method.
        losses: mean validation loss by rate, of those that have been run.
        missing: rates without a result.
        best: the rate of the lowest loss; None where nothing has been run.
        likely: the rates that can't be told from it.
    """

    name: str
    losses: Mapping[float, float]
    missing: tuple[float, ...]
    best: float | None
    likely: tuple[float, ...]

    @property
    def is_at_edge(self) -> bool:
        """Whether a better rate may lie outside of the grid."""
        grid = sorted({*self.losses, *self.missing})
        return any(rate in (grid[0], grid[-1]) for rate in self.likely)


def rate_row(name: str, tasks_of: Mapping[float, Sequence[Array]], missing: Sequence[float]) -> RateRow:
    """The row of a method from its validation losses: by rate and task, [S, E]."""
    losses = {rate: float(np.mean([task.mean() for task in tasks])) for rate, tasks in tasks_of.items()}
    if not losses:
        return RateRow(name, {}, tuple(missing), None, ())
    best = min(losses, key=lambda rate: losses[rate])
    return RateRow(name, losses, tuple(missing), best, likely(lowest(tasks_of)))


def likely(shares: Mapping[float, float]) -> tuple[float, ...]:
    """The fewest choices that together are lowest in 95 % of the draws, in order of size."""
    found: list[float] = []
    total = 0.0
    for choice, part in sorted(shares.items(), key=lambda item: -item[1]):
        if total >= LEVEL:
            break
        found.append(choice)
        total += part
    return tuple(sorted(found))


def rate_sentence(row: RateRow) -> str:
    """The row in words."""
    if row.best is None:
        return f"{row.name} is undecided: no rate has been run."
    others = [rate for rate in row.likely if rate != row.best]
    told = f", not told apart from {', '.join(f'{rate:g}' for rate in others)}" if others else ""
    edge = "; the grid ends there, so a better one may lie outside" if row.is_at_edge else ""
    left = f"; not run: {', '.join(f'{rate:g}' for rate in row.missing)}" if row.missing else ""
    return f"{row.name}: {row.best:g} is best{told}{edge}{left}."


def ratio_sentence(row: RateRow, full: RateRow) -> str:
    """How a method's best rate stands to that of full fine-tuning, and whether that is about ten times.

    About ten times: within a factor of the square root of ten. Yes where all rates that can't be told apart agree, no
    where none does, else undecided.
    """
    if row.best is None or full.best is None:
        return f"{row.name} against {full.name}: undecided, a row is empty."
    ratios = [one / other for one in row.likely for other in full.likely]
    about = [10**0.5 / 1.001 <= ratio <= 10**1.5 * 1.001 for ratio in ratios]
    said = "about ten times" if all(about) else "not about ten times" if not any(about) else "undecided"
    if row.is_at_edge or full.is_at_edge:
        said = f"undecided ({said} inside the grids, which end at a best rate)"
    low, high = min(ratios), max(ratios)
    return f"{row.name} against {full.name}: {row.best / full.best:.3g} times ({low:.3g} to {high:.3g}): {said}."


def independence_sentence(rows: Sequence[RateRow]) -> str:
    """Whether the best rate depends on the method, for methods that differ in rank."""
    decided = [row for row in rows if row.best is not None]
    names = ", ".join(row.name for row in decided)
    if len(decided) < 2:
        return "Independence of rank: undecided, fewer than two rows."
    common = set.intersection(*(set(row.likely) for row in decided))
    if common:
        rates = ", ".join(f"{rate:g}" for rate in sorted(common))
        return f"{names}: {rates} is among the best for each: no dependence seen."
    spread = max(row.best or 0 for row in decided) / min(row.best or 1 for row in decided)
    return f"{names}: no rate is among the best for each; the best ones differ by a factor of {spread:.3g}."


def rate_sentences(rows: Sequence[RateRow], full: str | None) -> list[str]:
    """A sentence for each row; against `full`, that of full fine-tuning, where there is one; and about all others."""
    found = [rate_sentence(row) for row in rows]
    others = [row for row in rows if row.name != full]
    for whole in (row for row in rows if row.name == full):
        found += [ratio_sentence(row, whole) for row in others]
    return [*found, independence_sentence(others)]
