"""The data of a fine-tuning run: read, encoded, split, and checked against the objective and the model."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate, pairwise
from pathlib import PurePath

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from rankwise.data.example import Example
from rankwise.data.formats import FORMATS
from rankwise.data.labels import check_labels
from rankwise.data.loaded import Loaded, num_leaked
from rankwise.data.loader import accepted, check_any, load_split
from rankwise.data.overlap import Overlap, overlap_in_short
from rankwise.data.rows import BadRows, Problem
from rankwise.data.splits import AUTO_LEAST_ROWS
from rankwise.data.tasked import TaskExamples
from rankwise.data.templates import stop_token_ids
from rankwise.data.training_set import TrainingSet, joined, load_sources, training_set
from rankwise.errors import RequestError, counted
from rankwise.models.labels import Labels
from rankwise.models.load import load_tokenizer
from rankwise.models.probing import num_positions
from rankwise.recipes.heads import training_labels
from rankwise.recipes.run import RunConfig, StartFrom
from rankwise.recipes.run_tasks import valid_files
from rankwise.say import Say
from rankwise.train.needs import NEEDS, remedy_for
from rankwise.train.order import Share

MOST_PARTS = 16
"""The validation loss of each source or file is measured up to so many."""


@dataclass(frozen=True)
class RunData:
    """Training and validation examples, with the tokenizer that made them."""

    tokenizer: PreTrainedTokenizerBase
    training: TrainingSet
    valid: Loaded | None
    """Of the file in data.valid, or held out of the training rows."""
    stop_ids: tuple[int, ...]
    """Tokens that end an answer in the way that the data was written."""
    num_leaked: int = 0
    """Validation rows that are training rows too, letter by letter."""
    labels: Labels | None = None
    """What a classifier tells apart."""
    overlap: Overlap | None = None
    """Of the validation rows with training rows, looked for in few of both."""
    tasks: tuple[str, ...] = ()
    """Where the sources are tasks: their names."""
    valid_sizes: tuple[int, ...] = ()
    """Validation rows of each task, which lie in this order."""

    @property
    def train(self) -> Loaded:
        """The training rows."""
        return self.training.train

    @property
    def shares(self) -> list[Share]:
        """The sources, for the order of rows."""
        return [Share(size, quota) for size, quota in zip(self.training.sizes, self.training.quotas, strict=True)]

    @property
    def rows_per_epoch(self) -> int:
        """Rows that an epoch draws."""
        return sum(self.training.quotas)

    @property
    def num_held_out(self) -> int:
        """Rows held out of the training files."""
        return len(self.training.held_out.examples) if self.training.held_out else 0

    @property
    def valid_parts(self) -> Mapping[str, Sequence[Example]]:
        """The validation rows of each of several sources or files, by its name; empty for one, and for too many."""
        if self.valid is None:
            return {}
        if self.tasks:
            return self._valid_of_tasks(self.valid)
        if self.valid is self.training.held_out:
            ends = accumulate(self.training.held_sizes, initial=0)
            bounds = zip(self.training.names, pairwise(ends), strict=True)
            parts = {name: self.valid.examples[start:end] for name, (start, end) in bounds if end > start}
        else:
            files = self.valid.examples.by_file()
            stems = [PurePath(file).name.split(".")[0] for file in files]
            names = stems if len(set(stems)) == len(stems) else list(files)
            parts = dict(zip(names, files.values(), strict=True))
        return parts if 1 < len(parts) <= MOST_PARTS else {}

    def _valid_of_tasks(self, valid: Loaded) -> dict[str, Sequence[Example]]:
        examples = TaskExamples(valid.examples, self.tasks, self.valid_sizes)
        bounds = zip(self.tasks, pairwise(accumulate(self.valid_sizes, initial=0)), strict=True)
        return {name: examples[start:end] for name, (start, end) in bounds}

    @property
    def training_examples(self) -> Sequence[Example]:
        """The training rows, which know their task where there are several."""
        if not self.tasks:
            return self.train.examples
        return TaskExamples(self.train.examples, self.tasks, self.training.sizes)

    @property
    def pad_id(self) -> int:
        """The token that fills padded rows up."""
        pad_id = self.tokenizer.pad_token_id
        assert isinstance(pad_id, int), "load_tokenizer gives every tokenizer a pad token"
        return pad_id

    @property
    def tokens_per_epoch(self) -> tuple[int, int]:
        """Tokens of an epoch: all, and those that are trained on; of a mix, as many as its rows have on average."""
        tokens, trained = (self.training.per_epoch(name) for name in ("tokens", "trained"))
        return tokens, trained

    def check_fits(self, model: PreTrainedModel) -> None:
        """Raises: RequestError when a row has more tokens than the model has positions, or a token unknown to it."""
        config = model.config.get_text_config()
        splits = [self.train, *([self.valid] if self.valid else [])]
        longest = max(int(split.examples.column("longest").max()) for split in splits)
        positions = num_positions(model)
        if positions is not None and longest > positions:
            raise RequestError(
                f"a row has {longest} tokens, the model {positions} positions; set data.max_length={positions}"
            )
        highest = max(int(split.examples.column("highest").max()) for split in splits)
        if highest >= config.vocab_size:
            raise RequestError(
                f"the tokenizer gives token {highest}, the model's vocabulary ends at {config.vocab_size - 1}; "
                "this tokenizer is not the model's"
            )


def load_data(run: RunConfig, say: Say) -> RunData:
    """Reads `data.train` and `data.valid`, or holds rows out where there is none; `say` takes what the cache does.

    Raises: BadRows with the problems of both; RequestError for files that can't be read, or rows that do not go with
        the objective.
    """
    tokenizer = load_tokenizer(run.model)
    config, layout = run.data, run.train.needs.layout

    def check(split: str) -> Callable[[str, str], None]:
        return lambda format, why: check_objective(run.train.objective, split, format, why)

    problems: list[Problem] = []

    def used(loaded: Loaded, found: list[Problem]) -> Loaded:
        loaded, bad = accepted(loaded, found, config.on_bad_row)
        problems.extend(bad)
        return loaded

    labels = training_labels(config, layout, run.adapter.folder if isinstance(run.adapter, StartFrom) else None)
    parts = [used(*found) for found in load_sources(config, tokenizer, layout, say, check("train"), labels)]
    valid: Loaded | None = None
    of_tasks: list[Loaded] = []
    valid_sizes: tuple[int, ...] = ()
    if files := valid_files(run.tasks):
        of_tasks = [
            used(*load_split(paths, tokenizer, config.for_files(paths), layout, say, check("valid"), labels))
            for paths in files.values()
        ]
        valid, valid_sizes = joined(of_tasks, config.sources), tuple(len(part.examples) for part in of_tasks)
    elif config.valid is not None:
        treated = config.for_files(config.valid)
        valid = used(*load_split(config.valid, tokenizer, treated, layout, say, check("valid"), labels))
    if problems:
        raise BadRows(problems)
    if labels is not None:
        check_labels(labels)
    for source, part in zip(config.sources, parts, strict=True):
        check_any(part, source.path, config)
    if valid_sizes:
        for part, paths in zip(of_tasks, files.values(), strict=True):
            check_any(part, paths, config)
    elif valid is not None and config.valid is not None:
        check_any(valid, config.valid, config)
    training = training_set(config, parts, hold_out=valid is None and not run.train.evaluates_never)
    valid = valid or training.held_out
    if valid is None:
        rows = counted(len(training.train.examples), "row")
        run.check_not_evaluated(f"without data.valid (of {rows}, fewer than {AUTO_LEAST_ROWS}, none is held out)")
    leaked = num_leaked(valid.examples, training.train.examples) if valid is not None else 0
    overlap = overlap_in_short(training.train.examples, valid.examples) if valid is not None else None
    stop_ids = stop_token_ids(tokenizer, config, layout) if run.train.needs.generates else ()
    found = RunData(tokenizer, training, valid, stop_ids, leaked, labels, overlap)
    if run.tasks.data:
        found = replace(found, tasks=run.tasks.names, valid_sizes=valid_sizes or training.held_sizes)
        check_held_out(found)
    return found


def check_held_out(data: RunData) -> None:
    """Raises: RequestError where a task has no validation rows and others have."""
    if data.valid is None:
        return
    for name, size in zip(data.tasks, data.valid_sizes, strict=True):
        if not size:
            raise RequestError(
                f"no row of task '{name}' was held out for validation; give each task a valid file in tasks.data, or "
                "raise data.valid_split"
            )


def check_objective(objective: str, split: str, format: str, why: str) -> None:
    """Raises: RequestError for rows that the objective does not train on; `format` and `why` are as in `Rows`."""
    wanted = NEEDS[objective].rows
    held = next((FORMATS[name].rows for name in format.split(", ") if FORMATS[name].rows != wanted), None)
    if held is not None:
        raise RequestError(
            f"train.objective: {objective} trains on {wanted}, data.{split} holds {held} ({why}); {remedy_for(held)}"
        )
