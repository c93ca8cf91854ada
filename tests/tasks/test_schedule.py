"""Where the stages of a run are."""

from __future__ import annotations

from typing import Any

import pytest

from rankwise.errors import RequestError
from rankwise.tasks.config import TasksConfig
from rankwise.tasks.schedule import stage_at, stages_of

DATA = {name: {"train": f"{name}.jsonl"} for name in ("a", "b")}
SIZES = {"a": 30, "b": 10}


def config(*stages: dict[str, Any], **settings: Any) -> TasksConfig:
    return TasksConfig(data=DATA, gate={"mode": "soft"}, stages=list(stages), **settings)


def test_one_stage_takes_what_is_left() -> None:
    config_ = config({"kind": "single", "epochs": 1}, {"kind": "joint"}, {"kind": "shared", "steps": 3})
    stages = stages_of(config_, 20, 8, SIZES)
    assert [(s.first, s.last, s.name) for s in stages] == [(1, 5, "1 single"), (6, 17, "2 joint"), (18, 20, "3 shared")]
    assert [stage_at(stages, step).kind for step in (1, 5, 6, 17, 18, 99)] == [
        "single", "single", "joint", "joint", "shared", "shared",
    ]  # fmt: skip
    assert stages[1].trains == ("gate", "adapters") and stages[0].trains == stages[2].trains == ("adapters",)


def test_an_epoch_is_of_the_stages_own_tasks() -> None:
    stages = stages_of(config({"kind": "single", "epochs": 2, "tasks": ["b"]}, {"kind": "joint"}), 20, 8, SIZES)
    assert stages[0].num_steps == 3


@pytest.mark.parametrize(
    ("stages", "words"),
    [
        ([{"kind": "single", "steps": 20}, {"kind": "joint"}], "none is left for stage 2"),
        ([{"kind": "single", "steps": 10}, {"kind": "joint", "steps": 9}], "set train.steps to 19"),
        ([{"kind": "single", "steps": 10}, {"kind": "joint", "steps": 11}], "set train.steps to 21"),
    ],
)
def test_lengths_that_are_not_the_runs(stages: list[dict[str, Any]], words: str) -> None:
    with pytest.raises(RequestError) as error:
        stages_of(config(*stages), 20, 8, SIZES)
    assert words in str(error.value)
