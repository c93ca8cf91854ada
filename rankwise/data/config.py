"""Which rows a run reads, and how they become tokens: the `data:` section of a run file."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from rankwise.data.columns import Columns
from rankwise.data.fields import ANSWERS
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


@dataclass(frozen=True)
class Reading:
    """How files become rows: the settings of `DataConfig` of these names."""

    format: str = AUTO
    text_rows: str = LINE
    columns: Mapping[str, str] | None = None
    system: str | None = None


BY_KEYS = Reading()
"""Each file's format is recognised by its keys."""


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

    Raises: RequestError for a value out of range, or a setting without effect.
    """

    train: str | list[str]
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

    def __post_init__(self) -> None:
        for name in ("train", "valid", "test"):
            value = getattr(self, name)
            if value is not None and (not value or not all(paths_of(value))):
                raise RequestError(f"data.{name} is {value!r}; give the path of a data file, or a list of paths")
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
        if self.system is not None and self.format != AUTO and FORMATS[self.format].rows != ANSWERS:
            raise RequestError(f"data.system has no effect on rows of format {self.format}; leave it out")
        if self.format == "text" and self.chat_template != AUTO:
            raise RequestError(text_has_no_template(self.chat_template))

    @property
    def reading(self) -> Reading:
        """How files become rows."""
        return Reading(self.format, self.text_rows, self.columns, self.system)

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
