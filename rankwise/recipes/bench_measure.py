"""What the quality bench measures of a trained model: the loss of each example of a task, in the order of its file."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedModel

from rankwise.attach.targets import HEADS
from rankwise.data.example import Example
from rankwise.data.loader import load_examples
from rankwise.errors import RequestError
from rankwise.models.heads import class_losses, correct, head_logits
from rankwise.models.loss import example_losses
from rankwise.recipes.finetune_data import RunData
from rankwise.recipes.run import RunConfig
from rankwise.say import silent
from rankwise.train.objectives import objective_of

MEASURED_TRAIN_ROWS = 200
"""Training rows, the first of the file, whose loss is measured beside the held-out ones: for the gap."""

MEASURED_BATCH = 16
"""Rows measured at a time. Part of the result: other rows in a batch may round differently."""

TRAIN, VALID, TEST = "train", "valid", "test"

Computing = Callable[[], contextlib.AbstractContextManager[Any]]
"""A context in which a model is measured."""


@dataclass(frozen=True)
class Found:
    """By example, in their order: mean loss in nats, trained units, and of classifiers 1 where they are right."""

    losses: list[float]
    units: list[int]
    correct: list[int]


def examples_of(data: RunData, run: RunConfig) -> dict[str, Sequence[Example]]:
    """The rows that are measured, by split: the first training rows, those of `data.valid` and of `data.test`.

    Raises: RequestError for rows with several labels each.
    """
    test = run.data.test
    assert data.valid is not None and test is not None
    if data.labels is not None and data.labels.is_multi:
        raise RequestError("the bench takes rows with one label each; these have several")
    files = [test] if isinstance(test, str) else list(test)
    layout = run.train.needs.layout
    found = load_examples(files, data.tokenizer, run.data.for_files(files), layout, silent, labels=data.labels)
    return {
        TRAIN: [data.train.examples[i] for i in range(min(MEASURED_TRAIN_ROWS, len(data.train.examples)))],
        VALID: data.valid.examples,
        TEST: found.examples,
    }


def measured(
    model: PreTrainedModel, data: RunData, run: RunConfig, computing: Computing = contextlib.nullcontext
) -> dict[str, Any]:
    """`losses`, `units` and, of classifiers, `correct`: each a list by split. The model is in evaluation mode then."""
    result: dict[str, Any] = {"losses": {}, "units": {}, "correct": {}}
    for name, examples in examples_of(data, run).items():
        with computing():
            found = each_loss(model, run, data.pad_id, examples)
        result["losses"][name], result["units"][name] = found.losses, found.units
        if found.correct:
            result["correct"][name] = found.correct
    return result


@torch.no_grad()
def each_loss(model: PreTrainedModel, run: RunConfig, pad_id: int, examples: Sequence[Example]) -> Found:
    """Of each example, as it is alone: what is beside it in a batch does not count, but for rounding."""
    model.eval()
    objective = objective_of(run.train)
    is_head = run.train.needs.task_type in HEADS
    losses, units, right = [0.0] * len(examples), [0] * len(examples), [0] * len(examples)
    order = sorted(range(len(examples)), key=lambda i: -len(examples[i].input_ids))
    for start in range(0, len(order), MEASURED_BATCH):
        chosen = order[start : start + MEASURED_BATCH]
        rows = [examples[i] for i in chosen]
        batch = objective.collate(rows, pad_id, run.data.packing is True)
        if is_head:
            logits = head_logits(model, batch)
            sums, counts = class_losses(logits, batch), [1] * len(rows)
            for place, value in zip(chosen, correct(logits, batch).tolist(), strict=True):
                right[place] = int(value)
        else:
            sums, counted = example_losses(model, batch)
            counts = counted.tolist()
        for place, total, count in zip(chosen, sums.double().tolist(), counts, strict=True):
            losses[place], units[place] = short(total / count), count
    return Found(losses, units, right if is_head else [])


def short(value: float) -> float:
    """The float that the fewest digits of its float32 name: half the size on disk, 7 digits."""
    return float(str(np.float32(value)))
