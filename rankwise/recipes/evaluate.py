"""Evaluate: loss and generated answers of a target on a data file; an adapter beside its base, one model in memory."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from rankwise import distributed
from rankwise.attach.gates import on_task, set_task, tasks_of
from rankwise.data.config import DataConfig
from rankwise.data.example import Example
from rankwise.data.fields import PREFERENCES
from rankwise.data.formats import FORMATS
from rankwise.data.loaded import Loaded
from rankwise.data.loader import load_examples
from rankwise.data.rows import Findings, iter_rows
from rankwise.data.templates import stop_token_ids
from rankwise.errors import RequestError
from rankwise.evaluate.answers import LOSS_METRICS, METRICS, check_metrics, score
from rankwise.evaluate.generate import generate_answers
from rankwise.evaluate.perplexity import Likelihood, measure_loss, together
from rankwise.models.sharding import is_sharded
from rankwise.recipes.evaluate_config import EvaluateConfig
from rankwise.recipes.evaluate_heads import check_head_metrics, evaluate_head, is_head
from rankwise.recipes.target import Opened, Target, find_target, need_task, open_target, target_tokenizer
from rankwise.recipes.task_views import View, seen, views_of
from rankwise.tasks.router import inferred_tasks
from rankwise.train.needs import NEEDS
from rankwise.train.objective import Objective
from rankwise.train.objectives import OBJECTIVES, objective_of
from rankwise.train.preference import REWARD_ACCURACY

DEFAULT_NEW_TOKENS = 128
FIGURE_NAMES = {REWARD_ACCURACY: "accuracy"}
"""What results call a figure of an objective's meter, where it is not the same."""


@dataclass(frozen=True)
class Exam:
    """The same questions for every model: examples, what is measured, and how answers are generated.

    `objective` says what the loss is; `packing` changes its speed only.
    """

    objective: Objective
    examples: Sequence[Example]
    tokenizer: PreTrainedTokenizerBase
    metrics: tuple[str, ...]
    stop_ids: tuple[int, ...]
    batch_size: int
    max_new_tokens: int
    packing: bool
    progress: bool

    @property
    def references(self) -> list[str]:
        """The right answers."""
        return [example.answer for example in self.examples]


@dataclass(frozen=True)
class Graded:
    """One row of the table, and the answers behind it (none where only the loss was asked for)."""

    result: dict[str, Any]
    answers: list[str]


def evaluate(
    name: str, config: EvaluateConfig, base: str | None = None, device: str = "auto", progress: bool = False
) -> dict[str, Any]:
    """The document of `rankwise evaluate`: `results` with `base` and `adapter`, or the model's own name.

    Of several processes each measures its share of the rows, and all return the same.

    Raises: RequestError for a target, data file or metric that can't be used.
    """
    with distributed.joined():
        return _evaluate(name, config, base, device, progress)


def _evaluate(name: str, config: EvaluateConfig, base: str | None, device: str, progress: bool) -> dict[str, Any]:
    with distributed.together():
        target = find_target(name, base, device, config.chat_template, config.task)
        need_task(target)
    if is_head(target):
        return _of_head(target, config, progress)
    with distributed.together():
        wanted = None if config.metrics is None else check_metrics(config.metrics)
        file, data = _data(target, config)
        tokenizer = target_tokenizer(target)
        objective = measured_objective(target, data)
        loaded = load_examples(data.train_paths, tokenizer, data, objective.needs.layout)
        exam = make_exam(loaded, data, tokenizer, wanted, config, objective, progress)
    for line in (*(f"note: {note}" for note in loaded.notes), *(f"warning: {text}" for text in loaded.warnings)):
        if distributed.is_first():
            print(line, file=sys.stderr)
    opened = open_target(target, config.precision, config.sharding)
    graded = [copied(exam)] if config.copy else []
    graded += grade_views(opened, exam)
    return {
        "target": name, "kind": target.kind, "data": file, "rows": len(exam.examples), "precision": opened.precision,
        "truncated": loaded.num_truncated, "warnings": list(loaded.warnings),
        "results": [entry.result for entry in graded],
    }  # fmt: skip


