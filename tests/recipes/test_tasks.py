"""Runs on several tasks."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file

from rankwise.errors import RequestError
from rankwise.recipes.evaluate import EvaluateConfig, evaluate
from rankwise.recipes.finetune import train
from rankwise.train.interrupt import Interrupted
from rankwise.train.state import checkpoint_folders
from tests.recipes.runs import interrupting, metrics, unmeasured
from tests.recipes.task_runs import ANSWERS, SIZES, task_run, write_tasks

SOFT = {"mode": "soft", "per": "layer"}
PROGRESSIVE: dict[str, Any] = {
    "gate": SOFT, "embedding": {"per": "layer"}, "isolate": "auto", "isolate_below": 0.3, "conflict_every": 4,
    "conflict_rows": 5, "stages": [{"kind": "single", "steps": 4}, {"kind": "joint"}, {"kind": "shared", "steps": 4}],
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


def test_a_run_is_evaluated_on_its_tasks_own_rows(files: Path, tmp_path: Path) -> None:
    gate = {"mode": "hard"}
    train(task_run(files, tmp_path / "out", {"gate": gate}, steps=2, evaluate_every=2), quiet=True)
    config = EvaluateConfig(task="backwards", metrics=("loss",), precision="fp32")
    found = evaluate(str(tmp_path / "out"), config, device="cpu")
    assert found["data"] == str(files / "backwards-valid.jsonl")
    measured = json.loads((tmp_path / "out" / "summary.json").read_text())["tasks"]["losses"]["backwards"]
    assert found["results"][-1]["loss"] == pytest.approx(measured, rel=1e-5)
    with pytest.raises(RequestError, match="--task"):
        evaluate(str(tmp_path / "out"), EvaluateConfig(metrics=("loss",)), device="cpu")


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
    highest, own = measured[1]["highest"], measured[1]["own"]
    clear = [
        name for name, values in highest.items()
        if any(value < 0.3 and min(own[name][a], own[name][b]) > max(value, 0)
               for value, (a, b) in zip(values, ((0, 1), (0, 2), (1, 2)), strict=True))
    ]  # fmt: skip
    assert sorted(chosen) == sorted(clear)
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


def test_the_best_of_a_gate_is_kept_whole(files: Path, tmp_path: Path) -> None:
    """A rate that breaks things later: the best is an earlier one, and its adapter is the result."""
    quick = {"samples": 0, "sample_tokens": None, "keep_best": True, "lr": 3.0, "schedule": "constant"}
    summary = train(task_run(files, tmp_path / "out", {"gate": {"mode": "hard"}}, **quick), quiet=True)
    step = summary["adapter_step"]
    assert step < 12
    kept, result = tmp_path / "out" / "checkpoints" / f"step-{step}" / "adapter", tmp_path / "out" / "adapter"
    names = sorted(str(path.relative_to(kept)) for path in kept.rglob("*") if path.is_file())
    assert names == sorted(str(path.relative_to(result)) for path in result.rglob("*") if path.is_file())
    assert all((kept / name).read_bytes() == (result / name).read_bytes() for name in names) and len(names) >= 7
    assert set(json.loads((tmp_path / "out" / "provenance.json").read_text())["adapter"]) == set(names)


# --- refused -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("tasks", "more", "words"),
    [
        ({"gate": {"mode": "hard"}, "isolate": ["q_porj"]}, {}, "no adapted layer is called 'q_porj'; did you mean"),
        ({"stages": [{"kind": "shared", "steps": 5}]}, {}, "set train.steps to 5"),
        ({"stages": [{"kind": "shared", "steps": 5}, {"kind": "shared"}]}, {"train": {"keep_best": True}}, "keep_best"),
        ({"stages": [{"kind": "shared", "steps": 2}, {"kind": "shared"}]}, {"train": {"warmup": 3}}, "train.warmup"),
        ({"gate": SOFT}, {"adapter": {"use_dora": True}}, "use_dora does not go with"),
        ({"gate": SOFT}, {"train": {"sharding": "full"}}, "train.sharding: full does not go with"),
        ({"gate": SOFT}, {"adapter": {"init_lora_weights": "pissa"}}, "can't be one of several"),
        ({"embedding": {"per": "shared"}}, {"adapter": {"rank_pattern": {"q_proj": 3}}}, "needs one rank for all"),
        ({"gate": SOFT}, {"adapter": {"modules_to_save": ["embed_tokens"]}}, "only where they are plain linear"),
        ({}, {"train": {"objective": "dpo"}}, "don't go with train.objective: dpo"),
        ({}, {"data": {"train": "x.jsonl"}}, "data.train and tasks.data both say"),
        ({}, {"data": {"mixing_temperature": 2}}, "use tasks.sampling"),
        ({}, {"ranks": {"policy": "grow", "max": 4, "every": 2}}, "moves ranks"),
        ({"sampling": {"by": "behind", "references": dict.fromkeys(ANSWERS, 1.0)}},
         {"train": {"evaluate_every": None, "samples": 0, "sample_tokens": None}}, "evaluate_every says never"),
        ({"adapters": dict.fromkeys(ANSWERS, "nowhere"), "gate": SOFT}, {}, "adapter.r has no effect with"),
    ],
)  # fmt: skip
def test_refused_before_anything_is_written(
    files: Path, tmp_path: Path, tasks: dict[str, Any], more: dict[str, dict[str, Any]], words: str
) -> None:
    run = task_run(files, tmp_path / "out", tasks)
    run = {**run, **{name: {**run.get(name, {}), **values} for name, values in more.items()}}
    with pytest.raises(RequestError) as error:
        train(run, quiet=True)
    assert words in str(error.value), error.value
    assert not (tmp_path / "out").exists()


def test_a_task_without_usable_rows_and_one_without_files(files: Path, tmp_path: Path) -> None:
    (tmp_path / "empty.jsonl").write_text("")
    run = task_run(files, tmp_path / "out", {})
    for name, words in (("empty.jsonl", "empty"), ("gone.jsonl", "gone.jsonl")):
        run["tasks"]["data"]["doubled"] = {
            "train": run["tasks"]["data"]["doubled"]["train"],
            "valid": str(tmp_path / name),
        }
        with pytest.raises(RequestError, match=words):
            train(run, quiet=True)


def test_one_row_and_many_tasks(files: Path, tmp_path: Path) -> None:
    data = {}
    for number in range(20):
        path = tmp_path / f"{number}.jsonl"
        path.write_text(json.dumps({"prompt": "abc", "completion": chr(97 + number) * 3}) + "\n")
        data[f"task-{number}"] = {"train": str(path), "valid": str(path)}
    run = task_run(
        files, tmp_path / "out", {"gate": {"mode": "hard"}}, steps=2, batch_size=10, samples=0, sample_tokens=None
    )
    run["tasks"]["data"] = data
    summary = train(run, quiet=True)
    assert len(summary["tasks"]["losses"]) == 20


# --- adapters that are there -----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def singles(files: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A run for each task by itself."""
    root = tmp_path_factory.mktemp("singles")
    for number, name in enumerate(ANSWERS):
        run = task_run(files, root / name, {}, samples=0, sample_tokens=None, steps=4, save_every=None)
        del run["tasks"]
        run["data"] = {split: str(files / f"{name}-{split}.jsonl") for split in ("train", "valid")}
        run["adapter"]["r"] = 2 + number
        train(run, quiet=True)
    return {name: root / name for name in ANSWERS}


