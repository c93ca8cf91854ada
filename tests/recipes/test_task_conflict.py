"""The conflict of a run's tasks: against plain autograd, without a trace in the run, and where there is none."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import rankwise as rw
from rankwise.attach.inject import adapter_parameters
from rankwise.recipes.finetune import train
from rankwise.recipes.finetune_data import load_data
from rankwise.recipes.run import read_run
from rankwise.say import silent
from tests.recipes.runs import metrics, unmeasured
from tests.recipes.task_runs import ANSWERS, SIZES, task_run, write_tasks

QUICK: dict[str, Any] = {"samples": 0, "sample_tokens": None, "evaluate_every": 4, "save_every": None}


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tasks(tmp_path_factory.mktemp("tasks"))


def measured(output: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (output / "conflict.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("tasks", [{}, {"gate": {"mode": "hard"}}])
def test_cosines_are_those_of_plain_autograd(files: Path, tmp_path: Path, tasks: dict[str, Any]) -> None:
    """All rows of each task, one at a time, through the adapter that the run has saved; of a gate in equal shares."""
    run = task_run(files, tmp_path / "out", {**tasks, "conflict_every": 2, "conflict_rows": 14}, steps=2, **QUICK)
    train(run, quiet=True)
    (line,) = measured(tmp_path / "out")
    layer = "model.layers.1.mlp.down_proj"
    model = AutoModelForCausalLM.from_pretrained(files / "model")
    rw.load_adapter(model, tmp_path / "out" / "adapter", trainable=True)
    own = [value for name, value in adapter_parameters(model).items() if name.startswith(f"{layer}.")]
    assert len(own) == (6 if tasks else 2)
    examples = load_data(read_run(run), silent).train.examples
    equal = rw.on_task(model, dict.fromkeys(ANSWERS, 1 / 3)) if tasks else contextlib.nullcontext()
    gradients, first = [], 0
    with equal:
        for size in SIZES.values():
            loss = torch.zeros(())
            for row in range(first, first + size):
                ids, labels = (torch.tensor(part) for part in (examples[row].input_ids, examples[row].labels))
                logits = model(input_ids=ids[None]).logits[0, :-1]
                loss = loss + torch.nn.functional.cross_entropy(logits, labels[1:], reduction="sum")
            gradients.append(torch.cat([part.flatten() for part in torch.autograd.grad(loss, own)]))
            first += size
    pairs = ((0, 1), (0, 2), (1, 2))
    wanted = [float(torch.cosine_similarity(gradients[a], gradients[b], dim=0)) for a, b in pairs]
    assert line["modules"][layer] == pytest.approx(wanted, abs=1e-4), "they are written with four digits"
    assert any(abs(cosine) > 0.02 for cosine in wanted), "or the test says little"


def test_measuring_changes_nothing_in_the_run(files: Path, tmp_path: Path) -> None:
    for name, more in (("without", {}), ("with", {"conflict_every": 1, "conflict_rows": 4})):
        run = task_run(files, tmp_path / name, {"gate": {"mode": "soft"}, **more}, steps=4, **QUICK)
        run["adapter"]["lora_dropout"] = 0.2  # draws
        train(run, quiet=True)
    assert len(measured(tmp_path / "with")) == 4
    folders = [tmp_path / name / "adapter" for name in ("without", "with")]
    written = [sorted(file.relative_to(folder) for file in folder.rglob("*") if file.is_file()) for folder in folders]
    assert written[0] == written[1] and len(written[0]) == 8
    assert all((folders[0] / name).read_bytes() == (folders[1] / name).read_bytes() for name in written[0])
    assert unmeasured(metrics(tmp_path / "without")) == unmeasured(metrics(tmp_path / "with"))


def test_without_any_conflict_the_tasks_end_in_one_plain_adapter(
    files: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tasks = {
        "gate": {"mode": "soft"}, "isolate": "auto", "isolate_below": -0.99, "conflict_rows": 4,
        "stages": [{"kind": "single", "steps": 2}, {"kind": "joint"}],
    }  # fmt: skip
    summary = train(task_run(files, tmp_path / "out", tasks, steps=4, **QUICK))
    assert summary["tasks"]["isolated"] == []
    adapter = tmp_path / "out" / "adapter"
    assert (adapter / "adapter_config.json").is_file() and not (adapter / "tasks.json").exists()
    assert "no layer has a cosine of two tasks' gradients clearly below -0.99" in capsys.readouterr().err
    tensors = load_file(adapter / "adapter_model.safetensors")
    assert all(tensor.any() for name, tensor in tensors.items() if "lora_B" in name), "it has gone on learning"