def grade_views(opened: Opened, exam: Exam) -> list[Graded]:
    """A row of the table for each view of the target; one that is the same as another is not measured again.

    Raises: RequestError for an inferred gate that is spread over processes.
    """
    if opened.target.gate is not None:
        set_task(opened.model, None)  # each view says its own
    graded: list[tuple[View, Graded]] = []
    for view in views_of(opened.target):
        same = [own for done, own in graded if view.given is not None and done.given == view.given]
        if same:
            one = Graded({**same[0].result, "target": view.name}, same[0].answers)
        elif view.is_routed:
            one = _grade_routed(opened, exam, view.name)
        else:
            with seen(opened.model, view):
                one = grade(opened.model, exam, view.name)
        graded.append((view, one))
    return [one for _, one in graded]


def _grade_routed(opened: Opened, exam: Exam, name: str) -> Graded:
    """Each row under the task that the classifier finds for its prompt (of plain text: for the whole row)."""
    if is_sharded(opened.model):
        raise RequestError("an inferred gate reads whole models only; leave --sharding out, or give --task")
    pad_id = exam.tokenizer.pad_token_id
    assert isinstance(pad_id, int), "load_tokenizer gives every tokenizer a pad token"
    prompts = [example.prompt_ids or example.input_ids for example in exam.examples]
    found = inferred_tasks(opened.model, prompts, pad_id, exam.batch_size)
    tasks = tasks_of(opened.model)
    parts: list[Likelihood] = []
    answers: dict[int, str] = {}
    for number, task in enumerate(tasks):
        places = [i for i, other in enumerate(found.tolist()) if other == number]
        if places:
            part = dataclasses.replace(exam, examples=[exam.examples[i] for i in places])
            with on_task(opened.model, task):
                likelihood, own = _measured(opened.model, part)
            parts += [likelihood] if likelihood is not None else []
            answers |= dict(zip(places, own, strict=False))
    routed = {task: float((found == number).double().mean()) for number, task in enumerate(tasks)}
    result = _graded(exam, name, together(parts) if parts else None, [answers[i] for i in sorted(answers)]).result
    more = {} if opened.target.task is None else {"routing_accuracy": routed[opened.target.task]}
    return Graded({**result, "routed": routed, **more}, [answers[i] for i in sorted(answers)])


def measured_objective(target: Target, data: DataConfig) -> Objective:
    """The target's own objective; where the rows are of another kind, the one for these: answers or preference pairs.

    Raises: RequestError for preference pairs and a model without an adapter to compare with its base; for files that
    can't be read.
    """
    found = Findings()
    next(iter_rows(data.train_paths, found, data.reading), None)  # the first row tells the format of its file
    kinds = {FORMATS[name].rows for name in found.formats}
    is_causal = target.needs.task == NEEDS["dpo"].task
    name = target.objective
    if kinds == {PREFERENCES} and is_causal:
        name = "dpo"
        if target.adapter is None:
            raise RequestError(
                f"preference pairs compare an adapter with its base, and '{target.name}' is a model without one; "
                "give a run or an adapter"
            )
    elif name == "dpo":
        name = "sft"
    if target.train is not None and target.train.objective == name:
        return objective_of(target.train)
    return OBJECTIVES[name]


def measured_metrics(objective: Objective) -> tuple[str, ...]:
    """Those of LOSS_METRICS that the objective has."""
    own = {"loss", *(FIGURE_NAMES.get(name, name) for name in objective.meter.names)}
    own |= {"perplexity"} if objective.needs.unit == "token" else set()
    return tuple(name for name in LOSS_METRICS if name in own)


def _data(target: Target, config: EvaluateConfig) -> tuple[str | list[str], DataConfig]:
    file = data_file(target, config.data)
    data = target.data_config(file)
    return file, data if config.max_length is None else dataclasses.replace(data, max_length=config.max_length)


def _of_head(target: Target, config: EvaluateConfig, progress: bool) -> dict[str, Any]:
    """The document of a classifier or an embedding model, which answers no questions."""
    given = {
        "--copy": config.copy, "--max-new-tokens": config.max_new_tokens, "--chat-template": config.chat_template,
    }  # fmt: skip
    for flag, value in given.items():
        if value:
            raise RequestError(f"{flag} has no effect: '{target.name}' is for {target.objective} and writes no answers")
    metrics = check_head_metrics(target, config.metrics)
    file, data = _data(target, config)
    measured = evaluate_head(target, data, metrics, config, progress)
    return {"target": target.name, "kind": target.kind, "data": file, **measured}


