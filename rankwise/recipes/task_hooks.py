"""Between the steps of a run on several tasks: their losses and shares, the conflict of their gradients, the stages."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

from rankwise import distributed
from rankwise.attach.inject import adapter_parameters, adapter_tensors
from rankwise.recipes.finetune_job import Job, optimizer_of
from rankwise.recipes.output import RunFolder
from rankwise.recipes.processes import is_state_shared
from rankwise.say import Say
from rankwise.tasks.conflict import Conflict
from rankwise.train.loop import Hook, LoopPlan, Step
from rankwise.train.shares import share_state


def task_hooks(job: Job, folder: RunFolder) -> list[Hook]:
    """What follows an evaluation, or a step after which the conflict is measured; nothing without tasks."""
    tasks, progress = job.tasks, job.progress
    if tasks is None:
        return []
    every = job.run.tasks.conflict_every

    def after(step: Step) -> None:
        names = tasks.run.names
        if all(f"valid_loss/{name}" in step.metrics for name in names):
            losses = {name: float(step.metrics[f"valid_loss/{name}"]) for name in names}
            step.metrics |= tasks.run.take_losses(step.number, losses)
        tasks.run.end_of_stage(step.number)
        if every is not None and step.number % every == 0:
            assert tasks.measure is not None
            _note(folder, tasks.run.stage_name(step.number), tasks.measure(step.number))
        progress.tasks = tasks.run.state()

    return [after]


def stage_plans(job: Job, folder: RunFolder, say: Say) -> Iterator[LoopPlan]:
    """The plan up to the end of each stage that is not over, the model made ready for it; without tasks, the run's."""
    tasks, progress = job.tasks, job.progress
    if tasks is None:
        yield job.plan
        return
    for stage in tasks.run.stages:
        if progress.step >= stage.last:
            continue
        if tasks.run.stage != stage:
            tasks.enter(stage, say, lambda found, name=stage.name: _note(folder, name, found))
            job.optimizer = optimizer_of(job.run.train, job.model)
            if is_state_shared(job.run.train, adapter_parameters(job.model)):
                share_state(job.optimizer)
            progress.tasks = tasks.run.state()
            distributed.check_in_step(adapter_tensors(job.model), f"at the start of stage {stage.name}")
        yield dataclasses.replace(job.plan, num_steps=stage.last)
    tasks.leave(say)


def _note(folder: RunFolder, stage: str, found: Conflict) -> None:
    if distributed.is_first():
        folder.conflict.append({"stage": stage, **found.to_dict()})
