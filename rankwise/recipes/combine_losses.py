"""What combined adapters are worth: their loss on data files, weights searched on one, and what each task loses.

The base is loaded once. Adapters take each other's place in it, and while weights are searched only numbers in the
attached layers change, no folder is written. The search is COBYQA (Ragonneau and Zhang 2024, cobyqa.com; scipy's),
which fits a quadratic to the losses and needs no gradient; it draws nothing, so the same request gives the same
weights. That few examples and no gradient are enough to weigh adapters is LoraHub's finding (Huang et al. 2023, arXiv
2307.13269), whose bounds are these too.
"""

from __future__ import annotations

import dataclasses
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from scipy.optimize import minimize

from rankwise.attach.bases import check_base, weight_hashes
from rankwise.attach.checkpoint import HEAD_FILE, load_adapter, set_tensors
from rankwise.attach.inject import disabled
from rankwise.data.example import Example
from rankwise.data.loader import load_examples
from rankwise.errors import RequestError
from rankwise.evaluate.perplexity import measure_loss
from rankwise.models.load import new_modules
from rankwise.recipes.adapter_files import write_adapter
from rankwise.recipes.combine_layers import Recipe, fields_of, most_ranks, tensors_at
from rankwise.recipes.combine_sources import Source, combined_whole
from rankwise.recipes.evaluate import measured_objective
from rankwise.recipes.evaluate_heads import head_objective, is_head, load_head_rows
from rankwise.recipes.provenance import model_hashes
from rankwise.recipes.target import Target, find_adapter, open_target
from rankwise.train.objective import Objective

DEFAULT_TRIALS = 40
LARGEST_WEIGHT = 1.5
"""Weights are searched from minus this to this, or as far as those given are."""
LEAST_SHARE = 0.01
"""The lowest weight of modules that are averaged: weights that are all 0 have no mean."""
FIRST_STEP, LAST_STEP = 0.25, 0.01
"""How far apart the weights are that are tried at first, and when the search is content."""


@dataclass(frozen=True)
class Task:
    """Rows with a name, and what their loss is."""

    name: str
    file: str
    examples: Sequence[Example]
    objective: Objective
    packing: bool


@dataclass(frozen=True)
class Tuned:
    """What a search found.

    Args:
        data, rows: the file, and its number of rows.
        trials: how many weights were tried.
        start, weights: before and after.
        before, after: the losses with them.
    """

    data: str
    rows: int
    trials: int
    start: tuple[float, ...]
    weights: tuple[float, ...]
    before: float
    after: float


class Bench:
    """The base in memory, and the sources' treatment of data.

    Args:
        sources: the adapters.
        base: the model that they belong to, where it is not the one they name.
        device, precision: of the model.
        batch_size: rows at a time.
        progress: whether bars are shown on stderr.

    Raises: RequestError for a base that is not known, can't be loaded, or is not the one that an adapter was trained
        on, by the hashes of its weight files.
    """

    def __init__(
        self, sources: Sequence[Source], base: str | None, device: str, precision: str, batch_size: int, progress: bool
    ) -> None:
        self._sources = sources
        self._targets = [find_adapter(source.name, base, device) for source in sources]
        self._batch_size = batch_size
        self.progress = progress
        opened = open_target(self._targets[0], precision)
        self.model, self.tokenizer = opened.model, opened.tokenizer
        self._check_bases()

    def _check_bases(self) -> None:
        known = {source.name: source.base for source in self._sources if weight_hashes(source.base)}
        own = weight_hashes(model_hashes(self.model, self._targets[0].model.revision)) if known else {}
        for name, record in known.items():
            check_base(f"'{name}'", record, own, f"the base that it is measured on ('{self._targets[0].model.name}')")

    def read_task(self, name: str, file: str | list[str], target: Target | None = None) -> Task:
        """Rows of a file, treated as those of a run (of the first adapter's by default).

        Raises: RequestError for rows that can't be read, or are of another kind.
        """
        target = target or self._targets[0]
        data = target.data_config(file)
        if is_head(target):
            labels, objective = head_objective(target)
            loaded = load_head_rows(target, data, self.tokenizer, labels)
        else:
            objective = measured_objective(target, data)
            loaded = load_examples(data.train_paths, self.tokenizer, data, objective.needs.layout)
        for line in (*(f"note: {note}" for note in loaded.notes), *(f"warning: {text}" for text in loaded.warnings)):
            print(line, file=sys.stderr)
        shown = file if isinstance(file, str) else " ".join(file)
        return Task(name, shown, loaded.examples, objective, data.packing is True and objective.needs.packs)

    def read_tasks(self, files: Mapping[str, str]) -> list[Task]:
        """Tasks by name and file; without any, the valid files of the runs.

        Raises: RequestError for an adapter that is no run with a valid file, where these are asked for.
        """
        if files:
            return [self.read_task(name, file) for name, file in files.items()]
        found = list[Task]()
        for source, target in zip(self._sources, self._targets, strict=True):
            file = target.data.valid if target.data is not None else None
            if file is None:
                raise RequestError(
                    f"'{source.name}' is no run with a file in data.valid, so its task is not known; give the files as "
                    "--tasks NAME=FILE ..."
                )
            found.append(self.read_task(Path(source.name).name, file, target))
        return found

    def loss(self, task: Task, shows_bar: bool = True) -> float:
        """The loss of the model as it is."""
        pad_id = self.tokenizer.pad_token_id
        assert isinstance(pad_id, int), "load_tokenizer gives every tokenizer a pad token"
        found = measure_loss(
            self.model,
            task.objective,
            task.examples,
            pad_id,
            self._batch_size,
            task.packing,
            self.progress and shows_bar,
        )
        return found.loss

    def losses(self, tasks: Sequence[Task], folder: Path) -> list[float]:
        """The losses of the adapter in a folder, which takes the place of the one before."""
        load_adapter(self.model, folder)
        return [self.loss(task) for task in tasks]

    def report(self, tasks: Sequence[Task], folder: Path) -> list[dict[str, Any]]:
        """Of each task: the loss of the base, of each adapter and of the combination in `folder`.

        `lost`: how much more that is than the lowest of the adapters'.
        """
        if new_modules(self.model):
            print("note: the base has no head of its own: its losses are of an untrained one", file=sys.stderr)
        with disabled(self.model):
            of_base = [self.loss(task) for task in tasks]
        of_each = [self.losses(tasks, source.folder) for source in self._sources]
        together = self.losses(tasks, folder)
        rows = list[dict[str, Any]]()
        for task, base, combined, each in zip(tasks, of_base, together, zip(*of_each, strict=True), strict=True):
            rows.append(
                {
                    "task": task.name,
                    "data": task.file,
                    "rows": len(task.examples),
                    "base": base,
                    "adapters": list(each),
                    "combined": combined,
                    "lost": combined - min(each),
                }
            )
        return rows


