"""What a run would train on: counts, what is masked, duplicates, leaks, and every row that can't be used."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase

from rankwise.data.config import SKIP, WHOLE, DataConfig
from rankwise.data.example import Example, Loaded
from rankwise.data.loader import encode
from rankwise.data.rows import Problem, Row, Rows, leak_warning, num_leaked, read_rows, tolerated
from rankwise.errors import counted

SPLITS = ("train", "valid", "test")


def preview(
    config: DataConfig, tokenizer: PreTrainedTokenizerBase, rows: int = 3, layout: str = WHOLE
) -> dict[str, Any]:
    """The document of `rankwise data preview`: counts of the training files, and more of each split in `splits`.

    Args:
        config: the run's data section.
        tokenizer: the model's.
        rows: how many examples to show, from the beginning.
        layout: how the objective lays rows out, a key of `rankwise.data.layouts.LAYOUTS`.

    `duplicates`: training rows that are equal to an earlier one; `leaks`: rows of valid and test that are training rows
    too, letter by letter. `problems` holds the rows of all files that can't be used; counts are of the others.
    `trained_spans` are the characters [start, end) of `text` that are trained on.

    Raises: RequestError for files that can't be read, a format that can't be told, or an unusable template.
    """
    read = {name: read_rows(files, config.reading) for name in SPLITS if (files := getattr(config, name)) is not None}
    encoded = {name: encode(found, tokenizer, config, layout) for name, found in read.items()}
    splits = {name: _split(read[name], encoded[name][0]) for name in read}
    leaks = {name: num_leaked(found, read["train"]) for name, found in read.items() if name != "train"}
    for name, count in leaks.items():
        splits[name]["leaks"] = count
    loaded = encoded["train"][0]
    return {
        **splits["train"],
        "leaks": sum(leaks.values()),
        "problems": [_problem(problem) for _, problems in encoded.values() for problem in problems],
        "warnings": _warnings(encoded, splits, leaks, config.on_bad_row),
        "notes": list(dict.fromkeys(note for found, _ in encoded.values() for note in found.notes)),
        "examples": [_shown(example) for example in loaded.examples[:rows]],
        "splits": splits,
    }


def _split(read: Rows, loaded: Loaded) -> dict[str, Any]:
    lengths = [len(example.input_ids) for example in loaded.examples]
    return {
        "format": loaded.format,
        "why": loaded.why,
        "rows": loaded.num_rows,
        "tokens": sum(lengths),
        "trained_tokens": sum(example.num_trained for example in loaded.examples),
        "truncated": loaded.num_truncated,
        "emptied": loaded.num_emptied,
        "duplicates": _duplicates(read.rows),
        "lengths": _quantiles(lengths),
    }


def _problem(problem: Problem) -> dict[str, Any]:
    return {"file": problem.file, "line": problem.line, "reason": problem.reason}


def _duplicates(rows: Sequence[Row]) -> int:
    return len(rows) - len({row.turns for row in rows})


def _quantiles(lengths: Sequence[int]) -> dict[str, int]:
    """Tokens a row: shortest, median, 95 of 100, longest."""
    if not lengths:
        return {}
    names = {"min": 0, "median": 50, "p95": 95, "max": 100}
    return {name: int(np.percentile(lengths, at, method="higher")) for name, at in names.items()}


def _warnings(
    encoded: dict[str, tuple[Loaded, list[Problem]]],
    splits: dict[str, dict[str, Any]],
    leaks: dict[str, int],
    on_bad_row: str,
) -> list[str]:
    texts = [f"{name}: {text}" for name, (loaded, _) in encoded.items() for text in loaded.warnings]
    for name, (_, problems) in encoded.items():
        if on_bad_row == SKIP:
            bad_rows = [problem for problem in problems if not problem.of_file]
            texts += [f"{name}: {text}" for text in tolerated(bad_rows, on_bad_row)]
    for name, split in splits.items():
        if split["duplicates"]:
            texts.append(f"{name}: {counted(split['duplicates'], 'row')} equal to an earlier row")
    return texts + [leak_warning(name, count) for name, count in leaks.items() if count]


def _shown(example: Example) -> dict[str, Any]:
    return {
        "text": example.text,
        "trained_spans": [list(span) for span in example.spans],
        "file": example.file,
        "line": example.line,
    }
