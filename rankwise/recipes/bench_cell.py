"""One cell of the quality bench: trained as `rankwise train` trains, then every held-out example's loss.

`adapter` goes through the run's own preparation and loop. `full`, `head` and `base` share its data, batches, loss,
schedule and loop with other parameters: all of the model's, those of a classifier's head, none. Trained weights of the
base are fp32 (Adam's steps vanish in bf16 ones), and where the run says bf16 they compute under autocast.
"""

from __future__ import annotations

import contextlib
import dataclasses
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from rankwise.attach.checkpoint import load_adapter, save_adapter
from rankwise.attach.inject import adapter_parameters
from rankwise.attach.targets import HEADS
from rankwise.bench.kinds import ADAPTER, BASE, FULL
from rankwise.data.example import Example
from rankwise.data.loader import load_examples
from rankwise.errors import RequestError
from rankwise.models.heads import class_losses, correct, head_logits, set_padding
from rankwise.models.load import load_model, new_modules
from rankwise.models.loss import example_losses
from rankwise.recipes.convert_rank import convert_rank
from rankwise.recipes.finetune_data import RunData, load_data
from rankwise.recipes.finetune_job import loop_plan, prepare
from rankwise.recipes.moving_ranks import BeforeSteps
from rankwise.recipes.run import RunConfig
from rankwise.say import silent
from rankwise.train.batches import MicroBatches
from rankwise.train.loop import Progress, fit
from rankwise.train.objective import Objective
from rankwise.train.objectives import minimised, objective_of
from rankwise.train.optimizers import make_optimizer
from rankwise.train.order import RowOrder
from rankwise.train.precision import DTYPES
from rankwise.train.rng import seed_everything

MEASURED_TRAIN_ROWS = 200
"""Training rows, the first of the file, whose loss is measured beside the held-out ones: for the gap."""

MEASURED_BATCH = 16
"""Rows measured at a time. Part of the result: other rows in a batch may round differently."""

OBJECTIVES = ("sft", "text", "classification")
"""Those of which a held-out example has a loss of its own."""

FP32_BYTES = 4


@dataclass(frozen=True)
class Trained:
    """A model after training, and what it cost to hold.

    `computing`: a context in which it is measured as it was trained.
    """

    model: PreTrainedModel
    data: RunData
    num_parameters: int
    stored_bytes: int
    progress: Progress
    computing: Callable[[], contextlib.AbstractContextManager[Any]] = contextlib.nullcontext


def check_cell(run: RunConfig, kind: str) -> None:
    """Raises: RequestError for a run that the bench can't do, or whose result would depend on the machine."""
    if run.train.objective not in OBJECTIVES:
        raise RequestError(f"the bench measures {', '.join(OBJECTIVES)}, not train.objective: {run.train.objective}")
    if run.train.precision not in ("fp32", "bf16"):
        raise RequestError(f"the bench takes train.precision fp32 or bf16, not {run.train.precision}")
    if run.model.device != "cpu" or run.model.is_quantized:
        raise RequestError("the bench takes plain weights on model.device: cpu, where a repeated cell gives the same")
    if run.data.valid is None or run.data.test is None:
        raise RequestError("the bench chooses on data.valid and reports on data.test; give both")
    if kind == "head" and run.train.needs.task_type not in HEADS:
        raise RequestError(
            f"kind: head trains the head of a classifier; train.objective: {run.train.objective} has none"
        )


def run_cell(run: RunConfig, kind: str, cut: int | None = None) -> dict[str, Any]:
    """Trains and measures: `figures`, `losses` and `units` by split, `correct` of classifiers.

    `cut`: the rank that an adapter is cut to before it is measured.

    Raises: RequestError as `check_cell`, `prepare` and `convert_rank`; WorkError when training fails.
    """
    check_cell(run, kind)
    trained = _adapter(run, cut) if kind == ADAPTER else _plain(run, kind)
    return {"figures": _figures(trained), **_measured(trained, run)}


def _figures(trained: Trained) -> dict[str, Any]:
    return {
        "trainable_parameters": trained.num_parameters,
        "adapter_bytes": trained.stored_bytes,
        "steps": trained.progress.step,
        "tokens": trained.progress.num_tokens,
        "trained_tokens": trained.progress.num_trained_tokens,
    }


def _adapter(run: RunConfig, cut: int | None) -> Trained:
    job = prepare(run, None, silent)
    mover, batches, hooks = job.mover, job.batches, []
    if mover is not None:  # ranks that move in the run, as `rankwise train` moves them
        batches = BeforeSteps(job.batches, mover)
        hooks = [lambda step: mover.after(step, job.progress, silent)]
    fit(job.model, job.optimizer, batches, minimised(job.objective, run.train), job.plan, job.progress, hooks)
    with tempfile.TemporaryDirectory() as folder:
        saved = Path(folder) / "adapter"
        save_adapter(job.model, saved)
        if cut is not None:
            saved = Path(convert_rank(str(saved), str(Path(folder) / "cut"), rank=cut)["output"])
            load_adapter(job.model, saved)
        stored = sum(file.stat().st_size for file in saved.glob("*.safetensors"))
    count = sum(parameter.numel() for parameter in adapter_parameters(job.model).values())
    return Trained(job.model, job.data, count, stored, job.progress)


