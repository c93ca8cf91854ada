"""Evaluate on several tasks: a gate beside its single adapters, their mean and one joint adapter, on all tasks' rows.

Each target has a loss on each task; of these the mean, each task counting once, and the worst. Forgetting is the loss
of the gate on a task less a reference of before (Chaudhry et al. 2018, arXiv 1801.10112, definition 3, with losses):
the lowest at the end of an earlier stage of the run, or what another run or evaluation recorded.
"""

from __future__ import annotations

import dataclasses
import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rankwise import distributed
from rankwise.attach.bases import check_bases, weight_hashes
from rankwise.attach.checkpoint import load_adapter
from rankwise.data.loader import load_examples
from rankwise.errors import RequestError, did_you_mean
from rankwise.evaluate.answers import check_metrics
from rankwise.files import read_json_object
from rankwise.recipes.evaluate import Exam, grade, grade_views, make_exam, measured_objective
from rankwise.recipes.evaluate_config import EvaluateConfig
from rankwise.recipes.evaluate_heads import (
    check_head_metrics,
    head_figures,
    head_objective,
    head_views,
    is_head,
    load_head_rows,
)
from rankwise.recipes.names import SUMMARY_FILE
from rankwise.recipes.provenance import model_hashes
from rankwise.recipes.target import (
    Opened,
    Target,
    find_adapter,
    find_target,
    open_target,
    target_head,
    target_tokenizer,
)
from rankwise.say import to_stderr

JOINT = "joint"
LOSS_ALONE = ("loss",)


@dataclass(frozen=True)
class TaskRows:
    """One task's rows, ready to be measured: an exam of text, or a head's examples."""

    task: str
    file: str | list[str]
    rows: Exam | list[Any]
    truncated: int

    @property
    def num_rows(self) -> int:
        """How many they are."""
        return len(self.rows.examples) if isinstance(self.rows, Exam) else len(self.rows)


@dataclass(frozen=True)
class Beside:
    """What a gate is compared with.

    Args:
        files: by task; empty: the run's own valid files.
        joint: a run or folder of one adapter for all tasks, measured beside.
        reference: a run's folder, its summary.json or an earlier document, whose losses are compared with.
    """

    files: Mapping[str, str] = field(default_factory=dict)
    joint: str | None = None
    reference: str | None = None


def evaluate_tasks(
    name: str,
    config: EvaluateConfig,
    beside: Beside,
    base: str | None = None,
    device: str = "auto",
    progress: bool = False,
) -> dict[str, Any]:
    """The document of `rankwise evaluate --tasks`.

    Args:
        name: a run or folder of several adapters under a gate, or of task embeddings.
        config: without `data`, `task` and `copy`.
        beside: the tasks' files, and what else is measured.
        base: in place of the model that the adapters name.
        device: as of a model.
        progress: whether bars are shown on stderr.

    Raises: RequestError for a target, file or adapter that can't be used.
    """
    with distributed.joined():
        return _evaluate(name, config, beside, base, device, progress)


def _evaluate(
    name: str, config: EvaluateConfig, beside: Beside, base: str | None, device: str, progress: bool
) -> dict[str, Any]:
    files, joint, reference = beside.files, beside.joint, beside.reference
    with distributed.together():
        target = find_target(name, base, device, config.chat_template)
        chosen = _chosen_files(target, files)
        before = None if reference is None else _recorded(Path(reference).expanduser(), chosen)
        if reference is None and target.kind == "run" and not files:
            before = _stages_before(Path(name).expanduser())
        other = None if joint is None else _joint(joint, target, base, device)
        metrics = _metrics(target, config)
        tasks = [_read(target, task, file, config, metrics, progress) for task, file in chosen.items()]
    opened = open_target(target, config.precision)
    if other is not None and other.adapter is not None:
        own = lambda: weight_hashes(model_hashes(opened.model, target.model.revision))  # noqa: E731 (read if needed)
        check_bases({JOINT: other.adapter}, own, to_stderr if distributed.is_first() else lambda _: None)
    measured = {rows.task: _views(opened, rows, config, progress) for rows in tasks}
    if other is not None and other.adapter is not None:
        load_adapter(opened.model, other.adapter)
        opened.model.eval()
        for rows in tasks:
            measured[rows.task].append(_one(dataclasses.replace(opened, target=other), rows, config, progress))
    kept = {"target", "routed", "routing_accuracy", *metrics}
    results = {t: [{k: v for k, v in one.items() if k in kept} for one in own] for t, own in measured.items()}
    losses = _losses_of("adapter", results)
    forgotten = None if before is None else {t: losses[t] - before[t] for t in losses if t in before}
    return {
        "target": name, "kind": target.kind, "precision": opened.precision, "joint": joint,
        "tasks": [
            {"task": rows.task, "data": rows.file, "rows": rows.num_rows, "truncated": rows.truncated,
             "results": results[rows.task]}
            for rows in tasks
        ],
        "results": _over_tasks(results),
        "reference": before, "forgotten": forgotten,
    }  # fmt: skip


def _chosen_files(target: Target, files: Mapping[str, str]) -> dict[str, str | list[str]]:
    if target.gate is None:
        raise RequestError(f"--tasks has no effect: '{target.name}' holds one adapter or none, and no tasks")
    for task in files:
        if task not in target.gate.tasks:
            raise RequestError(f"'{target.name}' has no task '{task}'{did_you_mean(task, target.gate.tasks)}")
    known: Mapping[str, str | list[str]] = files or target.task_files
    chosen = {task: known[task] for task in target.gate.tasks if task in known}
    if not chosen:
        raise RequestError(f"the run of '{target.name}' names no valid files of its tasks; give --tasks NAME=FILE ...")
    return chosen


