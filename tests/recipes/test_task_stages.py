"""Runs on several tasks: what is drawn, replayed, inferred; two processes; kills where one stage becomes another."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import pytest
import torch

from rankwise.attach.checkpoint import load_adapter
from rankwise.errors import RequestError
from rankwise.recipes.finetune import train
from rankwise.recipes.finetune_job import prepare
from rankwise.recipes.run import read_run
from rankwise.recipes.task_layers import APART, Beginning, Layout, arrange
from rankwise.recipes.task_stages import set_way
from rankwise.say import silent
from rankwise.train.interrupt import Interrupted
from tests import tiny
from tests.processes import Processes
from tests.recipes.killed import finish, kill
from tests.recipes.runs import interrupting, metrics, unmeasured
from tests.recipes.task_runs import ANSWERS, task_run, write_tasks
from tests.recipes.test_tasks import PROGRESSIVE, same

QUICK = {"samples": 0, "sample_tokens": None, "evaluate_every": 3, "save_every": None}


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tasks(tmp_path_factory.mktemp("tasks"))


# --- what is drawn -------------------------------------------------------------------------------------------------


def test_what_is_behind_is_drawn_more(files: Path, tmp_path: Path) -> None:
    references = {"capitals": 0.5, "backwards": 50.0, "doubled": 50.0}
    run = task_run(files, tmp_path / "out", {"sampling": {"by": "behind", "references": references}}, **QUICK)
    train(run, quiet=True)
    shares = [line["shares"] for line in metrics(tmp_path / "out") if "shares" in line]
    assert len(shares) == 3, "after each evaluation but the last"
    assert all(share["capitals"] == pytest.approx(0.9 + 0.1 * 14 / 28) for share in shares)


def test_single_adapters_give_the_references(files: Path, tmp_path: Path) -> None:
    stages = [{"kind": "single", "steps": 6}, {"kind": "joint"}]
    tasks = {"sampling": {"by": "behind"}, "gate": {"mode": "soft"}, "stages": stages}
    train(task_run(files, tmp_path / "out", tasks, **QUICK), quiet=True)
    lines = {line["step"]: line for line in metrics(tmp_path / "out")}
    own = {name: lines[6][f"valid_loss/{name}"] for name in ANSWERS}
    gaps = {name: max(lines[9][f"valid_loss/{name}"] / own[name] - 1, 0) for name in ANSWERS}
    sizes = {"capitals": 14, "backwards": 9, "doubled": 5}
    for name, share in lines[9]["shares"].items():
        behind = gaps[name] / sum(gaps.values()) if any(gaps.values()) else sizes[name] / 28
        assert share == pytest.approx(0.9 * behind + 0.1 * sizes[name] / 28)


def test_replay_draws_from_earlier_tasks(files: Path, tmp_path: Path) -> None:
    second = {"kind": "shared", "tasks": ["capitals", "doubled"]}
    stages = [{"kind": "shared", "steps": 5, "tasks": ["backwards"]}, second]
    run = read_run(task_run(files, tmp_path / "out", {"stages": stages, "replay": 0.25}, **QUICK))
    job = prepare(run, None, silent)
    assert job.tasks is not None
    drawn: dict[str, list[int]] = {}
    for stage in job.tasks.run.stages:
        job.tasks.enter(stage, silent, lambda found: None)
        rows = [row for step in range(stage.first, stage.last + 1) for row in job.tasks.run.order.rows(step)]
        drawn[stage.name] = [sum(job.tasks.run.order.task(row) == number for row in rows) for number in range(3)]
    assert drawn["1 shared"] == [0, 30, 0]
    replayed = drawn["2 shared"]
    wanted = [0.75 * 42 * 14 / 19, 0.25 * 42, 0.75 * 42 * 5 / 19]
    assert sum(replayed) == 42 and all(abs(n - share) <= 1 for n, share in zip(replayed, wanted, strict=True))


def test_a_gate_that_infers_learns_to(files: Path, tmp_path: Path) -> None:
    summary = train(task_run(files, tmp_path / "out", {"gate": {"mode": "inferred"}}, **QUICK), quiet=True)
    router = summary["tasks"]["router"]
    assert 0 <= router["accuracy"] <= 1 and router["rows"] == {"capitals": 14, "backwards": 9, "doubled": 5}
    saved = json.loads((tmp_path / "out" / "adapter" / "tasks.json").read_text())
    assert saved["router"] == router
    (tmp_path / "one.jsonl").write_text('{"prompt": "a", "completion": "b"}\n')
    run = task_run(files, tmp_path / "other", {"gate": {"mode": "inferred"}}, **QUICK)
    run["tasks"]["data"]["doubled"]["train"] = str(tmp_path / "one.jsonl")
    with pytest.raises(RequestError, match="'doubled' has one row"):
        train(run, quiet=True)


def test_single_adapters_then_one_for_all_without_a_gate(files: Path, tmp_path: Path) -> None:
    stages = [{"kind": "single", "steps": 6}, {"kind": "shared"}]
    summary = train(task_run(files, tmp_path / "out", {"stages": stages, "conflict_every": 6}, **QUICK), quiet=True)
    assert (tmp_path / "out" / "adapter" / "adapter_config.json").is_file()
    assert not (tmp_path / "out" / "adapter" / "tasks.json").exists()
    assert [stage["stage"] for stage in summary["tasks"]["stages"]] == ["1 single", "2 shared"]


def test_going_on_with_shares_that_follow_losses_and_replay(files: Path, tmp_path: Path) -> None:
    stages = [{"kind": "single", "steps": 2}, {"kind": "shared", "tasks": ["capitals", "doubled"]}]
    sampling = {"by": "behind", "references": dict.fromkeys(ANSWERS, 0.5)}
    tasks = {"sampling": sampling, "replay": 0.25, "stages": stages}
    settings = {**QUICK, "steps": 8, "evaluate_every": 1, "save_every": 8}
    train(task_run(files, tmp_path / "straight", tasks, **settings), quiet=True)
    run = task_run(files, tmp_path / "stopped", tasks, **settings)
    for number, step in enumerate((1, 4)):
        with pytest.raises(Interrupted):
            train(run, on_step=interrupting(step), resume=number > 0, quiet=True)
    train(run, resume=True, quiet=True)
    same(tmp_path / "straight", tmp_path / "stopped")
    shares = [line["shares"] for line in metrics(tmp_path / "stopped") if line["step"] in (4, 7)]
    assert [share["backwards"] for share in shares] == pytest.approx([0.25, 0.25]) and shares[0] != shares[1]


# --- from one stage to the next ------------------------------------------------------------------------------------


def test_each_stage_warms_up(files: Path, tmp_path: Path) -> None:
    stages = [{"kind": "single", "steps": 5}, {"kind": "joint", "lr": 1e-2}]
    settings = {**QUICK, "steps": 10, "evaluate_every": 10, "warmup": 2, "schedule": "linear"}
    train(task_run(files, tmp_path / "out", {"gate": {"mode": "soft"}, "stages": stages}, **settings), quiet=True)
    rates = [line["lr"] for line in metrics(tmp_path / "out")]
    shape = [1 / 2, 1, 3 / 4, 2 / 4, 1 / 4]  # up to the highest rate in two steps, and down, towards 0 after the last
    assert rates == pytest.approx([2e-2 * part for part in shape] + [1e-2 * part for part in shape])


def outputs(model: Any, where: torch.Tensor | None) -> torch.Tensor:
    ids = torch.arange(24).reshape(3, 8)
    model.eval()
    set_way(model, where)
    with torch.no_grad():
        return model(input_ids=ids).logits


def test_what_was_learned_goes_along(files: Path, tmp_path: Path) -> None:
    """Copies of a shared adapter compute what it did, those with noise in equal shares; equal ones are shared whole."""
    run = task_run(files, tmp_path / "out", {}, **QUICK, steps=3)
    del run["output"]
    job = prepare(read_run({**run, "output": str(tmp_path / "out")}), None, silent)
    model, names = job.model, tuple(ANSWERS)
    with torch.no_grad():
        for parameter in job.optimizer.param_groups[0]["params"]:
            parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)) * 0.05)
    before, beginning = outputs(model, None), Beginning.of(model)
    isolated = frozenset(name for name in beginning.ranks if "v_proj" in name)
    rows = torch.tensor([0, 1, 2])
    soft = read_run(task_run(files, tmp_path, {"gate": {"mode": "soft"}})).tasks.gating
    embedded = read_run(task_run(files, tmp_path, {"embedding": {}})).tasks.embedded
    steps: list[tuple[Layout, torch.Tensor | None, bool]] = [
        (APART, rows, False), (Layout(isolated, APART.settings), rows, False),
        (Layout(frozenset(), embedded), rows, False),
        (Layout(None, soft), None, True), (Layout(frozenset(), None), None, False),
    ]  # fmt: skip
    for layout, where, noisy in steps:
        generator = torch.Generator().manual_seed(0) if noisy else None
        error = arrange(model, layout, names, beginning, generator=generator)
        assert error < 1e-5 or noisy or layout.settings is None
        if layout.settings is not None or error < 1e-5:
            assert torch.allclose(outputs(model, where), before, atol=2e-5), layout
    assert error < 0.5, "of noisy copies the mean is what they were copies of"
    assert torch.allclose(outputs(model, None), before, atol=2e-5)


# --- processes and kills ---------------------------------------------------------------------------------------------


def _train(run: dict[str, Any]) -> None:
    train(run, quiet=True)


def test_two_processes_take_the_stages_as_one(files: Path, tmp_path: Path, two_processes: Processes) -> None:
    quick = {**QUICK, "max_grad_norm": 0, "lr": 5e-3, "steps": 9}
    tasks = {
        **PROGRESSIVE,
        "stages": [{"kind": "single", "steps": 3}, {"kind": "joint", "steps": 3}, {"kind": "shared"}],
    }
    train(task_run(files, tmp_path / "one", tasks, **quick), quiet=True)
    two_processes(_train, task_run(files, tmp_path / "two", tasks, **quick))
    folders = tmp_path / "one", tmp_path / "two"
    losses = [[line["loss"] for line in metrics(folder)] for folder in folders]
    assert losses[0] == pytest.approx(losses[1], abs=1e-4)
    texts = [(folder / "conflict.jsonl").read_text().splitlines() for folder in folders]
    measured = [[json.loads(line) for line in lines] for lines in texts]
    assert [line["step"] for line in measured[0]] == [line["step"] for line in measured[1]] == [4, 4, 8]
    for one, two in zip(*measured, strict=True):
        for name, cosines in one["modules"].items():
            assert cosines == pytest.approx(two["modules"][name], abs=0.02), name


def in_stage_change(step: int, seconds: float) -> Callable[[BaseProcess, Path], None]:
    """Waits for the checkpoint at a stage's end, and `seconds` more."""

    def wait(process: BaseProcess, output: Path) -> None:
        while process.is_alive() and not (output / "checkpoints" / f"step-{step}").exists():
            time.sleep(0.001)
        time.sleep(seconds)

    return wait