def data_file(target: Target, given: str | None) -> str | list[str]:
    """The file asked for, else the valid file of the task asked for, else the run's test file, else its valid file.

    Raises: RequestError when there is none.
    """
    if given is not None:
        return given
    if target.task is not None and target.task in target.task_files:
        return target.task_files[target.task]
    files = (target.data.test, target.data.valid) if target.data is not None else ()
    found = next((file for file in files if file is not None), None)
    if found is None:
        own = "".join(f" ({task}: {files})" for task, files in target.task_files.items())
        raise RequestError(f"'{target.name}' has no test or valid file of its own; give one with --data{own}")
    return found


def make_exam(
    loaded: Loaded,
    data: DataConfig,
    tokenizer: PreTrainedTokenizerBase,
    metrics: tuple[str, ...] | None,
    config: EvaluateConfig,
    objective: Objective,
    progress: bool,
) -> Exam:
    """The first rows as questions. Rows of plain text have no answers: then only the likelihood is measured.

    Raises: RequestError when a metric of answers is asked for and a row has none.
    """
    examples = loaded.examples[: config.rows]
    missing = next((example for example in examples if not example.prompt_ids), None)
    measured = measured_metrics(objective)
    if metrics is None:
        metrics = measured if missing else (*measured, *METRICS)
    if (other := next((name for name in metrics if name not in (*measured, *METRICS)), None)) is not None:
        raise RequestError(f"metric '{other}' has no meaning for these rows, which have {', '.join(measured)}")
    compared = [name for name in metrics if name in METRICS]
    if missing and compared:
        raise RequestError(
            f"metric '{compared[0]}' compares answers, and {missing.file}:{missing.line} is text without one; "
            "ask for loss or perplexity"
        )
    if config.copy and not compared:
        raise RequestError(f"--copy has no effect without a metric that compares answers ({', '.join(METRICS)})")
    if config.max_new_tokens is not None and not compared:
        raise RequestError(
            f"--max-new-tokens {config.max_new_tokens} has no effect: no answers are generated for "
            f"{', '.join(metrics)}; leave it out, or ask for one of {', '.join(METRICS)}"
        )
    longest = DEFAULT_NEW_TOKENS if config.max_new_tokens is None else config.max_new_tokens
    stop_ids = stop_token_ids(tokenizer, data, objective.needs.layout) if compared else ()
    packing = data.packing is True
    return Exam(objective, examples, tokenizer, metrics, stop_ids, config.batch_size, longest, packing, progress)


def grade(model: PreTrainedModel, exam: Exam, name: str) -> Graded:
    """The model's figures under `name`: those of `exam.metrics`, in the order of the contract."""
    return _graded(exam, name, *_measured(model, exam))


def _measured(model: PreTrainedModel, exam: Exam) -> tuple[Likelihood | None, list[str]]:
    """What the metrics are of: the likelihood, and the answers, where they are asked for."""
    found: Likelihood | None = None
    if any(metric in LOSS_METRICS for metric in exam.metrics):
        pad_id = exam.tokenizer.pad_token_id
        assert isinstance(pad_id, int), "load_tokenizer gives every tokenizer a pad token"
        found = measure_loss(model, exam.objective, exam.examples, pad_id, exam.batch_size, exam.packing, exam.progress)
    answers: list[str] = []
    if any(metric in METRICS for metric in exam.metrics):
        prompts = [example.prompt_ids for example in exam.examples]
        answers = generate_answers(
            model, exam.tokenizer, prompts, exam.max_new_tokens, exam.batch_size, exam.progress, exam.stop_ids
        )
    return found, answers


def _graded(exam: Exam, name: str, found: Likelihood | None, answers: list[str]) -> Graded:
    figures: dict[str, float] = {}
    if found is not None:
        figures = {"loss": found.loss, "perplexity": found.perplexity}
        figures |= {FIGURE_NAMES.get(name, name): value for name, value in found.figures.items()}
    if answers:
        figures.update(score(answers, exam.references, exam.metrics))
    return Graded({"target": name, **_asked(figures, exam.metrics)}, answers)


def copied(exam: Exam) -> Graded:
    """What repeating the input would score, without the instruction that all prompts share. It has no likelihood."""
    answers = [example.source for example in exam.examples]
    return Graded({"target": "copy", **_asked(score(answers, exam.references, exam.metrics), exam.metrics)}, answers)


def _asked(figures: dict[str, float], metrics: Sequence[str]) -> dict[str, float]:
    return {name: figures[name] for name in (*LOSS_METRICS, *METRICS) if name in figures and name in metrics}


def with_rows(exam: Exam, rows: int) -> Exam:
    """The same exam on its first rows."""
    return dataclasses.replace(exam, examples=list(exam.examples)[:rows])