def _metrics(target: Target, config: EvaluateConfig) -> tuple[str, ...]:
    found = check_head_metrics(target, config.metrics) if is_head(target) else LOSS_ALONE
    if not is_head(target) and config.metrics is not None:
        found = check_metrics(config.metrics)
    if "loss" not in found:
        raise RequestError("--tasks compares losses; add loss to --metrics, or leave --metrics out")
    return tuple(found)


def _joint(name: str, target: Target, base: str | None, device: str) -> Target:
    """Raises: RequestError for several adapters, or one of another objective or other labels."""
    other = find_adapter(name, base, device)
    if other.objective != target.objective or (is_head(target) and target_head(other) != target_head(target)):
        raise RequestError(
            f"--joint '{name}' is for {other.objective} and '{target.name}' for {target.objective}, or their labels "
            "differ; give an adapter that was trained on the same tasks together"
        )
    return other


def _read(
    target: Target, task: str, file: str | list[str], config: EvaluateConfig, metrics: Sequence[str], progress: bool
) -> TaskRows:
    data, tokenizer = target.data_config(file), target_tokenizer(target)
    if config.max_length is not None:
        data = dataclasses.replace(data, max_length=config.max_length)
    if is_head(target):
        labels, _ = head_objective(target)
        loaded = load_head_rows(target, data, tokenizer, labels)
        rows: Exam | list[Any] = list(loaded.examples[: config.rows])
    else:
        objective = measured_objective(target, data)
        loaded = load_examples(data.train_paths, tokenizer, data, objective.needs.layout)
        rows = make_exam(loaded, data, tokenizer, tuple(metrics), config, objective, progress)
    for line in (*(f"note: {note}" for note in loaded.notes), *(f"warning: {text}" for text in loaded.warnings)):
        if distributed.is_first():
            print(f"{task}: {line}", file=sys.stderr)
    return TaskRows(task, file, rows, loaded.num_truncated)


def _views(opened: Opened, rows: TaskRows, config: EvaluateConfig, progress: bool) -> list[dict[str, Any]]:
    """Every view of the target on the rows of one task."""
    told = dataclasses.replace(opened, target=dataclasses.replace(opened.target, task=rows.task))
    if isinstance(rows.rows, Exam):
        return [graded.result for graded in grade_views(told, rows.rows)]
    return head_views(told, rows.rows, config.batch_size, progress)


def _one(opened: Opened, rows: TaskRows, config: EvaluateConfig, progress: bool) -> dict[str, Any]:
    if isinstance(rows.rows, Exam):
        return grade(opened.model, rows.rows, JOINT).result
    return {"target": JOINT, **head_figures(opened, rows.rows, config.batch_size, progress)}


def _losses_of(target: str, results: Mapping[str, Sequence[Mapping[str, Any]]]) -> dict[str, float]:
    return {task: one["loss"] for task, own in results.items() for one in own if one["target"] == target}


def _over_tasks(results: Mapping[str, Sequence[Mapping[str, Any]]]) -> list[dict[str, Any]]:
    """Of each target the mean over tasks, each counting once, and the worst; `single`: each task by its own adapter."""
    losses: dict[str, dict[str, float]] = {}
    for task, own in results.items():
        for one in own:
            losses.setdefault(one["target"], {})[task] = one["loss"]
            if one["target"] == f"task:{task}":
                losses.setdefault("single", {})[task] = one["loss"]
    found: list[dict[str, Any]] = []
    for target, by_task in losses.items():
        worst = max(by_task, key=lambda task: by_task[task])
        mean = sum(by_task.values()) / len(by_task)
        found.append({"target": target, "loss": mean, "worst": by_task[worst], "worst_task": worst})
    return found


# --- what was recorded before ----------------------------------------------------------------------------------------


def _stages_before(run: Path) -> dict[str, float] | None:
    """The lowest loss of each task at the end of a stage before the last; None for a run of one stage."""
    summary = read_json_object(run / SUMMARY_FILE) if (run / SUMMARY_FILE).is_file() else {}
    stages = (summary.get("tasks") or {}).get("stages") or []
    found: dict[str, float] = {}
    for stage in stages[:-1]:
        for task, loss in stage["losses"].items():
            found[task] = min(float(loss), found.get(task, math.inf))
    return found or None


def _recorded(path: Path, tasks: Mapping[str, Any]) -> dict[str, float]:
    """The losses in a run's summary, or in an earlier document of this command.

    Raises: RequestError where there are none, or none of one of these tasks.
    """
    file = path / SUMMARY_FILE if path.is_dir() else path
    document = read_json_object(file)
    found: dict[str, float] = {}
    recorded = document.get("tasks")
    if isinstance(recorded, Mapping):
        found = dict(recorded.get("losses") or {})
    elif isinstance(recorded, Sequence):
        for entry in recorded:
            found |= _losses_of("adapter", {entry["task"]: entry["results"]})
    missing = next((task for task in tasks if task not in found), None)
    if missing is not None:
        raise RequestError(
            f"--reference '{file}' has no loss of task '{missing}'; give a run on these tasks, or the JSON of an "
            "earlier `rankwise evaluate --tasks`"
        )
    return {task: float(found[task]) for task in tasks}
