"""find-lr on a tiny run: the pick trains, the model is left as it was, the run file is changed in one place."""

from __future__ import annotations

import pytest
import torch
import yaml

from rankwise.attach.checkpoint import native_state
from rankwise.attach.inject import ranks
from rankwise.errors import RequestError
from rankwise.recipes.find_lr import _as_test, apply_rate, check_apply, find_lr, measure, untrained_loss, with_rate
from rankwise.recipes.finetune import train
from rankwise.recipes.finetune_job import prepare
from rankwise.recipes.run import read_run
from rankwise.train.loop import take_step
from rankwise.train.range_test import RangeTest
from tests.recipes.trained import run_document, save_model
from tests.train.objective_cases import CASES

SHORT = RangeTest(1e-4, 3.0, 24, 2)


@pytest.fixture
def document(tmp_path):
    return run_document(tmp_path, save_model(tmp_path / "model"))


@pytest.mark.slow
def test_the_pick_trains_better_than_rates_far_from_it(tmp_path, document):
    picture = tmp_path / "curve.png"
    found = find_lr(document, SHORT, picture, quiet=True)
    assert picture.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    assert found["current"] == document["train"]["lr"] and not (tmp_path / "run").exists()
    assert found["curve"][0]["lr"] == pytest.approx(1e-4) and found["lr"] < found["lowest_at"]

    def loss(lr: float, name: str) -> float:
        section = {**document["train"], "lr": lr}
        return train({**document, "train": section, "output": str(tmp_path / name)}, quiet=True)["final_loss"]

    assert loss(found["lr"], "pick") < loss(found["lr"] / 100, "low")


def test_it_is_repeatable_and_leaves_the_model_as_it_was(document):
    picks = []
    for _ in range(2):
        job = prepare(read_run({**document, "train": {**document["train"], "steps": 48}}), None, lambda line: None)
        before = {name: tensor.clone() for name, tensor in native_state(job.model).items()}
        picks.append(measure(job, SHORT))
        after = native_state(job.model)
        assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)
    assert picks[0] == picks[1]


@pytest.mark.parametrize("objective", CASES)
def test_the_change_at_the_first_step_is_nothing(tmp_path, objective):
    """Whatever is trained, and though a step has several micro batches: both losses are of one model and step."""
    case = CASES[objective]
    rows = case.write_rows(tmp_path / "train.jsonl", 12)
    run = {
        "model": {"name": str(case.save_model(tmp_path / "model")), "device": "cpu"},
        "adapter": {"r": 4},
        "data": {"train": str(rows), "valid_split": 0},
        "train": {
            "objective": objective, "steps": 3, "batch_size": 6, "micro_batch_size": 4, "precision": "fp32",
        },
    }  # fmt: skip
    job = prepare(read_run(run), None, lambda line: None)
    before = untrained_loss(job, job.batches(1))
    step = take_step(job.model, job.optimizer, job.batches(1), job.objective, job.plan, job.progress)
    assert before == pytest.approx(step.loss, rel=1e-6)
    assert untrained_loss(job, job.batches(1)) < before


@pytest.mark.parametrize(
    "text",
    [
        "data: {train: a.jsonl}\ntrain: {steps: 3, lr: 1.0e-3, seed: 1}  # why\noutput: out\n",
        "train:\n  # the rate\n  lr: 2e-4   # was tried\n  steps: 3\ndata:\n  train: a.jsonl\n",
        "train:\n    steps: 3\ndata: {train: a.jsonl}\n",
        "data: {train: a.jsonl}\n",
        "train: {}\ndata: {train: a.jsonl}\n",
        "train: {steps: 3}\ndata: {train: lr.jsonl}\n",
    ],
)
def test_only_the_rate_changes_in_the_file(text):
    changed = with_rate(text, 3.1e-3)
    assert changed is not None
    wanted = yaml.safe_load(text)
    wanted["train"] = {**(wanted.get("train") or {}), "lr": 3.1e-3}
    assert yaml.safe_load(changed) == wanted
    assert [line for line in text.splitlines() if "#" in line and "lr" not in line] == [
        line for line in changed.splitlines() if "#" in line and "lr" not in line
    ]


def test_a_file_that_cannot_be_changed_safely_is_left_alone(tmp_path):
    path = tmp_path / "run.yaml"
    text = "shared: &train {steps: 3}\ntrain: *train\ndata: {train: a.jsonl}\n"
    path.write_text(text)
    with pytest.raises(RequestError, match=r"set train.lr to 0.0031 there"):
        apply_rate(path, 3.1e-3)
    assert path.read_text() == text


def test_what_apply_can_not_write_is_said_before_the_test(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text("shared: &train {steps: 3}\ntrain: *train\ndata: {train: a.jsonl}\n")
    with pytest.raises(RequestError, match="can't be changed safely; leave --apply out"):
        check_apply(path)
    path.write_text("train: {steps: 3}\n")
    check_apply(path)


@pytest.mark.parametrize("end", [b"\n", b"\r\n"])
def test_line_ends_stay(tmp_path, end):
    path = tmp_path / "run.yaml"
    lines = [b"data: {train: a.jsonl}", b"train:", b"  steps: 3  # why", b""]
    path.write_bytes(end.join(lines))
    apply_rate(path, 3.1e-3)
    assert path.read_bytes() == end.join([*lines[:2], b"  lr: 3.1e-03", *lines[2:]])


def test_ranks_that_move_stay_in_the_test(document):
    document["train"]["steps"] = 1000
    run = read_run({**document, "ranks": {"policy": "grow", "start": 2, "max": 8, "every": 500}})
    job = prepare(_as_test(run, SHORT), None, lambda line: None)
    assert set(ranks(job.model).values()) == {2} and job.mover is None and job.plan.num_steps == 48
