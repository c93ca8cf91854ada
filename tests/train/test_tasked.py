"""A batch that mixes tasks computes what each row alone computes with its task's adapter, for every objective."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch
from transformers import PreTrainedModel

from rankwise.adapters.config import LoraConfig
from rankwise.attach.gates import attach_embedding, attach_gate, on_task, set_task
from rankwise.attach.inject import adapter_parameters
from rankwise.data.config import DataConfig
from rankwise.data.example import Example
from rankwise.data.labels import find_labels
from rankwise.data.loader import load_examples
from rankwise.data.tasked import TaskExamples
from rankwise.train.batches import MicroBatches, RowOrder
from rankwise.train.config import TrainConfig
from rankwise.train.loop import accumulate
from rankwise.train.needs import NEEDS
from rankwise.train.objectives import objective_of
from rankwise.train.recompute import enable_gradient_checkpointing
from rankwise.train.tasked import TaskBatch, for_tasks
from tests import tiny
from tests.attach.gate_cases import disturbed
from tests.train.objective_cases import CASES

PAD = 259
BOUND = 1e-6
"""In float64; what is left is that coefficients and losses are fp32 in places."""
TASKS = ("movies", "books", "games")
SIZES = (3, 1, 3)
NAMES = ("sft", "text", "seq2seq", "classification", "token-classification")
WAYS = [*((name, False) for name in NAMES), ("sft", True), ("text", True)]


def rows_of(name: str, folder: Path) -> TaskExamples:
    path = str(CASES[name].write_rows(folder / "rows.jsonl", sum(SIZES)))
    labels = find_labels(DataConfig(train=path))
    tokenizer = tiny.tiny_tokenizer(CASES[name].chat_template)
    loaded = load_examples(path, tokenizer, DataConfig(train=path), NEEDS[name].layout, labels=labels)
    return TaskExamples(loaded.examples, TASKS, SIZES)


def gated(name: str, embedding: bool = False) -> PreTrainedModel:
    torch.manual_seed(0)
    config = LoraConfig(r=2, init_lora_weights=False, task_type=NEEDS[name].task_type)
    model = CASES[name].model()
    if embedding:
        return disturbed(attach_embedding(model, config, TASKS), 1, by=0.5).double().train()
    return disturbed(attach_gate(model, dict.fromkeys(TASKS, config)), 1).double().train()


def of_a_step(model: PreTrainedModel, batches: list, objective) -> tuple[float, dict[str, torch.Tensor]]:
    optimizer = torch.optim.AdamW(adapter_parameters(model).values())
    loss, _, _ = accumulate(model, optimizer, batches, objective, 1)
    return loss, {key: p.grad.clone() for key, p in adapter_parameters(model).items() if p.grad is not None}


def told(model: PreTrainedModel, examples: TaskExamples, name: str, size: int, packing: bool):
    """A step of all rows, `size` at a time, which tell their tasks."""
    plain = objective_of(TrainConfig(objective=name))
    with torch.no_grad(), on_task(model, "movies"):  # what is found out about a model, on rows of its own
        plain.losses(model, plain.collate([examples[0], examples[1]], PAD, packing))

    class Route:
        def __init__(self, model: PreTrainedModel, where: torch.Tensor) -> None:
            set_task(model, where)

        def __enter__(self) -> None:
            return None

        def __exit__(self, *_: object) -> None:
            return None

    objective = for_tasks(objective_of(TrainConfig(objective=name)), TASKS, Route)
    order = RowOrder(len(examples), len(examples), len(examples), seed=0)
    batches = MicroBatches(objective, examples, order, size, PAD, packing, torch.device("cpu"))(1)
    assert all(isinstance(batch, TaskBatch) for batch in batches)
    return of_a_step(model, batches, objective)


def alone(model: PreTrainedModel, examples: TaskExamples, name: str) -> tuple[float, dict[str, torch.Tensor]]:
    """The same step, row by row."""
    objective = objective_of(TrainConfig(objective=name))

    def losses(model: PreTrainedModel, batch):
        with on_task(model, tasks.pop(0)):
            return objective.losses(model, batch)

    tasks = [example.task for example in examples]
    batches = [objective.collate([example], PAD, False) for example in examples]
    return of_a_step(model, batches, dataclasses.replace(objective, losses=losses))


@pytest.mark.parametrize(("name", "packing"), WAYS)
def test_a_mixed_batch_is_each_row_alone(name: str, packing: bool, tmp_path: Path) -> None:
    examples = rows_of(name, tmp_path)
    for embedding in (False, True):
        wanted, gradients = alone(gated(name, embedding), examples, name)
        found, own = told(gated(name, embedding), examples, name, 4, packing)
        assert found == pytest.approx(wanted, rel=1e-6)
        for key, gradient in gradients.items():
            assert float((own[key] - gradient).norm()) <= BOUND * float(gradient.norm()) + 1e-9, key
        other = TaskExamples(examples._examples, TASKS, (2, 4, 1))
        mistaken, _ = told(gated(name, embedding), other, name, 4, packing=False)
        assert abs(mistaken - wanted) > 1e-5, "the task makes no difference, so the test would see nothing"


def test_recomputed_activations_find_the_same_tasks(tmp_path: Path) -> None:
    examples = rows_of("sft", tmp_path)
    wanted, gradients = alone(gated("sft"), examples, "sft")
    model = gated("sft")
    enable_gradient_checkpointing(model)
    found, own = told(model, examples, "sft", 4, False)
    assert found == pytest.approx(wanted, rel=1e-6)
    assert all(torch.allclose(own[key], gradient, atol=1e-7) for key, gradient in gradients.items())


def test_examples_know_their_task(tmp_path: Path) -> None:
    examples = rows_of("sft", tmp_path)
    assert [example.task for example in examples] == ["movies"] * 3 + ["books"] + ["games"] * 3
    assert [example.task for example in examples[2:5]] == ["movies", "books", "games"]
    assert isinstance(examples[-1], Example) and examples[-1].task == "games"
