"""Ranks from names and sizes alone: by kind of layer, by depth, by an expression, under a budget. Pure.

The names of layers are all that a plan or a ramp looks at. Under a budget, ranks are proportional to weights (all
equal, a plan's, a ramp's): the largest common factor that fits is found, and what is left goes rank by rank to the
layers whose share was cut most (the method of largest remainders), until not one more rank fits.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence

from rankwise.attach.targets import pattern_fits
from rankwise.errors import RequestError, nearest

PARTS: dict[str, tuple[tuple[str, ...], ...]] = {
    **dict.fromkeys(
        ("c_attn", "qkv_proj", "query_key_value", "Wqkv"),
        (("q_proj", "k_proj", "v_proj"), ("query", "key", "value"), ("q", "k", "v")),
    ),
    "gate_up_proj": (("gate_proj", "up_proj"),),
}
"""Names of layers that compute several projections at once, and what these are called where they are apart."""

BISECTIONS = 60
"""Halvings of the common factor: it is then exact to the last bits of a double."""


def planned(
    names: Sequence[str], plan: Mapping[str, int], default: int, say: Callable[[str], None] = lambda _: None
) -> dict[str, int]:
    """The rank of each layer: of the first pattern that fits the end of its name, else `default`; 0 leaves it out.

    A fused projection's name (`c_attn`) that fits nothing means the parts (`q_proj`, `k_proj`, `v_proj`) in a model
    that keeps them apart, and that is said.

    Raises: RequestError for a pattern that fits no layer, naming those that would, and a plan that leaves all out.
    """
    patterns: dict[str, int] = {}
    for pattern, rank in plan.items():
        patterns[_known(pattern, names, say)] = rank
    ranks = {
        name: next((rank for pattern, rank in patterns.items() if pattern_fits(pattern, name)), default)
        for name in names
    }
    if not any(ranks.values()):
        raise RequestError("ranks.plan leaves every layer out; give one a rank above 0")
    return ranks


def _known(pattern: str, names: Sequence[str], say: Callable[[str], None]) -> str:
    """`pattern`, or what it means in a model that has no such layer."""
    if any(pattern_fits(pattern, name) for name in names):
        return pattern
    last = pattern.rpartition(".")[2]
    for parts in PARTS.get(last, ()):
        if all(any(pattern_fits(part, name) for name in names) for part in parts):
            say(f"ranks.plan['{pattern}']: this model keeps what {last} computes apart, in {', '.join(parts)}")
            return "|".join(parts)
    kinds = layer_kinds(names)
    close = nearest(pattern, kinds)
    first = f"did you mean {' or '.join(repr(kind) for kind in close)}? Names" if close else "names"
    raise RequestError(f"ranks.plan['{pattern}'] fits no adapted layer; {first} that fit: {', '.join(kinds)}")


def layer_kinds(names: Iterable[str]) -> list[str]:
    """The last two parts of the names (`attn.c_attn`), or one where the other is a number; in order, each once."""
    found: dict[str, None] = {}
    for name in names:
        *_, parent, last = ["", *name.split(".")]
        found[last if not parent or parent.isdigit() else f"{parent}.{last}"] = None
    return list(found)


def depths(names: Sequence[str]) -> dict[str, float]:
    """Where each layer's block stands in its stack: 0 the first, 1 the last.

    The first number in a name is its block's, what stands before it names the stack. A layer without a number is at 0
    before the first block and at 1 after it.
    """
    places = {name: re.match(r"(?P<stack>.*?)\.?\b(?P<block>\d+)(?:\.|$)", name) for name in names}
    blocks: dict[str, set[int]] = {}
    for match in places.values():
        if match is not None:
            blocks.setdefault(match["stack"], set()).add(int(match["block"]))
    found: dict[str, float] = {}
    for name, match in places.items():
        if match is None:
            found[name] = 1.0 if any(places[before] is not None for before in found) else 0.0
            continue
        order = sorted(blocks[match["stack"]])
        found[name] = order.index(int(match["block"])) / max(len(order) - 1, 1)
    return found


def ramp(names: Sequence[str], depth: str, low: float, high: float) -> dict[str, float]:
    """`up`: from `low` in the first block to `high` in the last; `down` the other way; `hump`: `high` in the middle."""
    shapes: dict[str, Callable[[float], float]] = {
        "up": lambda d: d, "down": lambda d: 1 - d, "hump": lambda d: 1 - abs(2 * d - 1),
    }  # fmt: skip
    return {name: low + (high - low) * shapes[depth](place) for name, place in depths(names).items()}


def fit_to_budget(
    weights: Mapping[str, float],
    least: Mapping[str, int],
    most: Mapping[str, int],
    total: Callable[[Mapping[str, int]], int],
    budget: int,
) -> dict[str, int]:
    """Ranks proportional to `weights`, from `least` to `most`, whose `total` is at most `budget`.

    Not one layer could have one rank more within the budget.

    Raises: RequestError when the least ranks take more than the budget, or the highest less.
    """
    check_budget(least, most, total, budget)

    def ranks_at(factor: float) -> dict[str, int]:
        return {name: min(max(int(factor * weight), least[name]), most[name]) for name, weight in weights.items()}

    low, high = 0.0, max((most[name] + 1) / weight for name, weight in weights.items())
    for _ in range(BISECTIONS):
        middle = (low + high) / 2
        low, high = (middle, high) if total(ranks_at(middle)) <= budget else (low, middle)
    ranks = ranks_at(low)
    order = sorted(ranks, key=lambda name: ranks[name] - high * weights[name])
    while True:
        grown = False
        for name in order:
            more = {**ranks, name: ranks[name] + 1}
            if more[name] <= most[name] and total(more) <= budget:
                ranks, grown = more, True
        if not grown:
            return ranks


def check_budget(
    least: Mapping[str, int], most: Mapping[str, int], total: Callable[[Mapping[str, int]], int], budget: int
) -> None:
    """Raises: RequestError when no ranks from `least` to `most` can meet the budget."""
    if (needed := total(least)) > budget:
        raise RequestError(
            f"ranks.budget ({budget:,}) is below {needed:,}, which the least ranks take; raise it, lower ranks.min, or "
            "adapt fewer layers (adapter.target_modules)"
        )
    if (largest := total(most)) < budget:
        raise RequestError(
            f"ranks.budget ({budget:,}) is above {largest:,}, which the highest ranks take; lower it, raise ranks.max, "
            "or adapt more layers (adapter.target_modules)"
        )
