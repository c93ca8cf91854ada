"""Whether methods overfit less or more than another one: paired differences of their gaps, and words by rule.

The gap is the mean validation loss less the mean loss on training rows. Its difference from the other method's is
paired by seeds and by the examples of both splits; p is corrected (Holm) for the methods.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from rankwise.bench.compare import LEAST_SEEDS, LEVEL_OF_TESTS, UNDECIDED, Losses, Plan, differences
from rankwise.bench.statistics import Interval, contrast, holm, interval

LESS, MORE = "less", "more"


@dataclass(frozen=True)
class Gap:
    """A method's gap against another one's.

    Args:
        name: of the method.
        difference: of its gap from the other's; None for fewer than two seeds.
        p: of it, corrected for the number of methods.
        word: `less` or `more`, where p < 0.05 and no run of the two failed; else `undecided`.
    """

    name: str
    difference: Interval | None = None
    p: float | None = None
    word: str = UNDECIDED


def gaps(methods: Mapping[str, Losses], plan: Plan) -> list[Gap]:
    """Of each method that is trained, against the one that `share_of` leads to; empty without `share_of`."""
    if plan.share_of is None:
        return []
    to = methods[plan.share_of[1]]
    found = [Gap(name, _difference(losses, to, plan)) for name, losses in methods.items() if name not in plan.share_of]
    tested = [(index, one.difference) for index, one in enumerate(found) if one.difference is not None]
    corrected = holm([difference.p for _, difference in tested])
    for (index, difference), p in zip(tested, corrected, strict=True):
        failed = plan.failed.get(found[index].name, 0) + plan.failed.get(plan.share_of[1], 0)
        word = UNDECIDED if failed or p >= LEVEL_OF_TESTS else LESS if difference.mean < 0 else MORE
        found[index] = replace(found[index], p=p, word=word)
    return found


def _difference(one: Losses, other: Losses, plan: Plan) -> Interval | None:
    valid, train = (differences(one, other, split, plan.tasks) for split in ("valid", "train"))
    if valid is None or train is None:
        return None
    return interval([contrast(*pair) for pair in zip(valid, train, strict=True)], apart=plan.apart)


def gap_sentence(gap: Gap, to: str) -> str:
    """The difference in words."""
    if gap.difference is None:
        return f"{gap.name} against {to} in overfitting: undecided, {LEAST_SEEDS} seeds are needed."
    found = gap.difference
    size = f"gap {found.mean:+.4f} nats [{found.low:+.4f}, {found.high:+.4f}], p = {gap.p:.2g} after Holm"
    if gap.word == UNDECIDED:
        return f"{gap.name} against {to} in overfitting: undecided, {size}."
    return f"{gap.name} overfits {gap.word} than {to}: {size}."
