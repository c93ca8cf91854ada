"""Which learning rate is best for each method, how sure that is, and what follows: by rule.

The best rate is that of the lowest mean validation loss. Another one can't be told from it unless its loss is above,
p < 0.05 by the paired interval (`bench.statistics`). The best one is found among all, so p is corrected (Holm) for all
pairs of a method's rates.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from rankwise.bench.statistics import LEVEL, NUM_DRAWS, Array, Interval, holm, interval

LEAST_SEEDS = 2
TOLERANCE = 1.1
"""By which a ratio may leave its bounds: grids are rounded (3 and 3.33, 30 and 33.3 are alike)."""


@dataclass(frozen=True)
class RateRow:
    """A method in a table of rates.

    Args:
        name: of the method.
        losses: mean validation loss by rate, of those that have been run.
        missing: rates without a result.
        best: the rate of the lowest loss; None where nothing has been run.
        likely: the rates that can't be told from it, itself among them.
        differences: of each other rate's loss from the best one's.
    """

    name: str
    losses: Mapping[float, float]
    missing: tuple[float, ...]
    best: float | None
    likely: tuple[float, ...]
    differences: Mapping[float, Interval] = field(default_factory=dict)

    @property
    def is_at_edge(self) -> bool:
        """Whether a better rate may lie outside of the grid."""
        grid = sorted({*self.losses, *self.missing})
        return any(rate in (grid[0], grid[-1]) for rate in self.likely)


def rate_row(
    name: str, tasks_of: Mapping[float, Sequence[Array]], missing: Sequence[float], num_draws: int = NUM_DRAWS
) -> RateRow:
    """The row of a method from its validation losses: by rate and task, [S, E], each of a run on that task alone."""
    losses = {rate: float(np.mean([task.mean() for task in tasks])) for rate, tasks in tasks_of.items()}
    if not losses:
        return RateRow(name, {}, tuple(missing), None, ())
    best = min(losses, key=lambda rate: losses[rate])
    above = {
        rate: interval(
            [own - lowest for own, lowest in zip(tasks, tasks_of[best], strict=True)], num_draws=num_draws, apart=True
        )
        for rate, tasks in tasks_of.items()
        if rate != best
    }
    return RateRow(name, losses, tuple(missing), best, tuple(sorted([best, *likely(above)])), above)


def likely(above: Mapping[float, Interval]) -> list[float]:
    """Of the rates' differences from the best one, those that are not surely above 0."""
    num_pairs = (len(above) + 1) * len(above) // 2
    corrected = holm([one.p for one in above.values()], num_pairs)
    return [rate for rate, p in zip(above, corrected, strict=True) if p >= 1 - LEVEL or above[rate].mean <= 0]


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

    About ten times: within a factor of the square root of ten, and of `TOLERANCE` beyond. Yes where all rates that
    can't be told apart agree, no where none does, else undecided.
    """
    if row.best is None or full.best is None:
        return f"{row.name} against {full.name}: undecided, a row is empty."
    ratios = [one / other for one in row.likely for other in full.likely]
    about = [10**0.5 / TOLERANCE <= ratio <= 10**1.5 * TOLERANCE for ratio in ratios]
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
    at_edge = [row.name for row in decided if row.is_at_edge]
    edge = f" The grid ends at a best rate of {', '.join(at_edge)}: a better one may lie outside." if at_edge else ""
    common = set.intersection(*(set(row.likely) for row in decided))
    if common:
        rates = ", ".join(f"{rate:g}" for rate in sorted(common))
        sizes = [len(row.likely) for row in decided]
        wide = ""
        if max(sizes) > 1:
            wide = f", which may only mean that up to {max(sizes)} rates of a method can't be told apart"
        return f"{names}: {rates} is among the best for each: no dependence seen{wide}.{edge}"
    best = [row.best for row in decided if row.best is not None]
    spread = max(best) / min(best)
    return f"{names}: no rate is among the best for each; the best ones differ by a factor of {spread:.3g}.{edge}"


def rate_sentences(rows: Sequence[RateRow], full: str | None) -> list[str]:
    """A sentence for each row; against `full`, that of full fine-tuning, where there is one; and about all others."""
    found = [rate_sentence(row) for row in rows]
    others = [row for row in rows if row.name != full]
    for whole in (row for row in rows if row.name == full):
        found += [ratio_sentence(row, whole) for row in others]
    return [*found, independence_sentence(others)]
