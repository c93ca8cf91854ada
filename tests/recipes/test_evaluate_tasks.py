"""`rankwise evaluate --tasks`: a gate beside its single adapters, their mean and a joint adapter, on all tasks."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from rankwise.cli.main import main
from rankwise.recipes.evaluate import EvaluateConfig, evaluate
from rankwise.recipes.finetune import train
from tests import tiny
from tests.recipes.task_runs import ANSWERS, task_run, write_tasks
from tests.test_docs import check_fields

PLAIN = ["--precision", "fp32", "--device", "cpu"]
Measure = Callable[..., dict[str, Any]]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that trained single adapters and then a gate on one of the tasks alone, and a run of one joint adapter."""
    files = write_tasks(tmp_path_factory.mktemp("tasks"))
    quick: dict[str, Any] = {"samples": 0, "sample_tokens": None, "save_every": None}
    stages = [{"kind": "single", "steps": 4}, {"kind": "joint", "tasks": ["capitals"], "lr": 0.1}]
    train(task_run(files, files / "gate", {"gate": {"mode": "soft"}, "stages": stages}, steps=8, **quick), quiet=True)
    train(task_run(files, files / "joint", {}, steps=4, evaluate_every=4, **quick), quiet=True)
    return files


@pytest.fixture
def measure(capsys: pytest.CaptureFixture[str]) -> Measure:
    def called(*argv: object) -> dict[str, Any]:
        capsys.readouterr()
        assert main(["evaluate", *map(str, argv), *PLAIN, "--json"]) == 0
        return json.loads(capsys.readouterr().out)

    return called


def test_every_target_on_every_task(made: Path, measure: Measure) -> None:
    found = measure(made / "gate", "--tasks", "--joint", made / "joint")
    check_fields("evaluate", found)
    names = ["base", *(f"task:{task}" for task in ANSWERS), "uniform", "adapter", "joint"]
    assert [entry["task"] for entry in found["tasks"]] == list(ANSWERS)
    losses: dict[str, dict[str, float]] = {}
    for entry in found["tasks"]:
        assert [one["target"] for one in entry["results"]] == names and entry["rows"] == 4
        losses[entry["task"]] = {one["target"]: one["loss"] for one in entry["results"]}
        for run, own in (("gate", "adapter"), ("gate", f"task:{entry['task']}"), ("joint", "adapter")):
            config = EvaluateConfig(data=entry["data"], metrics=("loss",), precision="fp32")
            alone = {one["target"]: one["loss"] for one in evaluate(str(made / run), config, device="cpu")["results"]}
            here = "joint" if run == "joint" else own
            assert losses[entry["task"]][here] == pytest.approx(alone[own], rel=1e-5), (run, own)
    means = {one["target"]: one for one in found["results"]}
    assert list(means) == [names[0], names[1], "single", *names[2:]]
    for name in names:
        own = [losses[task][name] for task in ANSWERS]
        assert means[name]["loss"] == pytest.approx(sum(own) / 3) and means[name]["worst"] == max(own)
        assert losses[means[name]["worst_task"]][name] == max(own)
    assert means["single"]["loss"] == pytest.approx(sum(losses[task][f"task:{task}"] for task in ANSWERS) / 3)
    stages = json.loads((made / "gate" / "summary.json").read_text())["tasks"]["stages"]
    for task in ANSWERS:
        assert found["reference"][task] == stages[0]["losses"][task]
        assert found["forgotten"][task] == pytest.approx(losses[task]["adapter"] - stages[0]["losses"][task])
    assert len(set(found["forgotten"].values())) == 3


