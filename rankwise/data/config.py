"""Which rows a run reads, and how they become tokens: the `data:` section of a run file."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from rankwise.config import build
from rankwise.data.columns import Columns
from rankwise.data.fields import ANSWERS, PREFERENCES
from rankwise.data.formats import FORMATS
from rankwise.errors import RequestError, did_you_mean

AUTO = "auto"
PLAIN = "plain"
COMPLETION = "completion"
HUB_PREFIX = "hf:"
"""Begins the name of a data set of the Hub, where a path may stand."""
LINE = "line"
PARAGRAPH = "paragraph"
ERROR = "error"
SKIP = "skip"
TEMPLATE_NAMES = (AUTO, PLAIN, COMPLETION)
TEMPLATE_SUFFIX = ".jinja"
WHOLE = "whole"
SEQ2SEQ = "seq2seq"
PREFERENCE = "preference"
"""Layouts, by which rows become sequences: see `rankwise.data.layouts`."""
LEAST_LENGTH = 2
"""A label needs a token before it that predicts it."""
BY_HASH, BY_ROW = "hash", "row"
OFF = "off"


@dataclass(frozen=True)
class Reading:
    """How files become rows: the settings of `DataConfig` of these names."""

    format: str = AUTO
    text_rows: str = LINE
    columns: Mapping[str, str] | None = None
    system: str | None = None
    group: str | None = None
    """The column by which rows are split."""


BY_KEYS = Reading()
"""Each file's format is recognised by its keys."""


@dataclass(frozen=True)
class Source:
    """One source of training rows, where `train` lists several.

    Args:
        path: as a string in its place: a path, a folder, a pattern, a data set of the Hub, or a list of these.
        name: what messages and metrics call it; not given: the first path's last part without its suffix.
        weight: its share of the rows that are drawn, in relation to the others' (not given, where others have: 1).
        epochs: how often its rows are drawn in one epoch of the mix.
        format, columns: of its files, instead of `data.format` and `data.columns`.

    Raises: RequestError for a value out of range.
    """

    path: str | list[str]
    name: str = ""
    weight: int | float | None = None
    epochs: int | float | None = None
    format: str | None = None
    columns: dict[str, str] | None = None

    def __post_init__(self) -> None:
        if not self.path or not all(paths_of(self.path)):
            raise RequestError(f"data.train: a source's path is {self.path!r}; give the path of a data file, or a list")
        if not self.name:
            object.__setattr__(self, "name", Path(paths_of(self.path)[0]).name.partition(".")[0] or "rows")
        for setting in ("weight", "epochs"):
            value = getattr(self, setting)
            if value is not None and not (value > 0 and math.isfinite(value)):
                raise RequestError(
                    f"data.train: the {setting} of '{self.name}' must be more than 0, not {value}; leave a source out "
                    "to train without it"
                )
        if self.format not in (None, AUTO, *FORMATS):
            raise RequestError(
                f"data.train: the format of '{self.name}' can't be '{self.format}'"
                f"{did_you_mean(str(self.format), (AUTO, *FORMATS))}"
            )
        if self.columns is not None:
            check_columns(self.columns)


