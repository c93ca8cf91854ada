"""Cosines of the tasks' gradients, what of them is noise, and which layers they set apart."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from rankwise.tasks.conflict import Conflict, Cosines, cosines, furthest, isolated


def unit(a: Tensor, b: Tensor) -> float:
    return float(a @ b / (a.norm() * b.norm()))


def test_cosines_of_all_pairs_and_of_batches() -> None:
    gradients = torch.randn(3, 2, 2, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    found = cosines([(list(first), list(second)) for first, second in gradients])
    halves = gradients.flatten(2)
    flat, pairs = halves.sum(1), ((0, 1), (0, 2), (1, 2))
    assert found.between == pytest.approx([unit(flat[a], flat[b]) for a, b in pairs], abs=1e-4)
    highest = [max(unit(x, y) for x in halves[a] for y in halves[b]) for a, b in pairs]
    assert found.highest == pytest.approx(highest, abs=1e-4)
    assert found.own == pytest.approx([unit(*task) for task in halves], abs=1e-4)
    one, opposite, none = torch.ones(4), -2 * torch.ones(4), torch.zeros(4)
    found = cosines([([one], [one * 3]), ([opposite], [none]), ([none], [none])])
    assert found == Cosines([-1, None, None], [-1, None, None], [1, None, None])


def test_the_furthest_pair_of_each_layer_over_time() -> None:
    tasks, own = ("a", "b", "c"), [0.8, 0.6, 0.5]
    none = Cosines([None] * 3, [None] * 3, [None] * 3)
    first = Conflict(1, tasks, {
        "q": Cosines([0.5, -0.2, 0.1], [0.5, -0.1, 0.1], own), "v": Cosines([0.9, 0.8, 0.7], [0.9, 0.8, 0.7], own),
        "o": none,
    })  # fmt: skip
    second = Conflict(2, tasks, {
        "q": Cosines([0.1, 0.0, -0.4], [0.2, 0.1, -0.3], own), "v": Cosines([0.9, None, 0.1], [0.9, None, 0.1], own),
        "o": none,
    })  # fmt: skip
    found = furthest([first, second])
    assert [(one.module, one.tasks) for one in found] == [("q", ("b", "c")), ("v", ("b", "c"))]
    assert [one.cosine for one in found] == pytest.approx([-0.15, 0.4])
    assert found[0].own == pytest.approx((0.6, 0.5)) and found[0].highest == pytest.approx(-0.1)
    assert isolated([first, second], 0.0) == ["q"] and isolated([first, second], 1.0) == ["q", "v"]
    assert isolated([first, second], -0.5) == [] and furthest([]) == [] and isolated([], 1.0) == []


@pytest.mark.parametrize(
    ("highest", "own", "below", "is_clear"),
    [
        (-0.2, (0.5, 0.4), 0.0, True),
        (0.01, (0.5, 0.4), 0.0, False),  # one batch of the one goes along with one of the other
        (-0.2, (0.5, -0.1), 0.0, False),  # a task that does not agree with itself says nothing
        (0.3, (0.5, 0.2), 0.6, False),  # nor one that agrees more with the other
        (0.3, (0.5, 0.4), 0.6, True),
        (-0.9, (0.1, 0.1), -0.5, True),
        (None, (0.5, 0.4), 0.0, False),
        (-0.2, (None, 0.4), 0.0, False),
    ],
)
def test_a_conflict_is_clear_of_noise(
    highest: float | None, own: tuple[float | None, float | None], below: float, is_clear: bool
) -> None:
    found = Conflict(1, ("a", "b"), {"q": Cosines([-0.3], [highest], list(own))})
    assert furthest([found])[0].is_clear(below) == is_clear and isolated([found], below) == ["q"] * is_clear


def test_noise_alone_is_seldom_a_conflict() -> None:
    """Gradients without any signal: half of the cosines are below 0, and next to none is clear of noise."""
    generator, below, clear = torch.Generator().manual_seed(0), 0, 0
    for _ in range(400):
        noise = torch.randn(2, 2, 1, 64, generator=generator)
        found = Conflict(1, ("a", "b"), {"q": cosines([(list(x), list(y)) for x, y in noise])})
        below += furthest([found])[0].cosine < 0
        clear += bool(isolated([found], 0.0))
    assert 150 < below < 250 and clear < 20
    signal = torch.randn(64, generator=generator)
    pulled = torch.stack([signal, signal, -signal, -signal]).view(2, 2, 1, 64)
    found = Conflict(1, ("a", "b"), {"q": cosines([(list(x), list(y)) for x, y in pulled + 0.7 * noise])})
    assert isolated([found], 0.0) == ["q"]


def test_a_line_and_back() -> None:
    found = Conflict(
        3, ("a", "b"), {"q": Cosines([0.25], [0.3], [0.5, None]), "v": Cosines([None], [None], [0.1, 0.2])}
    )
    assert Conflict.from_dict(found.to_dict()) == found
    with pytest.raises(ValueError, match="2 cosines for 1"):
        Conflict.from_dict({**found.to_dict(), "modules": {"q": [0.1, 0.2]}})
    with pytest.raises(KeyError):
        Conflict.from_dict({"step": 1, "tasks": ["a", "b"], "modules": {"q": [0.1]}})
