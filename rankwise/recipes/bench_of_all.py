"""One cell of the quality bench on all tasks of its suite, with every held-out example's loss for each of them.

`tasks` goes through the preparation, stages and loop of a run on several tasks. `combine` and `gate` train nothing:
they are made of the adapters of single tasks, which are cells of their own; where such an adapter is not kept, it is
trained again, to the same bits. What is measured of a task are the rows that a cell on it alone measures, in the
same order. The task of each row is given, but to a gate that infers it, and to one plain adapter, which takes none.

Losses are named `TASK/SPLIT`. Beside train, valid and test there are `test-own`, after the first stage that trained
the task, where others followed; and `test-before`, of a new task before its vector was learned.
"""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout
from torch import Tensor
from transformers import PreTrainedModel

from rankwise.adapters.gate_config import INFERRED, GateConfig
from rankwise.attach.attachment import attachment_of
from rankwise.attach.checkpoint import load_adapter, save_adapter
from rankwise.attach.gates import attach_gate, mixture_of, on_task
from rankwise.attach.inject import adapter_parameters
from rankwise.bench.kinds import BASE, GATE, TASKS
from rankwise.bench.suite import NewTask
from rankwise.config import build
from rankwise.data.example import Example
from rankwise.errors import RequestError
from rankwise.recipes.bench_cell import check_cell, plain_job, train_adapter
from rankwise.recipes.bench_cells import Source, Work
from rankwise.recipes.bench_measure import TEST, Found, each_loss, examples_of
from rankwise.recipes.combine import CombineConfig, combine
from rankwise.recipes.finetune_data import RunData, load_data
from rankwise.recipes.finetune_job import Job, prepare
from rankwise.recipes.output import RunFolder
from rankwise.recipes.run import RunConfig, read_run
from rankwise.recipes.task_hooks import stage_plans
from rankwise.say import silent
from rankwise.tasks.config import BEHIND
from rankwise.tasks.new_task import learn_task
from rankwise.tasks.router import fit_router, inferred_tasks
from rankwise.tasks.schedule import stage_at
from rankwise.train.batches import MicroBatches
from rankwise.train.loop import Progress, fit
from rankwise.train.objectives import minimised, objective_of
from rankwise.train.order import RowOrder, Share

OWN, BEFORE = "test-own", "test-before"

ROUTER_ROWS = 500
"""Training rows of each task, the first of its file, that the classifier of a gate is fitted to."""


@dataclass(frozen=True)
class Task:
    """A task as it is measured: its own run, its data, and its rows by split."""

    name: str
    run: RunConfig
    data: RunData
    rows: Mapping[str, Sequence[Example]]


@dataclass
class Results:
    """What has been measured so far, by `TASK/SPLIT`; `routed`: 1 where the task of a row was found."""

    losses: dict[str, list[float]] = field(default_factory=dict)
    units: dict[str, list[int]] = field(default_factory=dict)
    correct: dict[str, list[int]] = field(default_factory=dict)
    routed: dict[str, list[int]] = field(default_factory=dict)

    def add(self, key: str, found: Found) -> None:
        """Takes what was found of some rows in."""
        self.losses[key], self.units[key] = found.losses, found.units
        if found.correct:
            self.correct[key] = found.correct

    def to_dict(self) -> dict[str, Any]:
        """As a cell holds it."""
        routed = {"routed": self.routed} if self.routed else {}
        return {"losses": self.losses, "units": self.units, "correct": self.correct, **routed}


def find_sources(work: Work) -> None:
    """Trains the adapters that the work begins with, those that are not kept. Raises: as `prepare` and `fit`.

    Those that another worker is making come last, so that two workers with the same sources share the work.
    """
    waiting = [source for source in work.sources.values() if not _find(source, is_patient=False)]
    for source in waiting:
        _find(source, is_patient=True)


def _find(source: Source, is_patient: bool) -> bool:
    """Whether its adapter is there now: False only where another worker is making it, and this is not patient."""
    folder = Path(source.folder)
    folder.parent.mkdir(parents=True, exist_ok=True)
    lock = FileLock(f"{folder}.lock")
    try:
        held = lock.acquire(blocking=is_patient)
    except Timeout:
        return False
    with held:
        if not folder.exists():
            save_adapter(train_adapter(read_run(source.document)).model, folder)
    return True


