"""Rows to examples: token ids, the labels that are trained on, and what evaluation needs of the last answer.

The whole text is tokenised once, with offsets; a token is trained on if it begins inside a trained span. A token that
begins before the span and reaches into it (a line break of the header merged with one of the answer) is not, and is
counted. A row longer than `max_length` keeps its beginning; one that has no trained token left is dropped and counted.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice

import numpy as np
from transformers import PreTrainedTokenizerBase

from rankwise.data.chat_template import first_difference, special_tokens
from rankwise.data.config import DataConfig, paths_of
from rankwise.data.formats import ASSISTANT, TEXT, USER, RowError, Turns
from rankwise.data.plain_template import Rendered, Span, Template
from rankwise.data.rows import BadRows, Problem, Row, Rows, read_rows
from rankwise.data.templates import template_for, text_template
from rankwise.errors import RequestError, counted
from rankwise.models.batch import IGNORED

_CHUNK_ROWS = 2000
"""Rows tokenised at once: bounds the memory that the offsets take."""


@dataclass(frozen=True)
class Example:
    """One row, ready for training and evaluation.

    Args:
        input_ids: the tokens, at most `max_length`.
        labels: of the same length: a token's own id where it is trained on, else IGNORED.
        text: what the tokens say (cut where they were cut).
        spans: the trained [start, end) characters of `text`, as the labels have them.
        prompt_ids: from which the last answer is generated; empty for rows of plain text. Never cut.
        prompt_text: the last user turn as written.
        answer: the last answer as written.
        source: what the baseline `copy` answers: `prompt_text` without the file's shared instruction.
        file, line: where the row stands.
    """

    input_ids: tuple[int, ...]
    labels: tuple[int, ...]
    text: str
    spans: tuple[Span, ...]
    prompt_ids: tuple[int, ...]
    prompt_text: str
    answer: str
    source: str = ""
    file: str = ""
    line: int = 0

    @property
    def num_trained(self) -> int:
        """Labels that an earlier token predicts: the first position's does not count."""
        return sum(label != IGNORED for label in islice(self.labels, 1, None))


@dataclass(frozen=True)
class Loaded:
    """Examples, and what became of the rows.

    `format`, `why`: the formats found, and by what; `num_rows`: rows read; `num_truncated`: rows that were longer than
    `max_length`; `num_emptied`: those of them that lost every trained token and were dropped; `notes`: choices made for
    the user; `warnings`: what is probably a mistake.
    """

    examples: list[Example]
    format: str
    why: str
    num_rows: int
    num_truncated: int
    num_emptied: int = 0
    notes: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()


@dataclass
class _Counts:
    """Rows cut, emptied, with a token across the answer's beginning, with another prompt, with special tokens."""

    truncated: int = 0
    emptied: int = 0
    merged: int = 0
    apart: int = 0
    special: int = 0


def load_examples(paths: str | Sequence[str], tokenizer: PreTrainedTokenizerBase, config: DataConfig) -> Loaded:
    """Reads files into examples, in the order of the files and their lines.

    Raises: BadRows with every row that can't be used; RequestError for files that can't be read, a format that can't
        be told, a template that can't be used, or when no row has a trained token.
    """
    return load_rows(read_rows(paths, config.format), paths, tokenizer, config)


def load_rows(rows: Rows, paths: str | Sequence[str], tokenizer: PreTrainedTokenizerBase, config: DataConfig) -> Loaded:
    """Examples of rows that were read from `paths` before.

    Raises: BadRows with every row that can't be used; RequestError for a template that can't be used, or when no row
        has a trained token.
    """
    loaded, problems = encode(rows, tokenizer, config)
    if problems:
        raise BadRows(problems)
    if not loaded.examples:
        files = ", ".join(paths_of(paths) if isinstance(paths, str) else paths)
        raise RequestError(
            f"none of the {loaded.num_rows} rows of {files} has a trained token within data.max_length="
            f"{config.max_length}: every answer begins later; raise data.max_length"
        )
    return loaded


def encode(rows: Rows, tokenizer: PreTrainedTokenizerBase, config: DataConfig) -> tuple[Loaded, list[Problem]]:
    """Examples of the rows that can be used, and the problems of the others; nothing is raised for these.

    Raises: RequestError for a template that can't be used.
    """
    written, templates, problems = _render(rows.rows, tokenizer, config)
    counts = _Counts()
    instructions = _instructions(written)
    specials = special_tokens(tokenizer)
    examples: list[Example] = []
    for start in range(0, len(written), _CHUNK_ROWS):
        chunk = written[start : start + _CHUNK_ROWS]
        texts = tokenizer(
            [item.rendered.text for item in chunk],
            add_special_tokens=False,
            return_offsets_mapping=True,
            verbose=False,
        )
        prompts = tokenizer([item.rendered.prompt for item in chunk], add_special_tokens=False, verbose=False)
        for item, ids, offsets, prompt in zip(
            chunk, texts["input_ids"], texts["offset_mapping"], prompts["input_ids"], strict=True
        ):
            encoded = _encoded(ids, np.array(offsets, dtype=np.int64).reshape(-1, 2), item, config.max_length)
            example = _example(item, encoded, prompt, instructions.get(item.row.file, ""))
            if example.num_trained:
                examples.append(example)
            is_apart = item.rendered.prompt_fits and not encoded.is_merged and ids[: len(prompt)] != prompt
            counts.truncated += encoded.was_cut
            counts.emptied += example.num_trained == 0
            counts.merged += encoded.is_merged
            counts.apart += is_apart
            counts.special += any(token in turn.content for turn in item.row.turns for token in specials)
    loaded = Loaded(
        examples=examples,
        format=rows.format,
        why=rows.why,
        num_rows=len(written),
        num_truncated=counts.truncated,
        num_emptied=counts.emptied,
        notes=_notes(rows, templates),
        warnings=_warnings(counts, config),
    )
    return loaded, [*rows.problems, *problems]


