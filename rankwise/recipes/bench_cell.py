"""One cell of the quality bench: trained as `rankwise train` trains, then every held-out example's loss.

`adapter` goes through the run's own preparation and loop. `full`, `head` and `base` share its data, batches, loss,
schedule and loop with other parameters: all of the model's, those of a classifier's head, none. Trained weights of the
base are fp32 (Adam's steps vanish in bf16 ones), and where the run says bf16 they compute under autocast.
"""

from __future__ import annotations

import contextlib
import dataclasses
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from rankwise.attach.checkpoint import load_adapter, save_adapter
from rankwise.attach.inject import adapter_parameters
from rankwise.attach.targets import HEADS
from rankwise.bench.kinds import ADAPTER, BASE, FULL
from rankwise.errors import RequestError
from rankwise.models.heads import set_padding
from rankwise.models.load import load_model, new_modules
from rankwise.recipes.bench_measure import Computing, measured
from rankwise.recipes.convert_rank import convert_rank
from rankwise.recipes.finetune_data import RunData, load_data
from rankwise.recipes.finetune_job import Job, loop_plan, prepare
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
    computing: Computing = contextlib.nullcontext


Look = Callable[[Trained], dict[str, Any]]


@dataclass(frozen=True)
class PlainJob:
    """A model without adapters, its parameters that are trained, and its batches. `computing`: as in `Trained`."""

    model: PreTrainedModel
    data: RunData
    parameters: dict[str, nn.Parameter]
    batches: MicroBatches
    minimised: Objective
    computing: Computing


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


def run_cell(
    run: RunConfig, kind: str, cut: int | None = None, keep: Path | None = None, look: Look | None = None
) -> dict[str, Any]:
    """Trains and measures: `figures`, `losses` and `units` by split, `correct` of classifiers, what `look` gives.

    Args:
        run: a run file's, as `check_cell` takes it.
        kind: what is trained, a key of `rankwise.bench.kinds.KINDS` that is of one task.
        cut: the rank that an adapter is cut to before it is measured.
        keep: the folder, which is not there yet, that an adapter is left in; None: it is not kept.
        look: called with what was trained, after all that decides a loss.

    Raises: RequestError as `check_cell`, `prepare` and `convert_rank`; WorkError when training fails.
    """
    check_cell(run, kind)
    trained = _adapter(run, cut) if kind == ADAPTER else _plain(run, kind)
    if keep is not None:
        save_adapter(trained.model, keep)
    found = {"figures": _figures(trained), **measured(trained.model, trained.data, run, trained.computing)}
    return found | ({} if look is None else look(trained))


def _figures(trained: Trained) -> dict[str, Any]:
    return {
        "trainable_parameters": trained.num_parameters,
        "adapter_bytes": trained.stored_bytes,
        "steps": trained.progress.step,
        "tokens": trained.progress.num_tokens,
        "trained_tokens": trained.progress.num_trained_tokens,
    }


def train_adapter(run: RunConfig) -> Job:
    """The run of an adapter, to its end."""
    job = prepare(run, None, silent)
    mover, batches, hooks = job.mover, job.batches, []
    if mover is not None:  # ranks that move in the run, as `rankwise train` moves them
        batches = BeforeSteps(job.batches, mover)
        hooks = [lambda step: mover.after(step, job.progress, silent)]
    fit(job.model, job.optimizer, batches, minimised(job.objective, run.train), job.plan, job.progress, hooks)
    return job


def _adapter(run: RunConfig, cut: int | None) -> Trained:
    job = train_adapter(run)
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
    plain = plain_job(run, kind)
    progress, parameters, train = Progress(), plain.parameters, run.train
    if kind != BASE:
        optimizer = make_optimizer(parameters, train.lr, train.betas, train.weight_decay, train.optimizer)
        seed_everything(train.seed)
        fit(plain.model, optimizer, plain.batches, plain.minimised, loop_plan(run, plain.data), progress)
    count = sum(parameter.numel() for parameter in parameters.values())
    return Trained(plain.model, plain.data, count, count * FP32_BYTES, progress, plain.computing)


def plain_job(run: RunConfig, kind: str) -> PlainJob:
    """The model and what it is trained on, before the first step."""
    data = load_data(run, silent)
    dtype = DTYPES[run.train.precision] if kind == BASE else torch.float32
    seed_everything(run.train.seed)  # as in `prepare`: a new head is drawn while loading, the same for every kind
    model = load_model(run.model, dtype, run.train.needs.task, data.labels)
    if run.train.needs.task_type in HEADS:
        set_padding(model, data.pad_id)
    data.check_fits(model)
    parameters = {} if kind == BASE else _trained_parameters(model, run, kind)
    computing = _autocast if run.train.precision == "bf16" and kind != BASE else contextlib.nullcontext
    objective, train = objective_of(run.train), run.train
    order = RowOrder(data.shares, train.batch_size, train.num_rows(data.rows_per_epoch), train.seed)
    batches = MicroBatches(
        objective, data.train.examples, order, train.micro_rows, data.pad_id, run.data.packing is True, model.device
    )
    return PlainJob(model, data, parameters, batches, _inside(minimised(objective, train), computing), computing)


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


def _inside(objective: Objective, computing: Computing) -> Objective:
    """The objective, whose losses are computed in a context."""

    def losses(model: PreTrainedModel, batch: Any) -> Tensor:
        with computing():
            return objective.losses(model, batch)

    return dataclasses.replace(objective, losses=losses)
