"""Cosines of the tasks' gradients, and which layers they set apart."""

from __future__ import annotations

import math

import pytest
import torch

from rankwise.tasks.conflict import Conflict, cosines, furthest, isolated


def test_cosines_of_all_pairs() -> None:
    gradients = torch.randn(3, 2, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    found = cosines([list(one) for one in gradients])
    flat = gradients.flatten(1)
    wanted = [float(flat[a] @ flat[b] / (flat[a].norm() * flat[b].norm())) for a, b in ((0, 1), (0, 2), (1, 2))]
    assert found == pytest.approx(wanted, abs=1e-4)
    one, opposite = torch.ones(4), -2 * torch.ones(4)
    assert cosines([[one], [one * 3], [opposite], [torch.zeros(4)]]) == [1, -1, None, -1, None, None]


def test_the_furthest_pair_of_each_layer_over_time() -> None:
    tasks = ("a", "b", "c")
    first = Conflict(1, tasks, {"q": [0.5, -0.2, 0.1], "v": [0.9, 0.8, 0.7], "o": [None, None, None]})
    second = Conflict(2, tasks, {"q": [0.1, 0.0, -0.4], "v": [0.9, None, 0.5], "o": [None, None, None]})
    found = furthest([first, second])
    assert [(one.module, one.tasks) for one in found] == [("q", ("b", "c")), ("v", ("b", "c"))]
    assert [one.cosine for one in found] == pytest.approx([-0.15, 0.6])
    assert isolated(found, 0.0) == ["q"] and isolated(found, 1.0) == ["q", "v"] and isolated(found, -0.5) == []
    assert furthest([]) == []


def test_a_line_and_back() -> None:
    found = Conflict(3, ("a", "b"), {"q": [0.25], "v": [None]})
    assert Conflict.from_dict(found.to_dict()) == found
    with pytest.raises(ValueError, match="2 cosines for 1 pair"):
        Conflict.from_dict({"step": 1, "tasks": ["a", "b"], "modules": {"q": [0.1, 0.2]}})
    assert math.isclose(furthest([found])[0].cosine, 0.25)
