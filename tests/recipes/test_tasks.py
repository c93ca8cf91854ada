"""Runs on several tasks."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file

from rankwise.recipes.finetune import train
from rankwise.train.interrupt import Interrupted
from rankwise.train.state import checkpoint_folders
from tests.recipes.runs import interrupting, metrics, unmeasured
from tests.recipes.task_runs import ANSWERS, SIZES, task_run, write_tasks

SOFT = {"mode": "soft", "per": "layer"}
PROGRESSIVE: dict[str, Any] = {
    "gate": SOFT, "embedding": {"per": "layer"}, "isolate": "auto", "isolate_below": -0.2, "conflict_every": 4,
    "conflict_rows": 2, "stages": [{"kind": "single", "steps": 4}, {"kind": "joint"}, {"kind": "shared", "steps": 4}],
}  # fmt: skip


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tasks(tmp_path_factory.mktemp("tasks"))


def same(one: Path, other: Path) -> None:
    """Two runs ended in the same bytes, and wrote the same lines."""
    for file in sorted(path.relative_to(one) for path in (one / "adapter").rglob("*") if path.is_file()):
        assert (one / file).read_bytes() == (other / file).read_bytes(), file
    assert unmeasured(metrics(one)) == unmeasured(metrics(other))
    for name in ("conflict.jsonl", "samples.jsonl"):
        if (one / name).exists():
            assert (one / name).read_text() == (other / name).read_text(), name
    states = [load_file(checkpoint_folders(path)[-1] / "state.safetensors") for path in (one, other)]
    assert states[0].keys() == states[1].keys()
    assert all(torch.equal(states[0][key], states[1][key]) for key in states[0])


def test_one_adapter_for_all_tasks(files: Path, tmp_path: Path) -> None:
    summary = train(task_run(files, tmp_path / "out", {}), quiet=True)
    lines = metrics(tmp_path / "out")
    valid = [line for line in lines if "valid_loss" in line]
    assert [line["step"] for line in valid] == [3, 6, 9, 12]
    for line in valid:
        losses = [line[f"valid_loss/{name}"] for name in ANSWERS]
        assert line["valid_loss_worst"] == max(losses) and line["valid_loss_mean"] == pytest.approx(sum(losses) / 3)
    assert {line["stage"] for line in lines} == {"1 shared"}
    tasks = summary["tasks"]
    assert tasks["losses"] == {name: valid[-1][f"valid_loss/{name}"] for name in ANSWERS}
    assert tasks["losses"][tasks["worst"]] == max(tasks["losses"].values())
    assert (tmp_path / "out" / "adapter" / "adapter_config.json").is_file()
    samples = [json.loads(line) for line in (tmp_path / "out" / "samples.jsonl").read_text().splitlines()]
    assert [sample["task"] for sample in samples] == list(ANSWERS) * 4
    document = yaml.safe_load((tmp_path / "out" / "run.yaml").read_text())
    assert "train" not in document["data"] and list(document["tasks"]["data"]) == list(ANSWERS)
    train({**document, "output": str(tmp_path / "again")}, quiet=True)
    same(tmp_path / "out", tmp_path / "again")


@pytest.mark.parametrize(
    ("tasks", "folders"),
    [
        ({"gate": {"mode": "hard"}}, set(ANSWERS)),
        ({"gate": SOFT}, set(ANSWERS)),
        ({"gate": {"mode": "top-k", "k": 2}, "isolate": ["v_proj"]}, {*ANSWERS, "shared"}),
        ({"embedding": {"per": "shared"}}, {"shared"}),
    ],
)
def test_gates_and_embeddings_learn(files: Path, tmp_path: Path, tasks: dict[str, Any], folders: set[str]) -> None:
    summary = train(task_run(files, tmp_path / "out", tasks), quiet=True)
    lines = metrics(tmp_path / "out")
    assert lines[-1]["loss"] < lines[0]["loss"]
    adapter = tmp_path / "out" / "adapter"
    assert {path.name for path in adapter.iterdir() if path.is_dir()} == folders
    assert (adapter / "tasks.json").is_file() and summary["tasks"]["losses"].keys() == ANSWERS.keys()


def test_stages_each_with_what_it_trains(files: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    summary = train(task_run(files, tmp_path / "out", PROGRESSIVE))
    said = capsys.readouterr().err
    stages = {line["step"]: line["stage"] for line in metrics(tmp_path / "out")}
    assert [stages[step] for step in (1, 4, 5, 8, 9, 12)] == [
        "1 single", "1 single", "2 joint", "2 joint", "3 shared", "3 shared",
    ]  # fmt: skip
    assert [stage["step"] for stage in summary["tasks"]["stages"]] == [4, 8, 12]
    assert "stage 1 single: steps 1 to 4" in said and "what became shared differs by" in said
    measured = [json.loads(line) for line in (tmp_path / "out" / "conflict.jsonl").read_text().splitlines()]
    assert [line["step"] for line in measured] == [4, 5, 8, 12]
    assert all(len(line["modules"]) == 6 and all(len(v) == 3 for v in line["modules"].values()) for line in measured)
    chosen = summary["tasks"]["isolated"]
    cosines = measured[1]["modules"]
    assert sorted(chosen) == sorted(name for name, values in cosines.items() if min(values) < -0.2)
    assert 0 < len(chosen) < 6, "both kinds of layers should be there, or the test shows less"
    assert json.loads((tmp_path / "out" / "adapter" / "tasks.json").read_text())["embedding"] == {"per": "layer"}


@pytest.mark.parametrize("steps", [(1, 4, 6, 10), pytest.param((3, 8, 9), marks=pytest.mark.slow)])
def test_going_on_in_any_stage_is_the_straight_run(
    files: Path, straight_stages: Path, tmp_path: Path, steps: tuple[int, ...]
) -> None:
    run = task_run(files, tmp_path / "out", PROGRESSIVE)
    for number, step in enumerate(steps):
        with pytest.raises(Interrupted):
            train(run, on_step=interrupting(step), resume=number > 0, quiet=True)
    train(run, resume=True, quiet=True)
    same(straight_stages, tmp_path / "out")


@pytest.fixture(scope="module")
def straight_stages(files: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("straight") / "out"
    train(task_run(files, output, PROGRESSIVE), quiet=True)
    return output


def test_sizes_are_what_the_run_draws_by() -> None:
    assert list(SIZES) == list(ANSWERS)
