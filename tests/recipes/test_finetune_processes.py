"""Runs on two processes, and what one process makes of the same run file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file

from rankwise import distributed
from rankwise.errors import RequestError
from rankwise.recipes.finetune import train
from rankwise.train.interrupt import Interrupted
from rankwise.train.loop import Step
from rankwise.train.needs import NEEDS
from rankwise.train.objectives import OBJECTIVES
from rankwise.train.state import checkpoint_folders
from tests import tiny
from tests.processes import Processes
from tests.recipes.runs import adapter_bytes, interrupting, metrics, settings, unmeasured
from tests.train.objective_cases import CASES as OBJECTIVE_CASES

TOLERANCE = 1e-5

CASES: dict[str, dict[str, Any]] = {
    "whole, packed": {},
    "whole, padded, dora, tied, optimizer shared": {
        "model": {"name": "tied"}, "adapter": {"use_dora": True}, "data": {"packing": False},
        "train": {"share_optimizer_from": 1},
    },
    "spread, tied, recomputed": {
        "model": {"name": "tied"}, "train": {"sharding": "full", "gradient_checkpointing": True},
    },
    "spread, untied, dora, padded, optimizer shared": {
        "adapter": {"use_dora": True, "init_lora_weights": "olora"}, "data": {"packing": False},
        "train": {"sharding": "full", "share_optimizer_from": 1, "epochs": 3, "steps": None},
    },
    "spread, head trained whole": {"adapter": {"modules_to_save": ["lm_head"]}, "train": {"sharding": "full"}},
    "a process without rows": {"train": {"batch_size": 1, "micro_batch_size": 1}},
    "spread, a process without rows": {"train": {"batch_size": 1, "micro_batch_size": 1, "sharding": "full"}},
}  # fmt: skip


@pytest.fixture(scope="module")
def models(files: Path) -> Path:
    """`files`, with a model whose embeddings are tied besides."""
    tiny.llama(tied=True).save_pretrained(files / "tied")
    tiny.tiny_tokenizer().save_pretrained(files / "tied")
    return files


def run_of(files: Path, output: Path, case: dict[str, Any], **train_settings: Any) -> dict[str, Any]:
    """A run of 20 steps of 7 rows (unequal shares and micro batches) without dropout, changed by `case`."""
    run = settings(files, output, adapter={"r": 4, "lora_alpha": 8, "lora_dropout": 0.0})
    run["train"] |= {"steps": 20, "batch_size": 7, "save_every": 5, "evaluate_every": 10}
    for section, changes in case.items():
        run[section] = {**run[section], **changes}
    run["train"] |= train_settings
    if "name" in case.get("model", {}):
        run["model"]["name"] = str(files / case["model"]["name"])
    return run


def train_here(run: dict[str, Any], resume: bool = False, stop_after: int = 0) -> dict[str, Any] | str:
    """A run in each of the processes; how it was interrupted, where it was."""
    torch.manual_seed(distributed.rank())  # nothing may depend on what a process did before
    try:
        return train(run, on_step=interrupting(stop_after), resume=resume, quiet=True)
    except Interrupted as stopped:
        return stopped.message


def losses(output: Path, name: str = "loss") -> list[float]:
    return [line[name] for line in metrics(output) if name in line]


def largest_difference(ours: Path, theirs: Path) -> float:
    """Of losses, validation losses and gradient norms of two runs."""
    apart = 0.0
    for name in ("loss", "valid_loss", "grad_norm"):
        pairs = list(zip(losses(ours, name), losses(theirs, name), strict=True))
        apart = max(apart, *(abs(a - b) for a, b in pairs))
    return apart


@pytest.mark.parametrize("name", CASES)
def test_losses_of_two_processes_are_those_of_one(
    name: str, models: Path, tmp_path: Path, two_processes: Processes
) -> None:
    train(run_of(models, tmp_path / "one", CASES[name]), quiet=True)
    summaries = two_processes(train_here, run_of(models, tmp_path / "two", CASES[name]))
    assert summaries[0] == summaries[1]
    assert len(losses(tmp_path / "two")) == summaries[0]["steps"] == len(losses(tmp_path / "one"))
    assert largest_difference(tmp_path / "two", tmp_path / "one") < TOLERANCE
    one, two = (load_file(tmp_path / output / "adapter" / "adapter_model.safetensors") for output in ("one", "two"))
    assert one.keys() == two.keys() and max(float((one[key] - two[key]).abs().max()) for key in one) < 1e-4
    samples = [(tmp_path / output / "samples.jsonl").read_text() for output in ("one", "two")]
    assert samples[0] == samples[1]


@pytest.mark.parametrize("objective", ["dpo", "seq2seq"])
def test_other_objectives_on_a_spread_base(objective: str, tmp_path: Path, two_processes: Processes) -> None:
    """The reference of `dpo` is the spread base too; T5's scaled, tied head is whole only inside of a forward."""
    case = OBJECTIVE_CASES[objective]
    case.save_model(tmp_path / "model")
    case.write_rows(tmp_path / "train.jsonl", 12)
    case.write_rows(tmp_path / "valid.jsonl", 4, seed=1)
    changes = {"objective": objective, "steps": 4, "evaluate_every": 2, "save_every": None}
    train(run_of(tmp_path, tmp_path / "one", {}, **changes), quiet=True)
    two_processes(train_here, run_of(tmp_path, tmp_path / "two", {}, sharding="full", **changes))
    assert largest_difference(tmp_path / "two", tmp_path / "one") < TOLERANCE
    figures = [[line[name] for line in metrics(tmp_path / output) for name in sorted(line) if "reward" in name]
               for output in ("one", "two")]  # fmt: skip
    assert bool(figures[0]) == (objective == "dpo") and figures[1] == pytest.approx(figures[0], abs=1e-4)


