"""kill -9 at random moments, inside of saves too: what is resumed ends in the bytes of the straight run."""

from __future__ import annotations

import random
from collections import Counter
from itertools import chain
from pathlib import Path
from typing import Any

import pytest

from rankwise.files import sha256_file
from tests.recipes.killed import finish, inside_save, kill, moments
from tests.recipes.runs import metrics, settings, unmeasured

STEPS = 8


def run_of(files: Path, output: Path) -> dict[str, Any]:
    """Every step is saved, so that there is always a save to be killed in."""
    changes = {
        "steps": STEPS, "batch_size": 4, "micro_batch_size": 3, "save_every": 1, "evaluate_every": 3, "samples": 1,
        "sample_tokens": 2, "keep_best": True,
    }  # fmt: skip
    return settings(files, output, train=changes)


def traces(output: Path) -> dict[str, Any]:
    """All that a run leaves, but for measured times and memory."""
    names = sorted(str(path.relative_to(output)) for path in output.rglob("*"))
    weights = [output / name for name in names if name.endswith((".safetensors", "samples.jsonl"))]
    return {
        "names": names,
        "hashes": {str(path.relative_to(output)): sha256_file(path) for path in weights},
        "metrics": unmeasured(metrics(output)),
    }


def check_kills(files: Path, folder: Path, count: int, seed: int, saves: int = 0) -> Counter[str]:
    """Kills `count` runs, every third of them twice, and resumes each; what they were in the middle of.

    Where saves are quick, few of these kills hit one: more runs follow, killed where a save begins, until `saves` have.
    """
    first_s = finish(run_of(files, folder / "straight"))
    run_s = min(first_s, finish(run_of(files, folder / "again")))  # the first also imports
    straight = traces(folder / "straight")
    assert traces(folder / "again") == straight
    draw = random.Random(seed)
    found: Counter[str] = Counter()
    further = (inside_save(draw.randint(1, STEPS), 0.0) for _ in range(4 * saves))
    for number, wait in enumerate(chain(moments(draw, count, run_s, STEPS), further)):
        if number >= count and found["a save"] >= saves:
            break
        run = run_of(files, folder / f"run-{number}")
        found[kill(run, wait) or "nothing: it was over"] += 1
        if number % 3 == 2:
            found[kill(run, moments(draw, 1, run_s, STEPS)[0]) or "nothing: it was over"] += 1
        finish(run)
        assert traces(Path(run["output"])) == straight, f"killed run {number}, seed {seed}"
    return found


def test_five_kills(files: Path, tmp_path: Path) -> None:
    """How many of them hit a save is a matter of the machine's speed: the fifty must."""
    found = check_kills(files, tmp_path, 5, seed=0)
    assert found.total() > found["nothing: it was over"]


@pytest.mark.slow
def test_fifty_kills(files: Path, tmp_path: Path) -> None:
    found = check_kills(files, tmp_path, 50, seed=1, saves=10)
    print(f"\nkilled in the middle of: {dict(found)}")
    assert found.total() - found["nothing: it was over"] >= 50 and found["a save"] >= 10