def test_files_and_references_of_one_s_own(made: Path, measure: Measure, tmp_path: Path) -> None:
    given = ["--tasks", f"doubled={made / 'doubled-valid.jsonl'}", "--rows", 2]
    before = measure(made / "gate", *given)
    assert before["reference"] is None and before["forgotten"] is None
    assert [(entry["task"], entry["rows"]) for entry in before["tasks"]] == [("doubled", 2)]
    (tmp_path / "before.json").write_text(json.dumps(before))
    again = measure(made / "gate", *given, "--reference", tmp_path / "before.json")
    assert again["forgotten"] == {"doubled": 0}
    joint = json.loads((made / "joint" / "summary.json").read_text())["tasks"]["losses"]
    assert measure(made / "gate", *given, "--reference", made / "joint")["reference"] == {"doubled": joint["doubled"]}


def test_classifiers(measure: Measure, tmp_path: Path) -> None:
    """Each task's own head, and the joint adapter's; accuracy beside the loss."""
    tiny.encoder().save_pretrained(tmp_path / "model")
    tiny.word_tokenizer().save_pretrained(tmp_path / "model")
    files = {}
    for name, words in (("a", ("red", "blue")), ("b", ("up", "down"))):
        rows = [
            {"text": f"{word} {i}", "label": label} for i in range(4) for word, label in zip(words, "xy", strict=True)
        ]
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        files[name] = {"train": str(tmp_path / f"{name}.jsonl"), "valid": str(tmp_path / f"{name}.jsonl")}
    for output, tasks in (("gate", {"gate": {"mode": "hard"}}), ("joint", {})):
        run = task_run(tmp_path, tmp_path / output, tasks, objective="classification", steps=2, evaluate_every=2)
        run["tasks"]["data"] = files
        run["adapter"] = {"r": 2}
        run["train"] = {k: v for k, v in run["train"].items() if k not in ("samples", "sample_tokens", "save_every")}
        train(run, quiet=True)
    found = measure(tmp_path / "gate", "--tasks", "--joint", tmp_path / "joint")
    for entry in found["tasks"]:
        config = EvaluateConfig(data=files[entry["task"]]["valid"], precision="fp32", task=entry["task"])
        for target, run, task in (("adapter", "gate", entry["task"]), ("joint", "joint", None)):
            alone = evaluate(str(tmp_path / run), dataclasses.replace(config, task=task), device="cpu")["results"][-1]
            one = next(one for one in entry["results"] if one["target"] == target)
            assert one["loss"] == pytest.approx(alone["loss"], rel=1e-5) and one["accuracy"] == alone["accuracy"]
    assert found["reference"] is None and found["forgotten"] is None


def test_for_people(made: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["evaluate", str(made / "gate"), "--tasks", *PLAIN]) == 0
    out = capsys.readouterr().out
    assert "loss on each task" in out and "single" in out and "less reference" in out


def test_refused(made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    gate, joint = str(made / "gate"), str(made / "joint")
    file = str(made / "doubled-valid.jsonl")
    (tmp_path / "other.json").write_text("{}")
    cases = [
        ([joint, "--tasks"], "--tasks has no effect"),
        ([gate, "--tasks", f"double={file}"], "has no task 'double'; did you mean 'doubled'"),
        ([gate, "--joint", joint], "--joint has no effect without --tasks"),
        ([gate, "--reference", joint], "--reference has no effect without --tasks"),
        ([gate, "--tasks", "--joint", gate], "holds several adapters"),
        ([gate, "--tasks", "--data", file], "--data does not go with --tasks"),
        ([gate, "--tasks", "--task", "doubled"], "--task does not go with --tasks"),
        ([gate, "--tasks", "--metrics", "chrf"], "add loss to --metrics"),
        ([gate, "--tasks", "--sharding", "full"], "--sharding full does not go with --tasks"),
        ([gate, "--tasks", "--reference", str(tmp_path / "other.json")], "has no loss of task 'capitals'"),
        ([gate, "--tasks", "--reference", str(tmp_path / "gone.json")], "can't be read"),
    ]
    for argv, words in cases:
        assert main(["evaluate", *argv, *PLAIN]) == 2, argv
        assert words in capsys.readouterr().err, argv