def _render(
    rows: Sequence[Row], tokenizer: PreTrainedTokenizerBase, config: DataConfig
) -> tuple[list[_Written], list[Template], list[Problem]]:
    """Each row as text, the templates used (one for conversations, one for plain text), and rows they refuse."""
    written: list[_Written] = []
    problems: list[Problem] = []
    templates: dict[bool, Template] = {}
    for row in rows:
        is_text = row.turns[0].role == TEXT
        if is_text not in templates:
            templates[is_text] = (text_template if is_text else template_for)(tokenizer, config)
        template = templates[is_text]
        try:
            written.append(_Written(row, template.render(row.turns), template.prefix_ids))
        except RowError as reason:
            problems.append(Problem(row.file, row.line, str(reason)))
        except RequestError as error:
            raise RequestError(f"{row.file}:{row.line}: {error}") from None
    return written, list(templates.values()), problems


def shared_instruction(prompts: Sequence[str]) -> str:
    """What all prompts begin with, up to a colon and blank or a line break ("Rewrite in modern English: ").

    The longest beginning common to all of them, cut after its last ": " or line break; "" when there are not two
    different prompts, or one of them would have nothing left.
    """
    if len(set(prompts)) < 2:
        return ""
    first, last = min(prompts), max(prompts)
    common = first[: first_difference(first, last)]
    end = max(common.rfind(": ") + len(": ") if ": " in common else 0, common.rfind("\n") + 1)
    return common[:end] if all(prompt[end:].strip() for prompt in prompts) else ""


def _instructions(written: Sequence[_Written]) -> dict[str, str]:
    """The shared instruction of each file."""
    prompts: dict[str, list[str]] = {}
    for item in written:
        prompts.setdefault(item.row.file, []).append(_last(item.row.turns, USER))
    return {file: shared_instruction(texts) for file, texts in prompts.items()}


@dataclass(frozen=True)
class _Written:
    """A row as text. `prefix_ids`: tokens in front of it."""

    row: Row
    rendered: Rendered
    prefix_ids: tuple[int, ...]


@dataclass(frozen=True)
class _Encoded:
    """Tokens and labels of one text, cut to length."""

    ids: tuple[int, ...]
    labels: tuple[int, ...]
    text: str
    spans: tuple[Span, ...]
    was_cut: bool
    is_merged: bool


def _encoded(ids: Sequence[int], offsets: np.ndarray, item: _Written, max_length: int) -> _Encoded:
    """Labels from the trained spans. `offsets`: [num_tokens, 2] characters of the text."""
    starts, ends = offsets[:, 0], offsets[:, 1]
    trained = np.zeros(len(ids), dtype=bool)
    is_merged = False
    for start, end in item.rendered.spans:
        trained |= (starts >= start) & (starts < end)
        is_merged |= bool(((starts < start) & (ends > start)).any())
    prefix, text = item.prefix_ids, item.rendered.text
    kept = max_length - len(prefix)
    was_cut = len(ids) > kept
    if was_cut:
        text = text[: int(ends[kept - 1])]
    trained = trained[:kept]
    labels = np.where(trained, np.array(ids[:kept], dtype=np.int64), IGNORED)
    edges = np.flatnonzero(np.diff(trained, prepend=False, append=False))
    spans = tuple(
        (int(starts[first]), min(int(ends[last - 1]), len(text)))
        for first, last in zip(edges[::2], edges[1::2], strict=True)
    )
    return _Encoded(
        ids=(*prefix, *ids[:kept]),
        labels=(*(IGNORED for _ in prefix), *labels.tolist()),
        text=text,
        spans=spans,
        was_cut=was_cut,
        is_merged=is_merged,
    )


def _example(item: _Written, encoded: _Encoded, prompt: Sequence[int], instruction: str) -> Example:
    row = item.row
    asked = _last(row.turns, USER)
    return Example(
        input_ids=encoded.ids,
        labels=encoded.labels,
        text=encoded.text,
        spans=encoded.spans,
        prompt_ids=() if row.turns[0].role == TEXT else (*item.prefix_ids, *prompt),
        prompt_text=asked,
        answer=_last(row.turns, ASSISTANT),
        source=asked.removeprefix(instruction),
        file=row.file,
        line=row.line,
    )


def _last(turns: Turns, role: str) -> str:
    """The content of the last turn of that role, "" if there is none."""
    return next((turn.content for turn in reversed(turns) if turn.role == role), "")


def _notes(rows: Rows, templates: Sequence[Template]) -> tuple[str, ...]:
    blank = (f"{counted(rows.num_blank, 'blank line')} skipped",) if rows.num_blank else ()
    return (*blank, *(note for template in templates for note in template.notes))


def _warnings(counts: _Counts, config: DataConfig) -> tuple[str, ...]:
    length = f"data.max_length={config.max_length}"
    texts = {
        f"cut at {length}: what lies beyond is not trained on": counts.truncated - counts.emptied,
        f"left out: no token of an answer is within {length}": counts.emptied,
        "with an answer that begins inside a token of its header; that token is not trained on": counts.merged,
        "with a prompt that is tokenised otherwise alone than in front of its answer": counts.apart,
        "with special tokens of the tokenizer written in the text; they are read as those tokens": counts.special,
    }
    return tuple(f"{counted(count, 'row')} {text}" for text, count in texts.items() if count)
