"""New tasks by their vectors alone, by `tasks.extend` of a run: the tasks that are there stay bit for bit."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import rankwise as rw
from rankwise.cli.main import main
from rankwise.errors import RequestError
from rankwise.recipes.finetune import train
from rankwise.train.interrupt import Interrupted
from tests.recipes.runs import interrupting, metrics, unmeasured
from tests.recipes.task_runs import ANSWERS, task_run, write_tasks

OLD = ("capitals", "backwards")
QUIET = {"samples": 0, "sample_tokens": None}


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tasks(tmp_path_factory.mktemp("tasks"))


@pytest.fixture(scope="module")
def before(files: Path) -> Path:
    """A run of task embeddings on two of the tasks."""
    run = task_run(files, files / "before", {"embedding": {"per": "layer"}}, steps=4, evaluate_every=4, **QUIET)
    run["tasks"]["data"] = {name: run["tasks"]["data"][name] for name in OLD}
    train(run, quiet=True)
    return files / "before"


def new_run(files: Path, output: Path, extend: Path, **train: Any) -> dict[str, Any]:
    run = task_run(files, output, {"extend": str(extend)}, **{"lr": 0.1, "steps": 6, **QUIET, **train})
    run["tasks"]["data"] = {"doubled": run["tasks"]["data"]["doubled"]}
    del run["adapter"]
    return run


def outputs(model: Path, adapter: Path, task: str) -> torch.Tensor:
    attached = rw.load_adapter(AutoModelForCausalLM.from_pretrained(model), adapter).eval()
    ids = torch.randint(0, 250, (2, 9), generator=torch.Generator().manual_seed(0))
    with torch.no_grad(), rw.on_task(attached, task):
        return attached(input_ids=ids).logits


def test_a_new_task_learns_its_vector_and_nothing_else_changes(files: Path, before: Path, tmp_path: Path) -> None:
    few = tmp_path / "few.jsonl"  # two rows
    few.write_text("".join((files / "doubled-train.jsonl").read_text().splitlines(keepends=True)[:2]))
    run = new_run(files, tmp_path / "out", before)
    run["tasks"]["data"]["doubled"]["train"] = str(few)
    summary = train(run, quiet=True)
    lines = metrics(tmp_path / "out")
    assert lines[-1]["loss"] < lines[0]["loss"] and list(summary["tasks"]["losses"]) == ["doubled"]
    cost = summary["tasks"]["extended"]
    assert cost["parameters"] == summary["trainable_parameters"] == 6 * 2 and cost["tasks"] == ["doubled"]
    assert 0 < cost["share_of_adapter"] < 0.05 and cost["train_s"] > 0 and cost["from"] == str(before)
    old, new = before / "adapter", tmp_path / "out" / "adapter"
    assert json.loads((new / "tasks.json").read_text())["tasks"] == [*OLD, "doubled"]
    weights = "shared/adapter_model.safetensors"
    assert (old / weights).read_bytes() == (new / weights).read_bytes()
    tables = load_file(old / "tasks.safetensors"), load_file(new / "tasks.safetensors")
    assert all(torch.equal(tables[1][name], table) for name, table in tables[0].items())
    mine = {name: table for name, table in tables[1].items() if name.startswith("vectors/doubled/")}
    assert len(mine) == 6 and any((table - 1).abs().max() > 0.1 for table in mine.values())
    for task in OLD:
        assert torch.equal(outputs(files / "model", old, task), outputs(files / "model", new, task))
    record = json.loads((tmp_path / "out" / "provenance.json").read_text())
    assert weights in record["start"]["files"]


@pytest.mark.slow
def test_it_goes_on_where_it_was_and_a_result_is_extended_again(
    files: Path, before: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """From the adapter's folder, stopped in the middle, by the command; then a fourth task on top."""
    train(new_run(files, tmp_path / "straight", before / "adapter"), quiet=True)
    run = new_run(files, tmp_path / "out", before / "adapter")
    with pytest.raises(Interrupted):
        train(run, on_step=interrupting(3), quiet=True)
    (tmp_path / "run.yaml").write_text(json.dumps(run))
    assert main(["train", str(tmp_path / "run.yaml"), "--resume"]) == 0
    said = capsys.readouterr()
    assert "new tasks doubled: 12 numbers" in said.out and "the vectors of doubled are trained" in said.err
    assert unmeasured(metrics(tmp_path / "straight")) == unmeasured(metrics(tmp_path / "out"))
    for name in ("tasks.safetensors", "tasks.json"):
        assert (tmp_path / "out/adapter" / name).read_bytes() == (tmp_path / "straight/adapter" / name).read_bytes()
    again = new_run(files, tmp_path / "again", tmp_path / "out", steps=1)
    other = {split: str(files / f"capitals-{split}.jsonl") for split in ("train", "valid")}
    again["tasks"]["data"] = {"more": again["tasks"]["data"]["doubled"], "most": other}
    train(again, quiet=True)
    assert json.loads((tmp_path / "again/adapter/tasks.json").read_text())["tasks"] == [*OLD, "doubled", "more", "most"]


def test_refused(files: Path, before: Path, tmp_path: Path) -> None:
    run = new_run(files, tmp_path / "out", before)
    valid = run["tasks"]["data"]["doubled"]
    cases: list[tuple[dict[str, Any], str]] = [
        ({"tasks": {**run["tasks"], "data": {"capitals": valid}}}, "has a task 'capitals' already"),
        ({"tasks": {**run["tasks"], "data": {"Capitals": valid}}}, "differ in capitals only"),
        ({"tasks": {**run["tasks"], "gate": {"mode": "hard"}}}, "tasks.gate does not go with tasks.extend"),
        ({"tasks": {**run["tasks"], "train_adapters": False}}, "tasks.train_adapters does not go with tasks.extend"),
        ({"tasks": {"extend": str(before)}, "data": {"train": valid["train"]}}, "tasks.extend has no effect without"),
        ({"tasks": {**run["tasks"], "extend": str(tmp_path / "gone")}}, "there is no folder"),
        ({"tasks": {**run["tasks"], "extend": str(before / "adapter" / "shared")}}, "holds no task embeddings"),
        ({"adapter": {"r": 4}}, "adapter.r has no effect with tasks.extend"),
        ({"train": {**run["train"], "loraplus_ratio": 16}}, "loraplus_ratio (16) has no effect with tasks.extend"),
        ({"train": {**run["train"], "sharding": "full"}}, "train.sharding: full does not go with"),
    ]
    for change, words in cases:
        with pytest.raises(RequestError) as error:
            train({**run, **change}, quiet=True)
        assert words in str(error.value), (words, error.value)
    gate = task_run(files, tmp_path / "gate", {"gate": {"mode": "hard"}}, steps=1, evaluate_every=1, **QUIET)
    train(gate, quiet=True)
    with pytest.raises(RequestError, match="is a gate, whose tasks have an adapter each"):
        train(new_run(files, tmp_path / "out", tmp_path / "gate"), quiet=True)
    assert not (tmp_path / "out").exists() and set(ANSWERS) > set(OLD)
