"""What a run file may say of tasks, and what is refused."""

from __future__ import annotations

from typing import Any

import pytest

from rankwise.config import build
from rankwise.errors import RequestError
from rankwise.tasks.config import TasksConfig, earlier_tasks

DATA = {"movies": {"train": "m.jsonl", "valid": "mv.jsonl"}, "books": {"train": ["b.jsonl"], "valid": "bv.jsonl"}}
SOFT = {"mode": "soft", "per": "layer"}
THREE = [{"kind": "single", "steps": 4}, {"kind": "joint", "steps": 4}, {"kind": "shared"}]
SOME_FIRST = [{"kind": "single", "tasks": ["movies"]}, {"kind": "shared", "steps": 1}]


def tasks(**settings: Any) -> TasksConfig:
    return build(TasksConfig, {"data": DATA, **settings}, "tasks")


def test_nothing_is_several_tasks_of_one_adapter() -> None:
    assert [stage.kind for stage in tasks().plan] == ["shared"]
    assert [stage.kind for stage in tasks(gate=SOFT).plan] == ["joint"]
    assert tasks().files["books"].train == ["b.jsonl"]
    assert not TasksConfig().data


def test_what_a_stage_trains() -> None:
    for gate, more, trained in (
        ({"mode": "hard"}, {}, ("adapters",)),
        (SOFT, {}, ("gate", "adapters")),
        (SOFT, {"train_adapters": False}, ("gate",)),
        (SOFT, {"stages": [{"kind": "joint", "train": ["gate"]}]}, ("gate",)),
        ({"mode": "top-k", "k": 1}, {"stages": [{"kind": "joint", "train": ["adapters"]}]}, ("adapters",)),
    ):
        config = tasks(gate=gate, **more)
        assert config.trained_in(config.plan[0]) == trained


def test_tasks_of_earlier_stages() -> None:
    stages = [{"kind": "shared", "steps": 2, "tasks": ["books"]}, {"kind": "shared", "tasks": ["movies"]}]
    config = tasks(stages=stages, replay=0.2)
    assert [earlier_tasks(config, index) for index in (0, 1)] == [(), ("books",)]


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"data": {"movies": {"train": "m"}}}, "names one task"),
        ({"data": {"../x": {"train": "m"}, "b": {"train": "b"}}}, "'../x' can't be used"),
        ({"data": {"movies": {"train": "m"}, "books": {}}}, "missing setting 'tasks.data.books.train'"),
        ({"data": {"movies": {"train": "m"}, "books": {"train": []}}}, "tasks.data.books"),
        ({"data": {"movies": {"train": "m", "valid": "v"}, "books": {"train": "b"}}}, "'books' has none"),
        ({"data": {"movies": {"train": "m", "vaild": "v"}, "books": {"train": "b"}}}, "did you mean"),
        ({"data": {}, "replay": 0.1}, "tasks.replay has no effect without tasks.data"),
        ({"gate": {"mode": "sof"}}, "did you mean 'soft'"),
        ({"gate": {"mode": "soft", "k": 1}}, "k=1 has no effect"),
        ({"gate": {"mode": "top-k", "k": 1}}, "leaves a trained gate nothing to learn"),
        ({"gate": {"mode": "top-k", "k": 2}}, "leaves none of the 2 adapters out"),
        ({"gate": {"mode": "hard", "temperature": 2.0}}, "has no effect"),
        ({"gate": SOFT, "embedding": {}}, "no stage is shared"),
        ({"embedding": {"per": "module"}}, "unknown embedding per"),
        ({"adapters": {"movies": "m"}, "gate": SOFT}, "none for 'books'"),
        ({"adapters": {"movies": "m", "book": "b"}, "gate": SOFT}, "no task 'book'; did you mean 'books'"),
        ({"adapters": {"movies": "m", "books": "b"}}, "the first stage is shared"),
        ({"train_adapters": True}, "has no effect without a gate"),
        ({"gate": {"mode": "hard"}, "train_adapters": False}, "nothing to train"),
        ({"sampling": {"by": "siez"}}, "did you mean 'size'"),
        ({"sampling": {"temperature": 2}}, "has no effect with by: size"),
        ({"sampling": {"by": "temperature", "temperature": 0.5}}, "must be 1 or more"),
        ({"sampling": {"by": "behind"}}, "references has none for 'movies'"),
        ({"sampling": {"by": "behind", "references": {"movies": 1.0, "books": 0}}}, "a loss above 0"),
        ({"sampling": {"by": "behind", "references": {"movies": 1.0, "book": 1.0}}}, "no task 'book'"),
        ({"sampling": {"references": {"movies": 1.0}}}, "have no effect with by: size"),
        ({"replay": 0.1}, "no stage leaves out a task"),
        ({"replay": 1.0, "stages": THREE, "gate": SOFT}, "between 0 and 1"),
        ({"stages": []}, "empty"),
        ({"stages": [{"kind": "jiont"}]}, "did you mean 'joint'"),
        ({"stages": [{"kind": "joint"}]}, "give tasks.gate"),
        ({"stages": [{"kind": "single"}], "gate": SOFT}, "no stage is joint"),
        ({"stages": [{"kind": "shared"}, {"kind": "shared"}]}, "only one stage"),
        ({"stages": [{"kind": "shared", "steps": 2, "epochs": 1}]}, "leave one out"),
        ({"stages": [{"kind": "shared", "train": ["gate"]}]}, "nothing but adapters"),
        ({"stages": [{"kind": "joint", "train": ["gates"]}], "gate": SOFT}, "did you mean 'gate'"),
        ({"stages": [{"kind": "joint", "train": ["gate"]}], "gate": {"mode": "hard"}}, "learns no mixture"),
        ({"stages": [{"kind": "shared", "tasks": ["film"]}]}, "no task 'film'"),
        ({"stages": [{"kind": "shared", "lr": 0}]}, "more than 0"),
        ({"stages": [{"kind": "shared", "tasks": ["movies"]}]}, "no stage trains on task 'books'"),
        ({"sampling": {"by": "behind"}, "stages": SOME_FIRST},
         "references has none for 'books'"),
        ({"isolate": "auto"}, "without a joint stage"),
        ({"isolate": "some", "gate": SOFT}, "give auto"),
        ({"isolate": "auto", "gate": SOFT, "train_adapters": False}, "trains no adapters"),
        ({"isolate": "auto", "gate": SOFT, "stages": [{"kind": "joint", "train": ["gate"]}]}, "trains no adapters"),
        ({"isolate": [], "gate": SOFT}, "empty"),
        ({"isolate_below": 0.1, "gate": SOFT}, "without tasks.isolate: auto"),
        ({"isolate": "auto", "isolate_below": 2.0, "gate": SOFT}, "cosine"),
        ({"conflict_every": 0}, "1 or more"),
        ({"conflict_rows": 4}, "has no effect without"),
        ({"conflict_rows": 1, "conflict_every": 2}, "2 or more"),
    ],
)  # fmt: skip
def test_refused(settings: dict[str, Any], words: str) -> None:
    with pytest.raises(RequestError) as error:
        tasks(**settings)
    assert words in str(error.value), error.value


def test_twenty_tasks() -> None:
    config = tasks(data={f"task-{i}": {"train": f"{i}.jsonl"} for i in range(20)}, gate=SOFT)
    assert len(config.names) == 20