def tuned(
    bench: Bench, file: str, sources: Sequence[Source], recipe: Recipe, start: Sequence[float], trials: int
) -> Tuned:
    """The weights with the lowest loss on the rows of `file` that a search of so many trials finds.

    Modules that were trained whole are averaged by the weights, so these stay above 0 where there are any.
    """
    task = bench.read_task("tune", file)
    # the sum is tried as the factors side by side: the same function, and no ranks that change with the weights
    tried = dataclasses.replace(recipe, method="cat") if recipe.method == "sum" else recipe
    losses: dict[tuple[float, ...], float] = {}
    set_weights = _attached(bench, sources, tried, start)

    def loss(weights: np.ndarray | Sequence[float]) -> float:
        key = tuple(float(weight) for weight in weights)
        if key not in losses:
            set_weights(key)
            losses[key] = bench.loss(task, shows_bar=False)
            if bench.progress:
                shown = " ".join(f"{weight:.3f}" for weight in key)
                print(f"trial {len(losses)}: loss {losses[key]:.4f} with {shown}", file=sys.stderr)
        return losses[key]

    before = loss(start)
    averages = bool(combined_whole(sources, [1.0] * len(sources))[1])
    low = LEAST_SHARE if averages else -LARGEST_WEIGHT
    bounds = [(min(low, weight), max(LARGEST_WEIGHT, weight)) for weight in start]
    if trials > 1:
        minimize(
            loss, np.array(start), method="COBYQA", bounds=bounds,
            options={"maxfev": trials, "initial_tr_radius": FIRST_STEP, "final_tr_radius": LAST_STEP},
        )  # fmt: skip
    best = min(losses, key=lambda key: losses[key])
    return Tuned(task.file, len(task.examples), len(losses), tuple(start), best, before, losses[best])


def _attached(
    bench: Bench, sources: Sequence[Source], recipe: Recipe, start: Sequence[float]
) -> Callable[[Sequence[float]], None]:
    """Attaches the combination with the highest ranks that it can have; gives what puts that of other weights there."""
    ranks = most_ranks(sources, recipe)
    with tempfile.TemporaryDirectory(prefix="rankwise-") as name:
        fields = fields_of(sources, ranks, None)
        write_adapter(
            Path(name), fields, tensors_at(sources, start, recipe, ranks), {HEAD_FILE: sources[0].head}
        )  # fmt: skip
        load_adapter(bench.model, name)

    def set_weights(weights: Sequence[float]) -> None:
        set_tensors(bench.model, tensors_at(sources, weights, recipe, ranks))

    return set_weights
