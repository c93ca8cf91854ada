"""Gates in two processes are gates in one: measured on all tasks, with the base spread, and extended by a task."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from rankwise.recipes.evaluate import EvaluateConfig, evaluate
from rankwise.recipes.evaluate_tasks import Beside, evaluate_tasks
from rankwise.recipes.finetune import train
from tests.processes import Failed, Processes
from tests.recipes.task_runs import task_run, write_tasks

pytestmark = pytest.mark.slow
QUICK: dict[str, Any] = {"samples": 0, "sample_tokens": None, "save_every": None, "steps": 2, "evaluate_every": 2}
GATES: dict[str, dict[str, Any]] = {
    "hard": {"gate": {"mode": "hard"}}, "soft": {"gate": {"mode": "soft"}}, "inferred": {"gate": {"mode": "inferred"}},
    "vectors": {"embedding": {"per": "layer"}},
}  # fmt: skip


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    files = write_tasks(tmp_path_factory.mktemp("tasks"))
    for name, tasks in GATES.items():
        train(task_run(files, files / name, tasks, **QUICK), quiet=True)
    return files


@pytest.fixture(scope="module")
def two_processes() -> Iterator[Processes]:
    processes = Processes(2)
    yield processes
    processes.stop()


def on_tasks(run: str) -> dict[str, Any]:
    return evaluate_tasks(run, EvaluateConfig(precision="fp32"), Beside(), device="cpu")


def on_one(run: str, file: str, sharding: str) -> list[dict[str, Any]]:
    config = EvaluateConfig(data=file, metrics=("loss",), precision="fp32", task="doubled", sharding=sharding)
    return evaluate(run, config, device="cpu")["results"]


@pytest.mark.parametrize("name", GATES)
def test_measured_on_all_tasks(name: str, made: Path, two_processes: Processes) -> None:
    one = on_tasks(str(made / name))
    for found in two_processes(on_tasks, str(made / name)):
        for mine, theirs in zip(one["results"], found["results"], strict=True):
            assert mine["target"] == theirs["target"] and mine["loss"] == pytest.approx(theirs["loss"], rel=1e-5)


@pytest.mark.parametrize("name", ["hard", "soft", "vectors"])
def test_a_base_that_is_spread(name: str, made: Path, two_processes: Processes) -> None:
    """FSDP2 cuts the base, the adapters stay whole."""
    file = str(made / "doubled-valid.jsonl")
    one = on_one(str(made / name), file, "none")
    for found in two_processes(on_one, str(made / name), file, "full"):
        for mine, theirs in zip(one, found, strict=True):
            assert mine["target"] == theirs["target"] and mine["loss"] == pytest.approx(theirs["loss"], rel=1e-5)


def test_an_inferred_gate_reads_whole_models(made: Path, two_processes: Processes) -> None:
    with pytest.raises(Failed, match="an inferred gate reads whole models only"):
        two_processes(on_one, str(made / "inferred"), str(made / "doubled-valid.jsonl"), "full")


def extend(run: dict[str, Any]) -> None:
    train(run, quiet=True)


def test_a_new_task_in_two_processes(made: Path, two_processes: Processes) -> None:
    runs: list[dict[str, Any]] = []
    for name in ("one", "two"):
        run = task_run(made, made / name, {"extend": str(made / "vectors")}, **QUICK, lr=0.05, max_grad_norm=0)
        run["tasks"]["data"] = {"more": run["tasks"]["data"]["doubled"]}
        del run["adapter"]
        runs.append(run)
    train(runs[0], quiet=True)
    two_processes(extend, runs[1])
    one, two = (load_file(made / name / "adapter" / "tasks.safetensors") for name in ("one", "two"))
    assert one.keys() == two.keys()
    for name in one:
        assert (one[name] - two[name]).abs().max() < (1e-3 if "more" in name else 1e-9), name
