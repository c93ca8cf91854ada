"""What training a cell costs in floating-point operations, whatever the machine: counted on some steps, not timed.

torch's `FlopCounterMode` sees every product of matrices, also those inside of our own autograd functions, and counts a
multiplication and an addition as two; elementwise work is left out. What it does not know is added: products in place,
and the CPU's attention. The model is made anew and its steps are only counted, so that no result depends on it. A
padded position costs as much as any other, where it is computed.

The counted steps' operations per token read, times the tokens of the run: exact for packed rows of one length, near
enough else. Ranks that move are counted as they begin; growth adds 6 for each token and each parameter that half of the
run has more (2 forward, 4 backward). Of nested ones some steps are counted, each with its own prefix.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count
from transformers import PreTrainedModel

from rankwise.adapters.gate_config import INFERRED
from rankwise.attach.gates import on_task
from rankwise.attach.inject import adapter_parameters
from rankwise.bench.kinds import ADAPTER, BASE, COMBINE, GATE
from rankwise.bench.suite import NewTask
from rankwise.config import build
from rankwise.ranks.config import RESIZING
from rankwise.recipes.bench_cell import plain_job
from rankwise.recipes.bench_cells import Work
from rankwise.recipes.bench_of_all import new_batches, prompts_of, router_rows, run_on_all, task_of
from rankwise.recipes.finetune_job import Job, prepare
from rankwise.recipes.run import RunConfig, read_run
from rankwise.recipes.task_setup import rehearse
from rankwise.recipes.task_stages import set_way
from rankwise.say import silent
from rankwise.tasks.new_task import add_task
from rankwise.tasks.router import states_of
from rankwise.train.objective import MicroBatch, Objective
from rankwise.train.objectives import minimised, objective_of

NESTED_STEPS = 4
"""Counted of a nested run, whose steps differ."""

ROUTER_SAMPLE = 32
"""Rows of each task that are counted of those that a classifier of tasks reads."""

PER_PARAMETER = 6
"""Operations for a token and a parameter of a product of matrices: 2 forward, 2 each for the two gradients."""

Shape = Sequence[int]


def _product(total: Shape, one: Shape, other: Shape, *_: object, **__: object) -> int:
    """Of `total += one @ other`."""
    return 2 * math.prod(one) * other[-1]


def _attention(query: Shape, key: Shape, value: Shape, *_: object, **__: object) -> int:
    return sdpa_flop_count(query, key, value)


def _attention_backward(upstream: Shape, query: Shape, key: Shape, value: Shape, *_: object, **__: object) -> int:
    return sdpa_backward_flop_count(upstream, query, key, value)


aten = torch.ops.aten
MISSING = {
    aten.addmm_: _product,
    aten.baddbmm_: _product,
    aten._scaled_dot_product_flash_attention_for_cpu: _attention,
    aten._scaled_dot_product_flash_attention_for_cpu_backward: _attention_backward,
}
"""What torch's counter leaves out; its functions are given shapes."""


def counted_flops(work: Callable[[], object]) -> int:
    """The floating-point operations of matrix products in `work`, which is called once."""
    with FlopCounterMode(display=False, custom_mapping=MISSING) as counter:
        work()
    return counter.get_total_flops()


def step_flops(model: PreTrainedModel, objective: Objective, batch: MicroBatch) -> int:
    """Of a forward and backward pass of one micro batch. Gradients are left as they come, nothing is updated."""
    model.train()
    return counted_flops(lambda: objective.losses(model, batch).sum().backward())


def training_flops(run: RunConfig, kind: str, figures: Mapping[str, Any], cut: int | None = None) -> int | None:
    """Of all steps of a cell on one task; None where ranks have grown and it can't be known how far.

    Args:
        run: as of `rankwise.recipes.bench_cell.run_cell`.
        kind: likewise.
        figures: the cell's `tokens` and `trainable_parameters`.
        cut: the rank that the adapter was cut to, after which the parameters do not tell how it was trained.
    """
    if kind == BASE:
        return 0
    if run.ranks.policy in RESIZING and cut is not None:
        return None
    tokens = figures["tokens"]
    if kind != ADAPTER:
        plain = plain_job(run, kind)
        rehearse(plain.model, plain.minimised, plain.batches)  # what is proven on a first batch is not counted
        batch = plain.batches.first(1)
        return round(step_flops(plain.model, plain.minimised, batch) / batch.num_tokens * tokens)
    job = prepare(run, None, silent)
    objective, batch = minimised(job.objective, run.train), job.batches.first(1)
    counts = []
    for step in range(1, (NESTED_STEPS if run.ranks.policy == "nested" else 1) + 1):
        if run.ranks.policy == "nested" and job.mover is not None:
            job.mover.before(step)
        counts.append(step_flops(job.model, objective, batch))
    found = sum(counts) / len(counts) / batch.num_tokens * tokens
    if run.ranks.policy in RESIZING:
        at_start = sum(parameter.numel() for parameter in adapter_parameters(job.model).values())
        found += PER_PARAMETER * tokens * (figures["trainable_parameters"] - at_start) / 2
    return round(found)


def flops_of_all(work: Work, figures: Mapping[str, Any]) -> int:
    """Of a cell on all tasks: its own steps, and what a classifier of tasks reads; not the adapters it begins with.

    Each stage is counted on its first step, and stands for its share of the run's tokens.
    """
    if work.kind == COMBINE:
        return 0
    if work.kind == GATE:
        return round(_router_flops(work)) if work.settings["gate"]["mode"] == INFERRED else 0
    job = prepare(run_on_all(work), None, silent)
    tasks = job.tasks
    assert tasks is not None
    objective, total = minimised(job.objective, job.run.train), 0.0
    for stage in tasks.run.stages:
        tasks.enter(stage, silent, lambda found: None)
        batch = job.batches.first(stage.first)
        tokens = figures["tokens"] * stage.num_steps / figures["steps"]
        total += step_flops(job.model, objective, batch) / batch.num_tokens * tokens
        job.model.zero_grad(set_to_none=True)
    gating = job.run.tasks.gating
    if gating is not None and gating.mode == INFERRED:
        total += _router_flops(work)
    if (settings := work.settings.get("new_task")) is not None:
        total += _vector_flops(job, work, build(NewTask, settings, "new_task"), figures["new_task_tokens"])
    return round(total)


def _vector_flops(job: Job, work: Work, settings: NewTask, tokens: int) -> float:
    name = list(work.runs)[-1]
    task = task_of(name, read_run(work.runs[name]))
    batch = new_batches(job, settings, task).first(1)
    set_way(job.model, None)
    add_task(job.model, name)
    with on_task(job.model, name):
        found = step_flops(job.model, minimised(objective_of(task.run.train), task.run.train), batch)
    return found / batch.num_tokens * tokens


def _router_flops(work: Work) -> float:
    """A pass of the base over the rows that the classifier is fitted to, counted on some of each task."""
    total = 0.0
    tasks = [task_of(name, read_run(document)) for name, document in work.runs.items()]
    model = plain_job(tasks[0].run, BASE).model
    for task in tasks:
        prompts = prompts_of(router_rows(task))
        some = prompts[:ROUTER_SAMPLE]
        found = counted_flops(lambda some=some, pad_id=task.data.pad_id: states_of(model, some, pad_id))
        total += found / sum(map(len, some)) * sum(map(len, prompts))
    return total