def run_of_all(work: Work) -> dict[str, Any]:
    """Makes the cell's adapters and measures them on each task: `figures`, and what `Results` holds.

    The adapters that it begins with are there (see `find_sources`).

    Raises: RequestError for work that the bench can't do; WorkError when training fails.
    """
    tasks = [task_of(name, read_run(document)) for name, document in work.runs.items()]
    results = Results()
    if work.kind == TASKS:
        model, figures = _trained(work, tasks, results)
    else:
        model, figures = _made(work, tasks), {"steps": 0, "tokens": 0, "trained_tokens": 0}
    is_inferred = infers(model)
    for task in tasks:
        for split, rows in task.rows.items():
            if is_inferred:
                _measure_inferred(model, task, split, rows, results)
                continue
            with given(model, task.name):
                results.add(f"{task.name}/{split}", each_loss(model, task.run, task.data.pad_id, rows))
    count = sum(parameter.numel() for parameter in adapter_parameters(model).values())
    sizes = {"trainable_parameters": count, "adapter_bytes": _stored_bytes(model)}
    return {"figures": sizes | figures, **results.to_dict()}


def task_of(name: str, run: RunConfig) -> Task:
    """The task with its rows. Raises: RequestError for what the bench can't measure."""
    check_cell(run, BASE)
    data = load_data(run, silent)
    return Task(name, run, data, examples_of(data, run))


def infers(model: PreTrainedModel) -> bool:
    """Whether the attached gate finds the task of a row by itself."""
    attachment = attachment_of(model)
    mixture = None if attachment is None else attachment.mixture
    return mixture is not None and mixture.gate is not None and mixture.gate.mode == INFERRED


@contextlib.contextmanager
def given(model: PreTrainedModel, task: str) -> Iterator[None]:
    """In the block all rows are of this task, where the model's adapters depend on it: a learned mixture does not."""
    attachment = attachment_of(model)
    mixture = None if attachment is None else attachment.mixture
    if mixture is None or (mixture.gate is not None and mixture.is_static):
        yield
        return
    with on_task(model, task):
        yield


def _measure_inferred(
    model: PreTrainedModel, task: Task, split: str, rows: Sequence[Example], results: Results
) -> None:
    """Each row through the adapter of the task that the classifier finds for its prompt."""
    names = mixture_of(model).tasks
    numbers = inferred_tasks(model, prompts_of(rows), task.data.pad_id).tolist()
    found = Found([0.0] * len(rows), [0] * len(rows), [0] * len(rows))
    is_head = False
    for number, name in enumerate(names):
        places = [place for place, other in enumerate(numbers) if other == number]
        if not places:
            continue
        with on_task(model, name):
            part = each_loss(model, task.run, task.data.pad_id, [rows[place] for place in places])
        is_head = bool(part.correct)
        for index, place in enumerate(places):
            found.losses[place], found.units[place] = part.losses[index], part.units[index]
            if is_head:
                found.correct[place] = part.correct[index]
    key = f"{task.name}/{split}"
    results.add(key, found if is_head else Found(found.losses, found.units, []))
    results.routed[key] = [int(names[number] == task.name) for number in numbers]


def prompts_of(rows: Sequence[Example]) -> list[Sequence[int]]:
    """What is read of rows before an answer; of a text without one, the whole."""
    return [row.prompt_ids or row.input_ids for row in rows]


# --- made of single adapters -----------------------------------------------------------------------------------------


def _made(work: Work, tasks: Sequence[Task]) -> PreTrainedModel:
    """The base with the adapters combined into one, or under a gate."""
    first = tasks[0]
    model = plain_job(first.run, BASE).model
    folders = {name: source.folder for name, source in work.sources.items()}
    if work.kind == GATE:
        gate = build(GateConfig, work.settings["gate"], "gate")
        attach_gate(model, folders, gate)
        if gate.mode == INFERRED:
            prompts = {task.name: prompts_of(router_rows(task)) for task in tasks}
            fit_router(model, prompts, first.data.pad_id, first.run.train.seed)
        return model
    settings = dict(work.settings["combine"])
    method, weights = settings.pop("method"), settings.pop("weights", None)
    with tempfile.TemporaryDirectory() as place:
        out = Path(place) / "combined"
        config = build(CombineConfig, settings, "combine")
        combine(list(folders.values()), out, method, weights, config)
        load_adapter(model, out)
    return model


def router_rows(task: Task) -> list[Example]:
    """Those that a classifier of tasks is fitted to."""
    examples = task.data.train.examples
    return [examples[i] for i in range(min(ROUTER_ROWS, len(examples)))]


def _stored_bytes(model: PreTrainedModel) -> int:
    with tempfile.TemporaryDirectory() as place:
        save_adapter(model, Path(place) / "adapter")
        return sum(file.stat().st_size for file in Path(place).rglob("*.safetensors"))


# --- trained on several tasks ----------------------------------------------------------------------------------------


