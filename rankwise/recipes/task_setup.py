"""The tasks of a run as it is prepared: their adapters where they begin with some, and the stage that the run is in."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from itertools import accumulate, pairwise
from pathlib import Path

import torch
from transformers import PreTrainedModel

from rankwise.adapters.gate_config import INFERRED
from rankwise.attach.attachment import need_attachment
from rankwise.attach.bases import check_bases, weight_hashes
from rankwise.attach.gates import Part, taken_out
from rankwise.attach.inject import attach, detach
from rankwise.data.example import Example
from rankwise.data.packing import epoch_order
from rankwise.data.tasked import TaskExamples
from rankwise.errors import RequestError
from rankwise.recipes.finetune_data import RunData
from rankwise.recipes.provenance import model_hashes
from rankwise.recipes.run import RunConfig
from rankwise.recipes.task_conflict import STREAM, ConflictMeter
from rankwise.recipes.task_layers import Beginning
from rankwise.recipes.task_run import TaskRun
from rankwise.recipes.task_stages import TaskStages
from rankwise.say import Say
from rankwise.train.batches import MicroBatches
from rankwise.train.objective import Objective
from rankwise.train.rng import untouched
from rankwise.train.state import Checkpoint

MOST_ROUTED = 500
"""Rows of each task that an inferred gate's classifier learns from, at most."""


def tasks_of_run(run: RunConfig, model: PreTrainedModel, data: RunData, say: Say) -> TaskStages | None:
    """The tasks and stages of a run whose plain adapter is attached; None for a run without tasks.

    Raises: RequestError for stages that don't fit the run's length, or adapters that don't fit the model.
    """
    if not run.tasks.data:
        return None
    if run.tasks.drawn.by == "behind" and data.valid is None:
        raise RequestError(
            "tasks.sampling.by: behind reads validation losses, and there are no validation rows; give the tasks valid "
            "files"
        )
    gating = run.tasks.gating
    few = next((n for n, size in zip(run.tasks.names, data.training.sizes, strict=True) if size < 2), None)
    if gating is not None and gating.mode == INFERRED and few is not None:
        raise RequestError(
            f"tasks.gate.mode inferred: task '{few}' has one row, and the classifier of tasks needs two or more "
            "of each; give it more, or use hard"
        )
    standing = TaskRun(run, data.training.sizes)
    given = None
    if run.tasks.adapters is not None:
        given = _given_adapters(run, model, say)
    return TaskStages(standing, model, given)


def begin_tasks(
    tasks: TaskStages, run: RunConfig, batches: MicroBatches, data: RunData, checkpoint: Checkpoint | None
) -> None:
    """Puts the tasks where a checkpoint left them, or at the run's start, once every stage has been tried.

    Raises: RequestError for a stage that the model can't have.
    """
    objective = batches.objective
    rows = _rows_by_task(data)
    tasks.pad_id = data.pad_id
    tasks.prompts = {name: partial(_prompts, own, run.train.seed) for name, own in rows.items()}
    if run.tasks.measures_conflict:
        layout = run.train.micro_rows, data.pad_id, run.data.packing is True
        tasks.measure = ConflictMeter(
            tasks.model, objective, rows, run.tasks.rows_for_conflict, layout, run.train.seed, tasks.together
        ).measure
    if checkpoint is not None:
        tasks.run.restore(checkpoint.progress.tasks)
        tasks.resume()
    else:
        tasks.rehearse(lambda: rehearse(tasks.model, objective, batches))


def rehearse(model: PreTrainedModel, objective: Objective, batches: MicroBatches) -> None:
    """One forward without gradients: what can't work (packing, a row too long) shows before anything is written.

    The numeric checks that the loss and the packing make of a model are done here too, once, outside of the run.
    """
    batch = batches.first(1)
    if objective.count(batch):
        with untouched(model, model.device):
            objective.losses(model, batch)
    objective.meter.pour({})  # no figure of the rehearsal goes into the run's


def _rows_by_task(data: RunData) -> dict[str, TaskExamples]:
    """The training rows of each task; none is read for it."""
    bounds = pairwise(accumulate(data.training.sizes, initial=0))
    examples = data.train.examples
    return {
        name: TaskExamples(examples[start:end], (name,), (end - start,))
        for name, (start, end) in zip(data.tasks, bounds, strict=True)
    }


def _prompts(rows: Sequence[Example], seed: int) -> list[Sequence[int]]:
    """What is read of some rows before an answer; of plain text the whole row."""
    chosen = [rows[int(row)] for row in epoch_order(len(rows), seed, 0, STREAM)[:MOST_ROUTED]]
    return [example.prompt_ids or example.input_ids for example in chosen]


def _given_adapters(run: RunConfig, model: PreTrainedModel, say: Say) -> dict[str, Part]:
    """The adapter that each task begins with. The plain one is attached again after them.

    Raises: RequestError for one of another base, of other layers, or that can't be one of several.
    """
    assert run.tasks.adapters is not None
    beginning = Beginning.of(model)
    check_bases(run.tasks.adapters, lambda: weight_hashes(model_hashes(model, run.model.revision)), say)
    detach(model)
    found: dict[str, Part] = {}
    for name in run.tasks.names:
        folder = Path(run.tasks.adapters[name])
        part = taken_out(model, folder, name)
        if part.factors.keys() != beginning.ranks.keys():
            other = next(iter(part.factors.keys() ^ beginning.ranks.keys()))
            which = f"'{name}' adapts" if other in part.factors else f"'{name}' does not adapt"
            raise RequestError(
                f"tasks.adapters: {which} the layer '{other}', unlike the first of them; adapters of one run need the "
                "same layers (ranks may differ)"
            )
        if part.head != beginning.head:
            raise RequestError(
                f"tasks.adapters: the head of '{name}' means other labels ({part.head}) than the run's data "
                f"({beginning.head}); use adapters that were trained for the same labels"
            )
        found[name] = part
    attach(model, beginning.config, generator=torch.Generator().manual_seed(run.train.seed))
    need_attachment(model).head = beginning.head
    return found