@pytest.mark.parametrize("sharding", ["none", "full"])
def test_interrupted_and_resumed_is_the_straight_run_with_dropout(
    sharding: str, models: Path, tmp_path: Path, two_processes: Processes
) -> None:
    case = {"adapter": {"lora_dropout": 0.1}}
    changes = {"sharding": sharding, "share_optimizer_from": 1, "steps": 8, "save_every": 4}
    two_processes(train_here, run_of(models, tmp_path / "straight", case, **changes))
    halves = run_of(models, tmp_path / "halves", case, **changes)
    stopped = two_processes(train_here, halves, False, 3)
    assert stopped[0] == stopped[1] and "stopped after step 3 of 8, saved" in stopped[0]
    assert "go on with: the same torchrun, and -m rankwise train" in stopped[0]
    resumed = two_processes(train_here, halves, True)
    assert resumed[0]["resumed_from"] == 3
    assert adapter_bytes(tmp_path / "halves") == adapter_bytes(tmp_path / "straight")
    assert unmeasured(metrics(tmp_path / "halves")) == unmeasured(metrics(tmp_path / "straight"))
    states = [
        load_file(checkpoint_folders(tmp_path / name)[-1] / "state.safetensors") for name in ("halves", "straight")
    ]
    assert states[0].keys() == states[1].keys()
    assert all(torch.equal(states[0][key], states[1][key]) for key in states[0])
    assert not torch.equal(states[0]["rng/0/torch"], states[0]["rng/1/torch"])  # each drops units of its own


@pytest.mark.parametrize("before", [1, 2])
def test_a_checkpoint_loads_with_another_number_of_processes(
    before: int, models: Path, tmp_path: Path, two_processes: Processes
) -> None:
    straight, halves = (run_of(models, tmp_path / name, {}, steps=8) for name in ("straight", "halves"))
    changed = run_of(models, tmp_path / "halves", {}, steps=8, sharding="full", share_optimizer_from=1)
    train(straight, quiet=True)
    if before == 1:
        with pytest.raises(Interrupted):
            train(halves, on_step=interrupting(3), quiet=True)
        assert two_processes(train_here, changed, True)[1]["resumed_from"] == 3
    else:
        two_processes(train_here, changed, False, 3)
        assert train(halves, resume=True, quiet=True)["resumed_from"] == 3
    assert largest_difference(tmp_path / "halves", tmp_path / "straight") < TOLERANCE


@pytest.mark.parametrize("name", OBJECTIVE_CASES)
def test_every_objective_its_base_spread_if_it_can_be(name: str, tmp_path: Path, two_processes: Processes) -> None:
    case = OBJECTIVE_CASES[name]
    case.save_model(tmp_path / "model")
    case.write_rows(tmp_path / "train.jsonl", 9)
    case.write_rows(tmp_path / "valid.jsonl", 3, seed=1)
    samples = {} if NEEDS[name].generates else {"samples": None, "sample_tokens": None}
    changes = {"objective": name, "steps": 4, "batch_size": 5, "save_every": 2, **samples}
    train(run_of(tmp_path, tmp_path / "one", {}, **changes), quiet=True)
    sharding = "none" if OBJECTIVES[name].step_losses is not None else "full"
    two_processes(train_here, run_of(tmp_path, tmp_path / "two", {}, sharding=sharding, **changes))
    assert largest_difference(tmp_path / "two", tmp_path / "one") < TOLERANCE
    if NEEDS[name].generates:
        assert (tmp_path / "one" / "samples.jsonl").read_text() == (tmp_path / "two" / "samples.jsonl").read_text()


