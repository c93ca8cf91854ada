"""Files to examples: rows are read, encoded a chunk at a time, and what became of them is counted."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from transformers import PreTrainedTokenizerBase

from rankwise.data.config import WHOLE, DataConfig, paths_of
from rankwise.data.encoder import Counts, Encoder, Prompts
from rankwise.data.example import Example, Loaded
from rankwise.data.rows import BadRows, Problem, Rows, read_rows, tolerated
from rankwise.errors import RequestError, counted

_CHUNK_ROWS = 1000
"""Rows tokenised at once: bounds the memory that the offsets take."""


def load_examples(
    paths: str | Sequence[str], tokenizer: PreTrainedTokenizerBase, config: DataConfig, layout: str = WHOLE
) -> Loaded:
    """Reads files into examples, in the order of the files and their lines; `layout`: a key of `LAYOUTS`.

    Raises: BadRows with every row that can't be used; RequestError for files that can't be read, a format that can't
        be told, a template that can't be used, or when no row has a trained token.
    """
    return load_rows(read_rows(paths, config.reading), paths, tokenizer, config, layout)


def load_rows(
    rows: Rows, paths: str | Sequence[str], tokenizer: PreTrainedTokenizerBase, config: DataConfig, layout: str = WHOLE
) -> Loaded:
    """Examples of rows that were read from `paths` before.

    Raises: BadRows with every row that can't be used; RequestError for a template that can't be used, or when no row
        has a trained token.
    """
    loaded, problems = encode(rows, tokenizer, config, layout)
    skipped = tolerated(problems, config.on_bad_row)
    if problems and not loaded.num_rows:
        raise BadRows(problems)
    loaded = dataclasses.replace(loaded, warnings=(*skipped, *loaded.warnings), num_skipped=len(problems))
    if not loaded.examples:
        files = ", ".join(paths_of(paths) if isinstance(paths, str) else paths)
        raise RequestError(
            f"none of the {loaded.num_rows} rows of {files} has a trained token within data.max_length="
            f"{config.max_length}: every answer begins later; raise data.max_length"
        )
    return loaded


def encode(
    rows: Rows, tokenizer: PreTrainedTokenizerBase, config: DataConfig, layout: str = WHOLE
) -> tuple[Loaded, list[Problem]]:
    """Examples of the rows that can be used, and the problems of the others; nothing is raised for these.

    Raises: RequestError for a template that can't be used.
    """
    encoder = Encoder(tokenizer, config, layout)
    counts = Counts()
    prompts: dict[str, Prompts] = {}
    notes: dict[str, None] = {}
    examples: list[Example] = []
    problems: list[Problem] = [*rows.problems]
    for start in range(0, len(rows.rows), _CHUNK_ROWS):
        chunk = encoder.encode(rows.rows[start : start + _CHUNK_ROWS])
        counts.add(chunk.counts)
        for file, found in chunk.prompts.items():
            prompts.setdefault(file, found).add(found)
        notes |= dict.fromkeys(chunk.notes)
        examples += chunk.examples
        problems += chunk.problems
    instructions = {file: found.instruction for file, found in prompts.items()}
    examples = [
        dataclasses.replace(example, source=example.prompt_text.removeprefix(instructions[example.file]))
        for example in examples
    ]
    loaded = Loaded(
        examples=examples,
        format=rows.format,
        why=rows.why,
        num_rows=counts.rows,
        num_truncated=counts.truncated,
        num_emptied=counts.emptied,
        notes=_notes(rows, list(notes)),
        warnings=_warnings(counts, config),
    )
    return loaded, problems


def _notes(rows: Rows, template_notes: Sequence[str]) -> tuple[str, ...]:
    blank = (f"{counted(rows.num_blank, 'blank line')} skipped",) if rows.num_blank else ()
    return (*blank, *rows.notes, *template_notes)


def _warnings(counts: Counts, config: DataConfig) -> tuple[str, ...]:
    length = f"data.max_length={config.max_length}"
    texts = {
        f"cut at {length}: what lies beyond is not trained on": counts.truncated - counts.emptied,
        f"left out: no token of an answer is within {length}": counts.emptied,
        "with an answer that begins inside a token of its header; that token is not trained on": counts.merged,
        "with a prompt that is tokenised otherwise alone than in front of its answer": counts.apart,
        "with special tokens of the tokenizer written in the text; they are read as those tokens": counts.special,
    }
    return tuple(f"{counted(count, 'row')} {text}" for text, count in texts.items() if count)