def run_on_all(work: Work) -> RunConfig:
    """The run on several tasks, with the adapters that it begins with.

    Raises: RequestError for settings of it that change nothing in the bench, or need evaluations while training.
    """
    document = {name: section for name, section in work.document.items() if name != "adapter" or not work.sources}
    if work.sources:
        adapters = {name: source.folder for name, source in work.sources.items()}
        document["tasks"] = {**document["tasks"], "adapters": adapters}
    run = read_run(document)
    if run.tasks.drawn.by == BEHIND:
        raise RequestError("the bench evaluates after training only, and tasks.sampling.by: behind needs it before")
    if run.tasks.conflict_every is not None:
        raise RequestError("tasks.conflict_every has no effect in the bench, which keeps no conflicts; leave it out")
    return run


def _trained(work: Work, tasks: Sequence[Task], results: Results) -> tuple[PreTrainedModel, dict[str, Any]]:
    job = prepare(run_on_all(work), None, silent)
    by_name = {task.name: task for task in tasks}
    _check_labels(job, tasks)
    with tempfile.TemporaryDirectory() as place:
        _fit(job, RunFolder(Path(place)), by_name, results)
    progress = job.progress
    figures = {
        "steps": progress.step, "tokens": progress.num_tokens, "trained_tokens": progress.num_trained_tokens,
        "trained_parameters": sum(one.numel() for one in adapter_parameters(job.model).values() if one.requires_grad),
    }  # fmt: skip
    if (settings := work.settings.get("new_task")) is not None:
        figures |= _learn(job, build(NewTask, settings, "new_task"), tasks[-1], results)
    return job.model, figures


def _check_labels(job: Job, tasks: Sequence[Task]) -> None:
    for task in tasks:
        if task.data.labels != job.data.labels:
            raise RequestError(f"task '{task.name}' has other labels than all tasks together; give all the same")


def _fit(job: Job, folder: RunFolder, tasks: Mapping[str, Task], results: Results) -> None:
    """Trains all stages; after each, measures the tasks of which it was the first, where others follow."""
    standing = job.tasks
    assert standing is not None
    objective, stages, seen = minimised(job.objective, job.run.train), standing.run.stages, set[str]()
    for plan in stage_plans(job, folder, silent):
        fit(job.model, job.optimizer, job.batches, objective, plan, job.progress)
        standing.run.end_of_stage(job.progress.step)
        stage = stage_at(stages, job.progress.step)
        own = [name for name in stage.tasks if name not in seen]
        seen.update(own)
        if stage is stages[-1]:
            continue
        for name in own:
            task = tasks[name]
            with standing.on(name):
                found = each_loss(job.model, task.run, task.data.pad_id, task.rows[TEST])
            results.add(f"{name}/{OWN}", found)


def _learn(job: Job, settings: NewTask, task: Task, results: Results) -> dict[str, Any]:
    """Measures the new task with the mean of the others' vectors, then learns its own from few rows."""
    model, batch_of = job.model, new_batches(job, settings, task)
    others = mixture_of(model).tasks
    with on_task(model, dict.fromkeys(others, 1 / len(others))):
        found = each_loss(model, task.run, task.data.pad_id, task.rows[TEST])
    results.add(f"{task.name}/{BEFORE}", found)
    objective, progress = minimised(objective_of(task.run.train), task.run.train), Progress()
    model.train()

    def loss(step: int) -> Tensor:
        total, count = [], 0
        for batch in batch_of(step):
            total.append(objective.losses(model, batch).sum())
            count += batch.num_trained
            progress.num_tokens += batch.num_tokens
        return sum(total[1:], total[0]) / count

    learned = learn_task(model, task.name, loss, settings.steps, settings.lr)
    return {
        "new_task_parameters": learned.parameters, "new_task_tokens": progress.num_tokens,
        "new_task_steps": settings.steps,
    }  # fmt: skip


def new_batches(job: Job, settings: NewTask, task: Task) -> MicroBatches:
    """Passes over the new task's first rows, in an order that the seed gives."""
    examples, train = task.data.train.examples, task.run.train
    if len(examples) < settings.rows:
        raise RequestError(f"new_task.rows ({settings.rows}) is more than '{task.name}' has ({len(examples)})")
    order = RowOrder(
        [Share(settings.rows, settings.rows)], train.batch_size, settings.steps * train.batch_size, train.seed
    )
    rows, packing = [examples[i] for i in range(settings.rows)], task.run.data.packing is True
    objective = objective_of(train)
    return MicroBatches(objective, rows, order, train.micro_rows, task.data.pad_id, packing, job.model.device)