def _refusals(run: dict[str, Any], wrong: dict[str, Any]) -> list[str]:
    messages = []
    for each in (run, wrong):
        try:
            train(each, quiet=True)
        except RequestError as error:
            messages.append(error.message)
    return messages


def test_a_wrong_request_is_refused_on_all_and_leaves_nothing(
    models: Path, straight: Path, tmp_path: Path, two_processes: Processes
) -> None:
    taken = settings(models, straight)
    bad = settings(models, tmp_path / "new", data={"train": str(models / "bad.jsonl")})
    first, second = two_processes(_refusals, taken, bad)
    assert first == second and len(first) == 2
    assert "exists; choose another output" in first[0] and "bad.jsonl:2" in first[1]
    assert not (tmp_path / "new").exists()


def _growing(run: dict[str, Any]) -> list[list[float]]:
    """Grows two layers after step 3 from a hook, and checks that the processes are still in step."""
    from rankwise.attach.inject import adapter_tensors
    from rankwise.ranks.dynamic import set_ranks
    from rankwise.recipes import finetune

    seen: list[float] = []
    jobs = []
    carry_out = finetune._carry_out

    def keep_job(job, *rest):
        jobs.append(job)
        return carry_out(job, *rest)

    def grow(step: Step) -> None:
        seen.append(step.loss)
        if step.number == 3:
            names = {"model.layers.0.mlp.up_proj": 7, "model.layers.1.self_attn.q_proj": 2}
            set_ranks(jobs[0].model, names, optimizer=jobs[0].optimizer)
        distributed.check_in_step(adapter_tensors(jobs[0].model), f"after step {step.number}")

    finetune._carry_out = keep_job
    try:
        torch.manual_seed(distributed.rank())
        train(run, on_step=grow, quiet=True)
    finally:
        finetune._carry_out = carry_out
    return seen


@pytest.mark.parametrize("sharding", ["none", "full"])
def test_ranks_grow_in_step_and_as_on_one_process(
    sharding: str, models: Path, tmp_path: Path, two_processes: Processes
) -> None:
    changes = {"steps": 8, "save_every": 0, "keep_checkpoints": "auto", "share_optimizer_from": 1}
    alone = _growing(run_of(models, tmp_path / "one", {}, **changes))
    first, second = two_processes(_growing, run_of(models, tmp_path / "two", {}, sharding=sharding, **changes))
    assert first == second and len(alone) == 8
    assert max(abs(a - b) for a, b in zip(alone, first, strict=True)) < TOLERANCE


def _planned(run: dict[str, Any]) -> dict[str, int]:
    train(run, quiet=True)
    return yaml.safe_load((Path(run["output"]) / "run.yaml").read_text())["ranks"]["plan"]


def test_ranks_from_data_are_those_of_one_process(models: Path, tmp_path: Path, two_processes: Processes) -> None:
    ranks = {"policy": "spectrum", "budget": 5000, "batches": 1}
    adapter = {"init_lora_weights": "lora_ga"}
    changes = {"steps": 2, "save_every": 0, "keep_checkpoints": "auto"}
    alone = _planned({**run_of(models, tmp_path / "one", {}, **changes), "ranks": ranks, "adapter": adapter})
    run = {**run_of(models, tmp_path / "two", {}, sharding="full", **changes), "ranks": ranks, "adapter": adapter}
    assert two_processes(_planned, run) == [alone, alone] and len(set(alone.values())) > 1


@pytest.mark.slow
def test_a_run_of_two_processes_goes_on_with_four(models: Path, tmp_path: Path, two_processes: Processes) -> None:
    straight, halves = (run_of(models, tmp_path / name, {}, steps=8) for name in ("straight", "halves"))
    train(straight, quiet=True)
    two_processes(train_here, halves, False, 3)
    four = Processes(4)
    try:
        resumed = four(train_here, run_of(models, tmp_path / "halves", {}, steps=8, sharding="full"), True)
    finally:
        four.stop()
    assert [summary["resumed_from"] for summary in resumed] == [3] * 4 and len({str(one) for one in resumed}) == 1
    assert largest_difference(tmp_path / "halves", tmp_path / "straight") < TOLERANCE