@pytest.mark.slow
def test_kills_where_one_stage_becomes_another(files: Path, tmp_path: Path) -> None:
    tasks = {**PROGRESSIVE, "conflict_every": 2}
    finish(task_run(files, tmp_path / "straight", tasks))
    for number, (step, seconds) in enumerate([(4, 0.0), (4, 0.05), (8, 0.0), (8, 0.05), (4, 0.1), (8, 0.1)]):
        run = task_run(files, tmp_path / f"run-{number}", tasks)
        kill(run, in_stage_change(step, seconds))
        finish(run)
        same(tmp_path / "straight", tmp_path / f"run-{number}")
    assert unmeasured(metrics(tmp_path / "straight"))


def test_the_result_is_loaded_as_it_was(files: Path, tmp_path: Path) -> None:
    train(task_run(files, tmp_path / "out", {"gate": {"mode": "hard"}, "isolate": ["v_proj"]}, **QUICK), quiet=True)
    model = load_adapter(tiny.llama(initializer_range=0.2), tmp_path / "out" / "adapter")
    again = outputs(model, torch.tensor([0, 1, 2]))
    each = [outputs(model, torch.tensor([task] * 3))[row] for row, task in enumerate((0, 1, 2))]
    assert torch.allclose(again, torch.stack(each), atol=1e-5)
