"""Which kinds of layers a quantised graph loses most by: each in turn is left out, and the drift measured."""

from __future__ import annotations

from collections.abc import Callable, Sequence

Measure = Callable[[frozenset[str]], float]
"""KL(fp32 || quantised), nats a token, of a graph in which these kinds of layers are left out."""


def gains(kinds: Sequence[str], drift: float, measure: Measure) -> list[tuple[str, float]]:
    """Kinds by how much smaller the drift is without them, the largest first."""
    found = [(kind, drift - measure(frozenset([kind]))) for kind in kinds]
    return sorted(found, key=lambda entry: -entry[1])


def leave_out(kinds: Sequence[str], bound: float, measure: Measure) -> frozenset[str]:
    """The kinds to leave out so that the drift is at most `bound`, those that gain most first.

    Where no choice is enough, all are left out.
    """
    left: frozenset[str] = frozenset()
    drift = measure(left)
    if drift <= bound:
        return left
    for kind, _ in gains(kinds, drift, measure):
        left = left | {kind}
        drift = measure(left)
        if drift <= bound:
            break
    return left


def blame(kinds: Sequence[str], drift: float, measure: Measure, most: int = 3) -> str:
    """For a message: the kinds that gain most, and what the drift would be without each alone."""
    listed = [f"{kind} (without it {drift - gain:.3g})" for kind, gain in gains(kinds, drift, measure)[:most]]
    return ", ".join(listed)
