"""Combined runs measured: weights that are searched, and what each task loses, against `evaluate` of the folders."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from rankwise.errors import RequestError
from rankwise.recipes.combine import CombineConfig, combine
from rankwise.recipes.evaluate import EvaluateConfig, evaluate
from rankwise.recipes.finetune import train
from tests.recipes.trained import run_document, save_model, write_rows

WORDS = ("amber", "birch", "cedar", "dove", "elm", "fern", "gull", "heron")


def rows(task: str) -> list[dict[str, str]]:
    """Two tasks on the same prompts: answers in capitals, or spelt backwards."""
    answer = str.upper if task == "capitals" else (lambda word: word[::-1])
    return [{"prompt": f"{task}: {word}", "completion": answer(word)} for word in WORDS]


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    """A model, and a run of rank 4 and one of rank 2 on it."""
    root = tmp_path_factory.mktemp("combine")
    model = save_model(root / "model")
    for number, task in enumerate(("capitals", "backwards")):
        (root / "files" / task).mkdir(parents=True)
        run = run_document(root / "files" / task, model, steps=8)
        run["adapter"] |= {"r": 4 - 2 * number}
        for split in ("train", "valid"):
            run["data"][split] = write_rows(root / "files" / task / f"{split}.jsonl", rows(task))
        train(run | {"output": str(root / task)}, quiet=True)
    return root


@pytest.fixture
def runs(root) -> list[str]:
    return [str(root / "capitals"), str(root / "backwards")]


MEASURED = {"device": "cpu", "precision": "fp32"}


def loss(name: str | Path, file: Path, target: str = "adapter") -> float:
    config = EvaluateConfig(str(file), ("loss",), precision="fp32")
    return {row["target"]: row["loss"] for row in evaluate(str(name), config, device="cpu")["results"]}[target]


def test_what_each_task_loses(root, runs, tmp_path):
    found = combine(runs, tmp_path / "out", "svd", [0.6, 0.4], CombineConfig(rank=2, tasks={}, **MEASURED))
    assert [task["task"] for task in found["tasks"]] == ["capitals", "backwards"]
    for task in found["tasks"]:
        file = root / "files" / task["task"] / "valid.jsonl"
        assert task["data"] == str(file) and task["rows"] == 8
        assert task["adapters"] == pytest.approx([loss(run, file) for run in runs], abs=1e-6)
        assert task["combined"] == pytest.approx(loss(tmp_path / "out", file), abs=1e-6)
        assert task["base"] == pytest.approx(loss(runs[0], file, "base"), abs=1e-6)
        assert task["lost"] == pytest.approx(task["combined"] - min(task["adapters"]))
    own = [task["adapters"].index(min(task["adapters"])) for task in found["tasks"]]
    assert own == [0, 1], "each task is best served by its own adapter"


@pytest.mark.parametrize("method", ["sum", "svd", "dare_ties"])  # tried side by side; ranks that vary; draws
def test_weights_are_searched(method, root, runs, tmp_path):
    """From weights that are far off; what was found is what the folder has."""
    file = root / "files" / "capitals" / "valid.jsonl"
    config = CombineConfig(tune=str(file), trials=6, **MEASURED)
    found = combine(runs, tmp_path / "out", method, [0.1, 0.9], config)
    search = found["tune"]
    assert search["start"] == (0.1, 0.9) and search["weights"] == tuple(found["weights"]) and search["rows"] == 8
    assert search["trials"] <= 6 and search["after"] < search["before"]
    assert loss(tmp_path / "out", file) == pytest.approx(search["after"], abs=1e-4)
    if method == "svd":
        combine(runs, tmp_path / "start", method, [0.1, 0.9])
        assert loss(tmp_path / "start", file) == pytest.approx(search["before"], abs=1e-4)
    record = json.loads((tmp_path / "out" / "provenance.json").read_text())
    assert record["combined"]["tune"]["weights"] == found["weights"]
    assert record["base"]["files"], "that of the runs"


def test_a_search_repeated_finds_the_same(root, runs, tmp_path):
    config = CombineConfig(tune=str(root / "files" / "capitals" / "valid.jsonl"), trials=3, **MEASURED)
    first, again = (combine(runs, tmp_path / out, config=config) for out in ("one", "two"))
    assert first["weights"] == again["weights"] and first["tune"] == again["tune"]


def test_one_trial_is_the_start(root, runs, tmp_path):
    config = CombineConfig(tune=str(root / "files" / "capitals" / "valid.jsonl"), trials=1, **MEASURED)
    search = combine(runs, tmp_path / "out", config=config)["tune"]
    assert search["trials"] == 1 and search["weights"] == (0.5, 0.5) and search["before"] == search["after"]


def test_the_base_that_is_measured_on_is_that_of_the_adapters(root, runs, tmp_path):
    other = shutil.copytree(root / "model", tmp_path / "other")
    tensors = load_file(other / "model.safetensors")
    save_file({name: 2 * tensor for name, tensor in tensors.items()}, other / "model.safetensors", {"format": "pt"})
    config = CombineConfig(tasks={}, base=str(other), **MEASURED)
    with pytest.raises(
        RequestError, match=r"capitals' was trained on another base, .*that it is measured on \('.*other'\)"
    ):
        combine(runs, tmp_path / "out", config=config)
    assert not (tmp_path / "out").exists()


def test_tasks_by_name_and_file_for_folders_that_are_no_runs(root, runs, tmp_path):
    copies = []
    for run in runs:
        copies.append(shutil.copytree(Path(run) / "adapter", tmp_path / Path(run).name))
    file = root / "files" / "backwards" / "valid.jsonl"
    found = combine(copies, tmp_path / "out", config=CombineConfig(tasks={"mine": str(file)}, **MEASURED))
    (task,) = found["tasks"]
    assert (task["task"], task["data"]) == ("mine", str(file))
    with pytest.raises(RequestError, match=r"is no run with a file in data.valid.* --tasks NAME=FILE"):
        combine(copies, tmp_path / "no", config=CombineConfig(tasks={}, **MEASURED))
    with pytest.raises(RequestError, match="no-such-file"):
        combine(copies, tmp_path / "no", config=CombineConfig(tune="no-such-file.jsonl", **MEASURED))
    assert not (tmp_path / "no").exists()
