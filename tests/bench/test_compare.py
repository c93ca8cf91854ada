"""Verdicts on synthetic losses: a worse method, a copy, noise; what is not run yet; sentences by rule."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from rankwise.bench.compare import (
    BETTER,
    NO_WORSE,
    REFERENCE,
    UNDECIDED,
    WORSE,
    Plan,
    Row,
    compare,
    default_sentence,
    margin_of,
    sentence,
    verdict,
)  # fmt: skip
from rankwise.bench.gaps import gaps
from rankwise.bench.statistics import Interval

TASKS = ("one", "two")
SEEDS = 6
SIZE = 80


def method(rng, level, spread=0.02, seeds=range(SEEDS), hardness=None):
    """A method's losses: as hard as the examples are, plus `level`, plus what seeds and chance do."""
    losses = {}
    for split in ("train", "valid", "test"):
        losses[split] = {}
        for number, task in enumerate(TASKS):
            hard = np.random.default_rng(number).gamma(2.0, 0.3, SIZE) if hardness is None else hardness
            losses[split][task] = {
                seed: (hard + level + rng.normal(0, spread) + rng.normal(0, spread, SIZE)).tolist() for seed in seeds
            }
    return losses


def plan_for(margin=0.02, num_seeds=SEEDS):
    return Plan(TASKS, "lora", margin, ("base", "full"), num_seeds)


@pytest.fixture
def methods():
    rng = np.random.default_rng(0)
    made = {
        "base": method(rng, 1.0), "lora": method(rng, 0.0, 0.005), "full": method(rng, -0.1, 0.005),
        "worse": method(rng, 0.06, 0.005), "noisy": method(rng, 0.01, 0.1), "late": method(rng, 0.0, seeds=[0]),
    }  # fmt: skip
    made["copy"] = made["lora"]
    made["nearly"] = {
        split: {
            task: {seed: (np.array(losses) + rng.normal(0, 1e-3, SIZE)).tolist() for seed, losses in seeds.items()}
            for task, seeds in tasks.items()
        }
        for split, tasks in made["lora"].items()
    }
    return made


def test_verdicts(methods):
    rows = {row.name: row for row in compare(methods, plan_for())}
    assert {name: row.verdict for name, row in rows.items()} == {
        "base": WORSE, "lora": REFERENCE, "full": BETTER, "worse": WORSE, "noisy": UNDECIDED, "late": UNDECIDED,
        "copy": NO_WORSE, "nearly": NO_WORSE,
    }  # fmt: skip
    assert rows["lora"].share is not None and rows["lora"].share.mean == pytest.approx(1 / 1.1, abs=0.02)
    assert rows["base"].share is None and rows["late"].difference is None


def test_a_worse_method_is_called_worse_and_a_copy_no_worse_whatever_the_draw():
    words = {WORSE: 0, NO_WORSE: 0}
    for seed in range(6):
        rng = np.random.default_rng(seed)
        lora = method(rng, 0.0, 0.01)
        made = {"lora": lora, "base": method(rng, 0.5), "full": method(rng, 0.0), "bad": method(rng, 0.05, 0.01)}
        rows = compare({**made, "copy": lora}, plan_for(0.01))
        found = {row.name: row.verdict for row in rows}
        words[WORSE] += found["bad"] == WORSE
        words[NO_WORSE] += found["copy"] == NO_WORSE
    assert words == {WORSE: 6, NO_WORSE: 6}


def test_equal_methods_are_seldom_told_apart():
    """Of rows without a true difference, about one in twenty is called better or worse before Holm, fewer after."""
    called, corrected = 0, 0
    for seed in range(25):
        rng = np.random.default_rng(seed)
        made = {name: method(rng, 0.0, 0.05) for name in ("lora", "a", "b")} | {"base": method(rng, 1.0)}
        made["full"] = made["base"]
        rows = {row.name: row for row in compare(made, plan_for(None))}
        called += sum(rows[name].difference.p < 0.05 for name in ("a", "b"))
        corrected += sum(rows[name].verdict != UNDECIDED for name in ("a", "b"))
    assert 0 < called <= 8 and corrected <= called


def test_margin_is_of_validation_rows(methods):
    assert margin_of(methods["base"], methods["lora"], TASKS, 0.02) == pytest.approx(0.02, abs=0.002)
    assert margin_of(methods["lora"], methods["base"], TASKS, 0.02) is None
    assert margin_of(methods["base"], methods["late"], TASKS, 0.02) is None
    changed = {**methods["base"], "test": methods["lora"]["test"]}
    assert margin_of(changed, methods["lora"], TASKS, 0.02) == margin_of(methods["base"], methods["lora"], TASKS, 0.02)


