"""Several tasks on synthetic losses: which task is worst, what each is called, forgetting, a new task, sentences."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from rankwise.bench.compare import BETTER, NO_WORSE, REFERENCE, UNDECIDED, WORSE, Plan, compare
from rankwise.bench.several import (
    BEFORE,
    FORGETS,
    GAINS,
    KEEPS,
    OWN,
    change_sentence,
    changes,
    highest,
    rows_by_task,
    tasks_sentence,
    worst_sentence,
    worst_tasks,
)

TASKS = ("one", "two", "three")
SEEDS = range(5)
SIZE = 80
PLAN = Plan(TASKS, "singles", 0.02, None, len(SEEDS))
MARGINS = dict.fromkeys(TASKS, 0.02)


def losses(rng, levels, spread=0.005, seeds=SEEDS, splits=("train", "valid", "test")):
    """As hard as the examples are, plus a level for each task (of some splits another), plus what chance does."""
    found = {}
    for split in splits:
        found[split] = {}
        for number, task in enumerate(TASKS):
            level = levels.get(f"{task}/{split}", levels.get(task))
            if level is None:
                continue
            hard = np.random.default_rng(number).gamma(2.0, 0.3, SIZE)
            found[split][task] = {
                seed: (hard + level + rng.normal(0, spread) + rng.normal(0, spread, SIZE)).tolist() for seed in seeds
            }
    return found


def even(level):
    return dict.fromkeys(TASKS, level)


@pytest.fixture
def methods():
    rng = np.random.default_rng(0)
    return {
        "singles": losses(rng, even(0.0)),
        "base": losses(rng, even(1.0)),
        "joint": losses(rng, {"one": -0.05, "two": 0.0, "three": 0.08}),
        "noisy": losses(rng, even(0.0), spread=0.3),
        "late": losses(rng, even(0.0), seeds=[0]),
    }


def test_each_task_has_its_own_verdict(methods):
    rows = rows_by_task(methods, PLAN, MARGINS)
    assert [rows[task]["joint"].verdict for task in TASKS] == [BETTER, NO_WORSE, WORSE]
    assert [rows[task]["noisy"].verdict for task in TASKS] == [UNDECIDED] * 3
    assert all(rows[task]["singles"].verdict == REFERENCE for task in TASKS)
    assert rows["one"]["late"].verdict == UNDECIDED and rows["one"]["late"].difference is None
    said = tasks_sentence("joint", rows, PLAN)
    assert said == "joint by task, against singles: better on one; no worse on two; worse on three."


def test_p_is_corrected_for_all_tasks_and_methods(methods):
    together = rows_by_task(methods, PLAN, MARGINS)
    alone = rows_by_task({name: methods[name] for name in ("singles", "noisy")}, PLAN, MARGINS)
    assert max(together[task]["noisy"].p for task in TASKS) >= max(alone[task]["noisy"].p for task in TASKS)
    assert together["one"]["joint"].p > compare(methods, Plan(["one"], "singles", None, None, 5))[2].difference.p


def test_the_worst_task_is_chosen_on_validation_rows(methods):
    rng = np.random.default_rng(3)
    methods["turned"] = losses(rng, {"one": 0.0, "two": 0.0, "three": 0.0, "two/valid": 0.2, "three/test": 0.2})
    rows = rows_by_task(methods, PLAN, MARGINS)
    worst = {one.name: one for one in worst_tasks(methods, PLAN, rows, MARGINS)}
    assert "singles" not in worst and worst["joint"].task == "three"
    assert worst["joint"].row.verdict == WORSE
    assert worst["turned"].task == "two" and worst["turned"].row.verdict == NO_WORSE  # though it is worst on three
    assert worst["late"].row is None
    said = worst_sentence(worst["joint"], PLAN, MARGINS)
    assert said.startswith("joint's worst task is three, chosen on validation rows: worse than singles there, +0.0")
    assert "below the margin of 0.0200" in worst_sentence(worst["turned"], PLAN, MARGINS)
    assert worst_sentence(worst["late"], PLAN, MARGINS) == "late's worst task is undecided: 2 seeds are needed."
    row = next(row for row in compare(methods, PLAN) if row.name == "turned")
    assert highest(row)[0] == max(row.by_task, key=row.by_task.get)


def test_forgetting():
    rng = np.random.default_rng(1)
    splits = ("train", "valid", "test", OWN)
    base = {"three": 0.0, f"three/{OWN}": None}
    made = {
        "singles": losses(rng, even(0.0)),
        "forgets": losses(rng, {"one": 0.2, f"one/{OWN}": 0.0, "two": 0.1, f"two/{OWN}": 0.0, **base}, splits=splits),
        "gains": losses(rng, {"one": -0.1, f"one/{OWN}": 0.0, "two": -0.1, f"two/{OWN}": 0.0, **base}, splits=splits),
        "keeps": losses(rng, {"one": 0.0, "two": 0.0, **base}, splits=splits),
        "noisy": losses(rng, {"one": 0.0, "two": 0.0, **base}, 0.3, splits=splits),
        "late": losses(rng, {"one": 0.1, f"one/{OWN}": 0.0, "two": 0.0, **base}, seeds=[0], splits=splits),
    }
    found = {one.name: one for one in changes(made, PLAN)}
    assert "singles" not in found
    words = {name: one.word for name, one in found.items()}
    assert words == {"forgets": FORGETS, "gains": GAINS, "keeps": KEEPS, "noisy": UNDECIDED, "late": UNDECIDED}
    assert found["forgets"].tasks == ("one", "two") and found["forgets"].by_task["one"] == pytest.approx(0.2, abs=0.02)
    assert found["forgets"].after - found["forgets"].before == pytest.approx(found["forgets"].difference.mean)
    assert found["forgets"].p > found["forgets"].difference.p
    said = {name: change_sentence(one, PLAN) for name, one in found.items()}
    assert said["forgets"].startswith("forgets forgets: test loss +0.1") and "(one +0." in said["forgets"]
    assert said["gains"].startswith("gains forgets nothing, later stages help: test loss -0.1")
    assert said["keeps"].startswith("keeps forgets no more than the margin of 0.0200: test loss ")
    assert said["noisy"].startswith("noisy is undecided in what it forgets")
    assert "2 seeds are needed" in said["late"]
    after = {one.name: one.word for one in changes(made, replace(PLAN, failed={"forgets": 1}))}
    assert after == {**words, "forgets": UNDECIDED}, "of a method with a failed run the better runs are left"


def test_no_change_is_seldom_called_one():
    called = 0
    for seed in range(25):
        rng = np.random.default_rng(seed)
        made = {"singles": losses(rng, even(0.0)), "x": losses(rng, even(0.0), 0.05, splits=("valid", "test", OWN))}
        called += changes(made, PLAN)[0].difference.p < 0.05
    assert called <= 5


def test_a_new_task():
    rng = np.random.default_rng(2)
    made = losses(rng, {**even(0.0), f"three/{BEFORE}": 0.3, f"one/{BEFORE}": None, f"two/{BEFORE}": None},
                  splits=("train", "valid", "test", BEFORE))  # fmt: skip
    (found,) = changes({"vector": made}, PLAN)
    assert (found.tasks, found.word, found.since) == (("three",), GAINS, BEFORE)
    said = change_sentence(found, PLAN)
    assert said.startswith("vector: learning the vector alone changes the test loss of three by -0.2")
    assert ": better, p = " in said
