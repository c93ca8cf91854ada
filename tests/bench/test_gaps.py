"""Whether methods overfit less or more: on losses whose gaps are known."""

from __future__ import annotations

import numpy as np
import pytest

from rankwise.bench.compare import UNDECIDED, Plan
from rankwise.bench.gaps import LESS, MORE, gap_sentence, gaps

TASKS = ("one", "two")
SIZES = {"train": 70, "valid": 60, "test": 50}


def method(rng, gap, spread=0.01, seeds=range(4)):
    """Losses whose validation loss is so far above that on training rows; examples are alike for all methods."""
    return {
        split: {
            task: {
                seed: (
                    np.random.default_rng(place).gamma(2.0, 0.3, size)
                    + (gap if split == "valid" else 0.0) + rng.normal(0, spread) + rng.normal(0, 0.02, size)
                ).tolist()
                for seed in seeds
            }
            for place, task in enumerate(TASKS)
        }
        for split, size in SIZES.items()
    }  # fmt: skip


@pytest.fixture
def methods():
    rng = np.random.default_rng(0)
    asked = {"base": 0.0, "r1": 0.1, "r8": 0.3, "r64": 0.45, "full": 0.3}
    made = {name: method(rng, gap) for name, gap in asked.items()}
    return {**made, "late": method(rng, 0.1, seeds=[0])}


def plan_for(share_of=("base", "full")):
    return Plan(TASKS, "r8", None, share_of, 4, apart=True)


def test_words_follow_from_the_gaps(methods):
    found = {gap.name: gap for gap in gaps(methods, plan_for())}
    assert {name: gap.word for name, gap in found.items()} == {
        "r1": LESS, "r8": UNDECIDED, "r64": MORE, "late": UNDECIDED
    }  # fmt: skip
    assert found["r1"].difference.mean == pytest.approx(-0.2, abs=0.03) and found["late"].difference is None
    assert all(gap.p >= gap.difference.p for gap in found.values() if gap.difference)
    assert gaps(methods, plan_for(None)) == []


def test_sentences(methods):
    said = {gap.name: gap_sentence(gap, "full") for gap in gaps(methods, plan_for())}
    assert said["r1"].startswith("r1 overfits less than full: gap -0.") and said["r1"].endswith("after Holm.")
    assert said["r64"].startswith("r64 overfits more than full: gap +0.")
    assert said["r8"].startswith("r8 against full in overfitting: undecided, gap ")
    assert said["late"] == "late against full in overfitting: undecided, 2 seeds are needed."


def test_equal_gaps_are_seldom_told_apart():
    rng = np.random.default_rng(1)
    words = []
    for _ in range(60):
        made = {name: method(rng, 0.2, 0.03, range(3)) for name in ("a", "full")}
        words += [gap.word for gap in gaps(made, plan_for(("full", "full")))]
    assert len(words) == 60 and sum(word != UNDECIDED for word in words) <= 6