def _plain(run: RunConfig, kind: str) -> Trained:
    """The model itself: every weight trained, or those of its head, or none."""
    data = load_data(run, silent)
    dtype = DTYPES[run.train.precision] if kind == BASE else torch.float32
    seed_everything(run.train.seed)  # as in `prepare`: a new head is drawn while loading, the same for every kind
    model = load_model(run.model, dtype, run.train.needs.task, data.labels)
    if run.train.needs.task_type in HEADS:
        set_padding(model, data.pad_id)
    data.check_fits(model)
    progress = Progress()
    if kind == BASE:
        return Trained(model, data, 0, 0, progress)
    parameters = _trained_parameters(model, run, kind)
    computing = _autocast if run.train.precision == "bf16" else contextlib.nullcontext
    _train(model, parameters, run, data, progress, computing)
    count = sum(parameter.numel() for parameter in parameters.values())
    return Trained(model, data, count, count * FP32_BYTES, progress, computing)


def _trained_parameters(model: PreTrainedModel, run: RunConfig, kind: str) -> dict[str, nn.Parameter]:
    heads = (*HEADS.get(run.train.needs.task_type, ()), *new_modules(model))
    found = {}
    for name, parameter in model.named_parameters():
        is_head = any(f".{head}." in f".{name}" for head in heads)
        parameter.requires_grad_(kind == FULL or is_head)
        if parameter.requires_grad:
            found[name] = parameter
    return found


def _autocast() -> contextlib.AbstractContextManager[Any]:
    return torch.autocast("cpu", torch.bfloat16)


def _train(
    model: PreTrainedModel, parameters: dict[str, nn.Parameter], run: RunConfig, data: RunData, progress: Progress,
    computing: Callable[[], contextlib.AbstractContextManager[Any]],
) -> None:  # fmt: skip
    train = run.train
    objective = objective_of(train)
    order = RowOrder(data.shares, train.batch_size, train.num_rows(data.rows_per_epoch), train.seed)
    batches = MicroBatches(
        objective, data.train.examples, order, train.micro_rows, data.pad_id, run.data.packing is True, model.device
    )
    optimizer = make_optimizer(parameters, train.lr, train.betas, train.weight_decay, train.optimizer)
    seed_everything(train.seed)
    fit(model, optimizer, batches, _inside(minimised(objective, train), computing), loop_plan(run, data), progress)


def _inside(objective: Objective, computing: Callable[[], contextlib.AbstractContextManager[Any]]) -> Objective:
    """The objective, whose losses are computed in a context."""

    def losses(model: PreTrainedModel, batch: Any) -> Tensor:
        with computing():
            return objective.losses(model, batch)

    return dataclasses.replace(objective, losses=losses)


def _measured(trained: Trained, run: RunConfig) -> dict[str, Any]:
    """Each example's mean loss, in nats, and how many trained units it has; of classifiers, whether they are right."""
    data, test = trained.data, run.data.test
    assert data.valid is not None and test is not None
    files = [test] if isinstance(test, str) else list(test)
    layout = run.train.needs.layout
    found = load_examples(files, data.tokenizer, run.data.for_files(files), layout, silent, labels=data.labels)
    splits: dict[str, Sequence[Example]] = {
        "train": [data.train.examples[i] for i in range(min(MEASURED_TRAIN_ROWS, len(data.train.examples)))],
        "valid": data.valid.examples,
        "test": found.examples,
    }
    if data.labels is not None and data.labels.is_multi:
        raise RequestError("the bench takes rows with one label each; these have several")
    result: dict[str, Any] = {"losses": {}, "units": {}, "correct": {}}
    trained.model.eval()
    for name, examples in splits.items():
        with torch.no_grad(), trained.computing():
            result["losses"][name], result["units"][name], right = _each(trained, run, examples)
        if right:
            result["correct"][name] = right
    return result


def _each(trained: Trained, run: RunConfig, examples: Sequence[Example]) -> tuple[list[float], list[int], list[int]]:
    """By example, in their order: mean loss, units, and 1 where a classifier is right."""
    objective = objective_of(run.train)
    is_head = run.train.needs.task_type in HEADS
    losses, units, right = [0.0] * len(examples), [0] * len(examples), [0] * len(examples)
    order = sorted(range(len(examples)), key=lambda i: -len(examples[i].input_ids))
    for start in range(0, len(order), MEASURED_BATCH):
        chosen = order[start : start + MEASURED_BATCH]
        rows = [examples[i] for i in chosen]
        batch = objective.collate(rows, trained.data.pad_id, run.data.packing is True)
        if is_head:
            logits = head_logits(trained.model, batch)
            sums, counts = class_losses(logits, batch), [1] * len(rows)
            for place, value in zip(chosen, correct(logits, batch).tolist(), strict=True):
                right[place] = int(value)
        else:
            sums, counted = example_losses(trained.model, batch)
            counts = counted.tolist()
        for place, total, count in zip(chosen, sums.double().tolist(), counts, strict=True):
            losses[place], units[place] = short(total / count), count
    return losses, units, right if is_head else []


def short(value: float) -> float:
    """The float that the fewest digits of its float32 name: half the size on disk, 7 digits."""
    return float(str(np.float32(value)))
