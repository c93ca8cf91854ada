from __future__ import annotations

import pytest
import torch

from rankwise.adapters.config import TASK_TYPES
from rankwise.data.formats import FORMATS
from rankwise.data.head_encoder import HEAD_LAYOUTS
from rankwise.data.layouts import LAYOUTS
from rankwise.models.load import TASKS
from rankwise.train.config import TrainConfig
from rankwise.train.needs import NEEDS
from rankwise.train.objective import Meter, means
from rankwise.train.objectives import OBJECTIVES, objective_of

CONTRACT = {"sft", "text", "seq2seq", "classification", "token-classification", "embedding", "dpo"}


def test_every_objective_is_there() -> None:
    assert set(NEEDS) == set(OBJECTIVES) == CONTRACT


@pytest.mark.parametrize("name", NEEDS)
def test_needs_name_what_there_is(name: str) -> None:
    needs = NEEDS[name]
    assert needs.task in TASKS and needs.task_type in TASK_TYPES and needs.layout in {*LAYOUTS, *HEAD_LAYOUTS}
    assert needs.rows in {form.rows for form in FORMATS.values()}
    assert objective_of(TrainConfig(objective=name)).needs is needs


def test_a_meter_gives_means_over_units_and_starts_afresh() -> None:
    meter, sums = Meter(("accuracy", "margin")), {}
    meter.add("accuracy", torch.tensor([1.0, 0.0, 1.0]))
    meter.add("accuracy", torch.tensor([0.0]))
    meter.pour(sums)
    assert means(sums) == {"accuracy": 0.5}
    meter.add("margin", torch.tensor([2.0]))
    meter.pour(sums)
    assert sums == {"accuracy": [2.0, 4.0], "margin": [2.0, 1.0]}
    nothing: dict[str, list[float]] = {}
    Meter().pour(nothing)
    assert nothing == {} and means(nothing) == {}