def test_a_gate_over_trained_adapters(files: Path, singles: dict[str, Path], tmp_path: Path) -> None:
    """Frozen, with ranks of their own: they come out as they went in, and the mixture is what learns."""
    adapters = {name: str(folder / "adapter") for name, folder in singles.items()}
    run = task_run(files, tmp_path / "out", {"gate": SOFT, "adapters": adapters, "train_adapters": False}, steps=4)
    del run["adapter"]
    train(run, quiet=True)
    for name, folder in singles.items():
        before = load_file(folder / "adapter" / "adapter_model.safetensors")
        after = load_file(tmp_path / "out" / "adapter" / name / "adapter_model.safetensors")
        assert before.keys() == after.keys() and all(torch.equal(before[key], after[key]) for key in before)
    logits = load_file(tmp_path / "out" / "adapter" / "tasks.safetensors")
    assert any(table.abs().max() > 0 for table in logits.values())
    document = yaml.safe_load((tmp_path / "out" / "run.yaml").read_text())
    train({**document, "output": str(tmp_path / "again")}, quiet=True)
    same(tmp_path / "out", tmp_path / "again")


@pytest.mark.slow
def test_going_on_with_adapters_that_were_there(files: Path, singles: dict[str, Path], tmp_path: Path) -> None:
    adapters = {name: str(folder / "adapter") for name, folder in singles.items()}
    stages = [{"kind": "joint", "steps": 6}, {"kind": "shared"}]
    tasks = {"gate": SOFT, "adapters": adapters, "isolate": "auto", "isolate_below": 0.3, "stages": stages}
    for name, steps in (("straight", ()), ("stopped", (2, 6, 8))):
        run = task_run(files, tmp_path / name, tasks)
        del run["adapter"]
        for number, step in enumerate(steps):
            with pytest.raises(Interrupted):
                train(run, on_step=interrupting(step), resume=number > 0, quiet=True)
        train(run, resume=bool(steps), quiet=True)
    same(tmp_path / "straight", tmp_path / "stopped")
    line = json.loads((tmp_path / "straight" / "conflict.jsonl").read_text().splitlines()[0])
    assert line["step"] == 1


def test_adapters_of_another_base_or_other_layers(files: Path, singles: dict[str, Path], tmp_path: Path) -> None:
    adapters = {name: str(folder / "adapter") for name, folder in singles.items()}
    run = task_run(files, tmp_path / "out", {"gate": SOFT, "adapters": adapters})
    del run["adapter"]
    moved = shutil.copytree(singles["doubled"], tmp_path / "moved")
    record = json.loads((moved / "provenance.json").read_text())
    record["base"]["files"]["model.safetensors"]["sha256"] = "0" * 64
    (moved / "provenance.json").write_text(json.dumps(record))
    run["tasks"]["adapters"] = {**adapters, "doubled": str(moved / "adapter")}
    with pytest.raises(RequestError, match=r"'doubled' .* was trained on another base"):
        train(run, quiet=True)
    other = task_run(files, tmp_path / "other", {}, samples=0, sample_tokens=None, steps=1, save_every=None)
    del other["tasks"]
    other["data"] = {split: str(files / f"doubled-{split}.jsonl") for split in ("train", "valid")}
    other["adapter"]["target_modules"] = ["q_proj"]
    train(other, quiet=True)
    run["tasks"]["adapters"] = {**adapters, "doubled": str(tmp_path / "other" / "adapter")}
    with pytest.raises(RequestError, match="'doubled' does not adapt the layer"):
        train(run, quiet=True)
    run["tasks"]["adapters"] = {**adapters, "doubled": str(tmp_path / "gone")}
    with pytest.raises(RequestError, match="gone"):
        train(run, quiet=True)
    assert not (tmp_path / "out").exists()