@dataclass(frozen=True)
class DataConfig:
    """Data files and their treatment.

    Args:
        train, valid, test: data files: a path, a folder, a pattern (`rows-*.jsonl`), a data set of the Hub
            (`hf:owner/name/split`), or a list of these.
        format: a name of `FORMATS`, or `auto`: recognised by the rows' keys, file by file.
        max_length: tokens a row may have; a longer one keeps its beginning.
        packing: examples of a micro batch lie end to end in one row instead of padded; same losses, less time. Not
            given: yes, where the objective can.
        chat_template: `auto` (the tokenizer's own, or `plain` when it has none), `plain` ("### User:" and so on),
            `completion` (the prompt, then its completion, nothing around them), or the path of a `.jinja` file.
        text_rows: what a row of a `.txt` file is: a `line` that is not blank, or a `paragraph`, up to a blank line.
        columns: fields of a format, each as the column it is taken from, or a text with columns in braces.
        system: the system prompt of rows that have none of their own.
        on_bad_row: whether rows that can't be used are an `error`, or `skip`: left out, and counted.
        mixing_temperature: draws from each of several sources by its size to the power of 1 / temperature.
        valid_split: rows held out of `train` where `valid` is not given: a fraction of them (0.05), their number, 0 for
            none, or `auto`: a twentieth, at most 200, of 100 rows or more.
        split_by: `hash` of what the row says, `row` (by chance), or the name of a column whose values stay together.
        workers: processes that encode rows, or `auto`: by the cores and the size of the data. Not the results.
        cache: where encoded rows are kept: `auto` (the user's cache folder, from 1 MiB of data on), `off`, or a folder.

    Raises: RequestError for a value out of range, or a setting without effect.
    """

    train: str | list[str | dict[str, Any]]
    valid: str | list[str] | None = None
    test: str | list[str] | None = None
    format: str = AUTO
    max_length: int = 512
    packing: bool | None = None
    chat_template: str = AUTO
    text_rows: str = LINE
    columns: dict[str, str] | None = None
    system: str | None = None
    on_bad_row: str = ERROR
    mixing_temperature: int | float | None = None
    valid_split: int | float | str = AUTO
    split_by: str = BY_HASH
    workers: int | str = AUTO
    cache: str = AUTO

    def __post_init__(self) -> None:
        for name in ("train", "valid", "test"):
            value = getattr(self, name)
            if value is not None and (not value or not all(value)):
                raise RequestError(f"data.{name} is {value!r}; give the path of a data file, or a list of paths")
        self._check_reading()
        self._check_mix()
        self._check_split()
        if isinstance(self.workers, str) and self.workers != AUTO:
            raise RequestError(f"data.workers must be a number of processes or auto, not '{self.workers}'")
        if isinstance(self.workers, int) and self.workers < 1:
            raise RequestError(f"data.workers must be 1 or more, or auto, not {self.workers}")
        if not self.cache:
            raise RequestError("data.cache is empty; give auto, off, or the path of a folder")

    def _check_reading(self) -> None:
        if self.format not in (AUTO, *FORMATS):
            raise RequestError(f"data.format can't be '{self.format}'{did_you_mean(self.format, (AUTO, *FORMATS))}")
        if self.max_length < LEAST_LENGTH:
            raise RequestError(f"data.max_length must be {LEAST_LENGTH} or more, not {self.max_length}")
        if self.chat_template not in TEMPLATE_NAMES and not self.has_template_file:
            raise RequestError(
                f"data.chat_template can't be '{self.chat_template}'{did_you_mean(self.chat_template, TEMPLATE_NAMES)}"
                f"; or give the path of a {TEMPLATE_SUFFIX} file"
            )
        if self.text_rows not in (LINE, PARAGRAPH):
            raise RequestError(
                f"data.text_rows can't be '{self.text_rows}'{did_you_mean(self.text_rows, (LINE, PARAGRAPH))}"
            )
        if self.on_bad_row not in (ERROR, SKIP):
            raise RequestError(
                f"data.on_bad_row can't be '{self.on_bad_row}'{did_you_mean(self.on_bad_row, (ERROR, SKIP))}"
            )
        if self.columns is not None:
            check_columns(self.columns)
        if self.system is not None and not self.system.strip():
            raise RequestError("data.system is empty; write a system prompt, or null for none")
        if self.system is not None and self.format != AUTO and FORMATS[self.format].rows not in (ANSWERS, PREFERENCES):
            raise RequestError(f"data.system has no effect on rows of format {self.format}; leave it out")
        if self.format == "text" and self.chat_template != AUTO:
            raise RequestError(text_has_no_template(self.chat_template))

    def _check_mix(self) -> None:
        sources = self.sources
        by = {name: [s.name for s in sources if getattr(s, name) is not None] for name in ("weight", "epochs")}
        given = [f"the {name} of '{names[0]}'" for name, names in by.items() if names]
        if self.mixing_temperature is not None:
            if not (self.mixing_temperature >= 1 and math.isfinite(self.mixing_temperature)):
                raise RequestError(
                    f"data.mixing_temperature must be 1 or more, not {self.mixing_temperature}; 1 draws by size, "
                    "higher ones make shares more equal"
                )
            given.append("data.mixing_temperature")
        if len(given) > 1:
            raise RequestError(f"{' and '.join(given)} both say how often sources are drawn from; give one of them")
        if given and len(sources) == 1:
            instead = "set train.epochs" if by["epochs"] else "leave it out, or list more in data.train"
            raise RequestError(f"{given[0]} has no effect on one source; {instead}")
        twice = next((s.name for s in sources if [other.name for other in sources].count(s.name) > 1), None)
        if twice is not None:
            raise RequestError(f"two sources of data.train are called '{twice}'; give each a name")

    def _check_split(self) -> None:
        value = self.valid_split
        if isinstance(value, str) and value != AUTO:
            raise RequestError(f"data.valid_split must be a fraction, a number of rows, or auto, not '{value}'")
        if isinstance(value, float) and value != 0 and not 0 < value < 1:
            raise RequestError(
                f"data.valid_split ({value}) must be a fraction between 0 and 1, or a whole number of rows"
            )
        if isinstance(value, int) and value < 0:
            raise RequestError(f"data.valid_split must be 0 or more, not {value}")
        if not self.split_by:
            raise RequestError(f"data.split_by is empty; give {BY_HASH}, {BY_ROW}, or the name of a column")
        if self.valid is not None and value not in (AUTO, 0):
            raise RequestError(
                f"data.valid_split ({value}) has no effect: data.valid gives the rows; leave out one of them"
            )
        if self.split_by != BY_HASH and (self.valid is not None or value == 0):
            why = "data.valid gives the rows" if self.valid is not None else "data.valid_split is 0"
            raise RequestError(f"data.split_by ({self.split_by}) has no effect: {why}; leave it out")

    @property
    def reading(self) -> Reading:
        """How files become rows."""
        return Reading(self.format, self.text_rows, self.columns, self.system, self.group_column)

    @property
    def group_column(self) -> str | None:
        """The column that `split_by` names, if it does."""
        return self.split_by if self.split_by not in (BY_HASH, BY_ROW) else None

    @property
    def sources(self) -> tuple[Source, ...]:
        """The sources of training rows: one, unless `train` lists some with settings of their own."""
        if isinstance(self.train, str) or all(isinstance(item, str) for item in self.train):
            return (Source(self.train_paths),)
        return tuple(
            build(Source, item, f"data.train[{index}]") if isinstance(item, Mapping) else Source(item)
            for index, item in enumerate(self.train)
        )

    def for_files(
        self, paths: str | list[str], format: str | None = None, columns: dict[str, str] | None = None
    ) -> DataConfig:
        """The same treatment of other files, without what is said of the run's own: sources, splits.

        `format`, `columns`: theirs, where these are other ones.
        """
        return replace(
            self, train=list(paths) if isinstance(paths, list) else paths, valid=None, test=None,
            format=format or self.format, columns=columns or self.columns,
            mixing_temperature=None, valid_split=AUTO, split_by=BY_HASH,
        )  # fmt: skip

    @property
    def train_paths(self) -> list[str]:
        """The paths of all sources, in their order."""
        items = [self.train] if isinstance(self.train, str) else self.train
        paths: list[str] = []
        for index, item in enumerate(items):
            paths += [item] if isinstance(item, str) else paths_of(build(Source, item, f"data.train[{index}]").path)
        return paths

    @property
    def has_template_file(self) -> bool:
        """Whether `chat_template` is a path."""
        return self.chat_template.endswith(TEMPLATE_SUFFIX)


def check_columns(columns: Mapping[str, str]) -> None:
    """Raises: RequestError for a mapping that is empty, makes a field of no format, or is no mapping of columns."""
    if not columns:
        raise RequestError("data.columns is empty and has no effect; name a column for each field, or set it to null")
    known = [name for form in FORMATS.values() for name in form.fields]
    for name in Columns(columns).names:
        if name not in known:
            raise RequestError(f"data.columns.{name}: no format has the field '{name}'{did_you_mean(name, known)}")


def paths_of(value: str | list[str]) -> list[str]:
    """One path or several, as a list."""
    return [value] if isinstance(value, str) else list(value)


def text_has_no_template(chat_template: str) -> str:
    """What is wrong with a chat template for rows of plain text."""
    return f"data.chat_template '{chat_template}' has no effect on rows of format text, trained on whole; use auto"
