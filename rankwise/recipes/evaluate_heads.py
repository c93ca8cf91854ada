"""Evaluate a classifier or an embedding model: loss and what it gets right; an adapter beside its base."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Sequence
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from rankwise import distributed
from rankwise.attach.gates import set_task
from rankwise.data.config import DataConfig
from rankwise.data.formats import FORMATS
from rankwise.data.loaded import Loaded
from rankwise.data.loader import load_examples
from rankwise.errors import RequestError, did_you_mean
from rankwise.evaluate.classes import Said, accuracy, f1
from rankwise.evaluate.perplexity import measure_loss
from rankwise.models.batch import IGNORED
from rankwise.models.heads import class_losses, decided, head_logits
from rankwise.models.label_batch import LabelBatch
from rankwise.models.labels import Labels
from rankwise.models.load import new_modules
from rankwise.recipes.evaluate_config import EvaluateConfig
from rankwise.recipes.processes import check_spread
from rankwise.recipes.target import Opened, Target, open_target, target_head, target_tokenizer
from rankwise.recipes.task_views import seen, views_of
from rankwise.train.config import DEFAULT_POOLING, DEFAULT_TEMPERATURE
from rankwise.train.objective import Meter, Objective
from rankwise.train.objectives import OBJECTIVES, contrastive

METRICS = {
    "classification": ("loss", "accuracy", "f1"),
    "token-classification": ("loss", "accuracy", "f1"),
    "embedding": ("loss", "recall_at_1", "mrr"),
}
"""What is measured, by objective."""


def is_head(target: Target) -> bool:
    """Whether it answers with labels or vectors, and not with text."""
    return target.objective in METRICS


def check_head_metrics(target: Target, names: Sequence[str] | None) -> tuple[str, ...]:
    """The metrics asked for, or all. Raises: RequestError for one that the target does not have."""
    known = METRICS[target.objective]
    for name in names or ():
        if name not in known:
            raise RequestError(f"metric '{name}' is not one of {target.objective}{did_you_mean(name, known)}")
    return known if names is None else tuple(dict.fromkeys(names))


def evaluate_head(
    target: Target, data: DataConfig, metrics: Sequence[str], config: EvaluateConfig, progress: bool
) -> dict[str, Any]:
    """The part of the document of `rankwise evaluate` that is measured, by all processes on their shares of the rows.

    Raises: RequestError for rows of another kind, labels that the target does not have, or a model that can't be
    spread as `config` says.
    """
    labels, objective = head_objective(target)
    check_spread(objective, target.objective, config.sharding)
    with distributed.together():
        tokenizer = target_tokenizer(target)
        loaded = load_head_rows(target, data, tokenizer, labels)
    for line in (*(f"note: {note}" for note in loaded.notes), *(f"warning: {text}" for text in loaded.warnings)):
        _print(line)
    opened = open_target(target, config.precision, config.sharding)
    examples = list(loaded.examples[: config.rows])
    results = head_views(opened, examples, config.batch_size, progress)
    if target.adapter is not None and new_modules(opened.model) and labels is not None:
        results[0]["untrained_head"] = True
        _print("note: the base has no head of its own: its figures are of an untrained one")
    asked = {"target", "untrained_head", *metrics}
    return {
        "rows": len(examples), "precision": opened.precision, "truncated": loaded.num_truncated,
        "warnings": list(loaded.warnings),
        "results": [{key: value for key, value in result.items() if key in asked} for result in results],
    }  # fmt: skip


def head_views(opened: Opened, examples: Sequence[Any], batch_size: int, progress: bool) -> list[dict[str, Any]]:
    """`target` and the figures of each view of the target."""
    target = opened.target
    results: list[dict[str, Any]] = []
    for view in views_of(target):
        if target.gate is not None:
            set_task(opened.model, None)  # each view says its own; a gate that infers does so as it reads
        with seen(opened.model, view):
            results.append({"target": view.name, **head_figures(opened, examples, batch_size, progress)})
    return results


def head_objective(target: Target) -> tuple[Labels | None, Objective]:
    """The target's labels, None where it gives vectors, and what its loss is.

    Raises: RequestError for files that can't be read.
    """
    head = target_head(target)
    if head is not None and head.labels is not None:
        return head.labels, OBJECTIVES[target.objective]
    pooling = head.pooling if head is not None and head.pooling is not None else DEFAULT_POOLING
    temperature = target.train.similarity_temperature if target.train is not None else DEFAULT_TEMPERATURE
    return None, contrastive(pooling, temperature)


def load_head_rows(
    target: Target, data: DataConfig, tokenizer: PreTrainedTokenizerBase, labels: Labels | None
) -> Loaded:
    """The rows of `data.train` as the target's head takes them.

    Raises: RequestError for rows of another kind, or labels that the target does not have.
    """

    def check(format: str, why: str) -> None:
        held = next((FORMATS[n].rows for n in format.split(", ") if FORMATS[n].rows != target.needs.rows), None)
        if held is not None:
            raise RequestError(
                f"'{target.name}' is for {target.objective}, measured on {target.needs.rows}; the file holds {held} "
                f"({why})"
            )

    return load_examples(data.train_paths, tokenizer, data, target.needs.layout, check=check, labels=labels)


def head_figures(opened: Opened, examples: Sequence[Any], batch_size: int, progress: bool) -> dict[str, float]:
    """What the model, as it is now, gets on these rows."""
    labels, objective = head_objective(opened.target)
    pad_id = opened.tokenizer.pad_token_id
    assert isinstance(pad_id, int), "load_tokenizer gives every tokenizer a pad token"
    if labels is None:
        found = measure_loss(opened.model, objective, examples, pad_id, batch_size, False, progress)
        return {"loss": found.loss, **found.figures}
    notes = Notes()
    found = measure_loss(opened.model, _noting(objective, notes), examples, pad_id, batch_size, False, progress)
    answers, truths = notes.of_all()
    is_tagged = opened.target.objective == "token-classification"
    return {
        "loss": found.loss,
        "accuracy": accuracy(answers, truths, is_tagged),
        "f1": f1(answers, truths, labels.names, labels.is_multi),
    }


def _print(line: str) -> None:
    if distributed.is_first():
        print(line, file=sys.stderr)


class Notes(Meter):
    """What the head said of each row, and what is true; no figures."""

    def __init__(self) -> None:
        super().__init__()
        self._answers: list[Said] = []
        self._truths: list[Said] = []

    def note(self, said: Any, true: Any) -> None:
        """Takes one row in: a class, one number for each class, or one class for each tagged word."""
        if self.is_closed:
            return
        self._answers.append(said if isinstance(said, list) else [said])
        self._truths.append(true if isinstance(true, list) else [true])

    def of_all(self) -> tuple[list[Said], list[Said]]:
        """Answers and truths of the rows of all processes."""
        shares = distributed.gathered((self._answers, self._truths))
        return [a for answers, _ in shares for a in answers], [t for _, truths in shares for t in truths]


def _noting(objective: Objective, notes: Notes) -> Objective:
    """The objective, whose losses note what the head says of each row and what is true."""

    def losses(model: PreTrainedModel, batch: LabelBatch) -> Tensor:
        logits = head_logits(model, batch)
        for said, true in zip(decided(logits, batch).tolist(), batch.targets.tolist(), strict=True):
            if batch.is_tagged:
                kept = [place for place, target in enumerate(true) if target != IGNORED]
                notes.note([said[place] for place in kept], [true[place] for place in kept])
            else:
                notes.note(said, true)
        return class_losses(logits, batch)

    return dataclasses.replace(objective, losses=losses, meter=notes)