@pytest.mark.parametrize(
    ("low", "high", "p", "margin", "word"),
    [
        (-0.2, -0.1, 0.01, 0.05, BETTER),
        (-0.2, -0.1, 0.06, 0.05, NO_WORSE),  # not sure after Holm, but below the margin
        (-0.02, 0.04, 0.5, 0.05, NO_WORSE),
        (0.01, 0.04, 0.01, 0.05, NO_WORSE),  # a sure difference, smaller than the margin
        (0.01, 0.06, 0.01, 0.05, WORSE),
        (0.01, 0.06, 0.06, 0.05, UNDECIDED),
        (-0.02, 0.06, 0.5, 0.05, UNDECIDED),
        (-0.02, 0.04, 0.5, None, UNDECIDED),
    ],
)
def test_rules(low, high, p, margin, word):
    assert verdict(Interval((low + high) / 2, low, high, p), p, margin) == word


def test_sentences_follow_from_the_rows(methods):
    rows = {row.name: sentence(row, plan_for()) for row in compare(methods, plan_for())}
    assert rows["worse"].startswith("worse is worse than lora: test loss +0.0")
    assert rows["copy"].startswith("copy is no worse than lora: test loss +0.0000 nats [+0.0000, +0.0000]")
    assert rows["full"].startswith("full is better than lora: test loss -0.")
    assert rows["late"] == (
        "late is undecided: 1 of 6 seeds have been run on every task, for it and for lora; 2 are needed."
    )
    assert "undecided against lora" in rows["noisy"] and "holds 0" in rows["noisy"]
    few = {row.name: sentence(row, plan_for(num_seeds=8)) for row in compare(methods, plan_for(num_seeds=8))}
    assert "(after 6 of 8 seeds)" in few["worse"]


@pytest.mark.parametrize("failed", ["worse", "lora"])
def test_where_a_run_failed_nothing_is_decided(methods, failed):
    """The seeds that are left are the better ones."""
    survivors = {
        split: {task: {seed: losses for seed, losses in seeds.items() if seed} for task, seeds in tasks.items()}
        for split, tasks in methods[failed].items()
    }
    plan = replace(plan_for(), failed={failed: 2})
    rows = {row.name: row for row in compare({**methods, failed: survivors}, plan)}
    assert rows["worse"].verdict == UNDECIDED and rows["worse"].p < 0.05
    found = rows["worse"].difference
    assert sentence(rows["worse"], plan) == (
        f"worse is undecided against lora: 2 of their runs failed; test loss {found.mean:+.4f} nats "
        f"[{found.low:+.4f}, {found.high:+.4f}] in what is left."
    )
    assert rows["base"].verdict == (UNDECIDED if failed == "lora" else WORSE)
    assert all(gap.word == UNDECIDED for gap in gaps(methods, replace(plan, failed={"full": 1})))
    all_failed = {split: {task: {} for task in TASKS} for split in ("train", "valid", "test")}
    (row,) = (row for row in compare({**methods, failed: all_failed}, plan) if row.name == "worse")
    assert sentence(row, plan) == "worse is undecided against lora: 2 of their runs failed."


def test_a_default_is_justified_by_a_better_row_only():
    rows = [Row("uniform", (0, 1), 2, verdict=REFERENCE), Row("a", (0, 1), 2, verdict=NO_WORSE)]
    plan = Plan(TASKS, "uniform", 0.02, None, 2)
    assert default_sentence([*rows, Row("late", (0,), 1)], plan, "x") == (
        "The default of x is not decided yet: 1 row without all seeds."
    )
    assert default_sentence(rows, plan, "x") == (
        "The default of x: no row is better than uniform, so none but uniform is justified."
    )
    rows += [Row("b", (0, 1), 2, verdict=UNDECIDED), Row("c", (0, 1), 2, verdict=WORSE)]
    assert "no row is better than uniform (1 undecided)" in default_sentence(rows, plan, "x")
    rows += [Row("d", (0, 1), 2, verdict=BETTER)]
    assert default_sentence(rows, plan, "x").endswith("better than uniform, d is justified for tasks like these.")
    rows += [Row("e", (0, 1), 2, verdict=BETTER)]
    assert "one of d, e is justified" in default_sentence(rows, plan, "x")
