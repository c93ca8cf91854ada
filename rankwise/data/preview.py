"""What a run would train on: counts, what is masked, lengths, duplicates, leaks, and every row that can't be used."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase

from rankwise.data.config import SKIP, WHOLE, DataConfig
from rankwise.data.example import Example
from rankwise.data.head_encoder import HEAD_LAYOUTS, HEAD_ROWS
from rankwise.data.labels import Survey, imbalance_warning, labels_of, survey, survey_training
from rankwise.data.lengths import SHOWN_OUTLIERS, histogram, outliers, padded_efficiency, shares
from rankwise.data.loaded import Loaded, leak_warning, num_duplicates, num_leaked
from rankwise.data.loader import accepted, load_split
from rankwise.data.overlap import Overlap, near_warnings, overlaps, said
from rankwise.data.rows import Problem, tolerated
from rankwise.data.store import Examples
from rankwise.data.training_set import load_sources, training_set
from rankwise.errors import counted
from rankwise.say import to_stderr

LANGUAGE_ROWS = 500
"""Training rows whose language is guessed, evenly spread."""


def preview(
    config: DataConfig,
    tokenizer: PreTrainedTokenizerBase,
    rows: int = 3,
    layout: str = WHOLE,
    batching: tuple[int, int, int] = (16, 4, 0),
) -> dict[str, Any]:
    """The document of `rankwise data preview`: counts of the training files, and more of each split in `splits`.

    Args:
        config: the run's data section.
        tokenizer: the model's.
        rows: how many examples to show, from the beginning.
        layout: how the objective lays rows out, a key of `rankwise.data.layouts.LAYOUTS`.
        batching: rows of a step and of a micro batch, and the seed of their order: for what padding would cost.

    `duplicates`: training rows that are equal to an earlier one; `leaks`: rows of valid and test that are training rows
    too, letter by letter; `near_duplicates`, `near_leaks` and `shared_runs` are of rows that are not equal
    (`rankwise.data.overlap`). `problems` holds the rows of all files that can't be used; counts are of the others.
    `trained_spans` are the characters [start, end) of `text` that are trained on.

    Raises: RequestError for files that can't be read, a format that can't be told, or an unusable template.
    """
    surveys = _surveys(config)
    loaded, problems = _load(config, tokenizer, layout, surveys)
    splits = {name: _split(found) for name, found in loaded.items()}
    for name, found in surveys.items():
        if found.counts:
            splits[name]["labels"] = found.counts
    train = loaded["train"].examples
    leaks = {name: num_leaked(found.examples, train) for name, found in loaded.items() if name != "train"}
    for name, count in leaks.items():
        splits[name]["leaks"] = count
    near = overlaps({name: part.examples for name, part in loaded.items()})
    for name, overlap in near.items():
        splits[name] |= _overlap(overlap, name == "train")
    return {
        **splits["train"],
        "leaks": sum(leaks.values()),
        "near_leaks": sum(overlap.near_leaks for overlap in near.values()),
        "shared_runs": sum(overlap.shared_runs for overlap in near.values()),
        "languages": _languages(train),
        "packing": _packing(train.column("tokens"), config.packing is True, batching),
        "problems": [_problem(problem) for bad in problems.values() for problem in bad],
        "warnings": _warnings(loaded, splits, leaks) + _skipped(problems, config.on_bad_row),
        "notes": _notes(loaded, near["train"]),
        "examples": [_shown(example) for example in train[:rows]],
        "splits": splits,
    }


def _surveys(config: DataConfig) -> dict[str, Survey]:
    """Labels and formats of the files of each split."""
    files = {name: paths for name in ("valid", "test") if (paths := getattr(config, name)) is not None}
    others = {name: survey([(paths, config.for_files(paths).reading)]) for name, paths in files.items()}
    return {"train": survey_training(config), **others}


def _layout_of(found: Survey, layout: str) -> str:
    """The objective's layout where it is one for rows of their kind: else they are shown as what they are."""
    own = next((HEAD_ROWS[kind] for kind in found.kinds if kind in HEAD_ROWS), None)
    if own is not None:
        return own
    return WHOLE if layout in HEAD_LAYOUTS else layout


def _load(
    config: DataConfig, tokenizer: PreTrainedTokenizerBase, layout: str, surveys: dict[str, Survey]
) -> tuple[dict[str, Loaded], dict[str, list[Problem]]]:
    """The splits that there are, by name, and what is wrong in the files of each."""
    labels = labels_of(surveys["train"])
    found = load_sources(config, tokenizer, _layout_of(surveys["train"], layout), to_stderr, None, labels)
    problems = {"train": [problem for _, bad in found for problem in bad]}
    refused = any(accepted(part, bad, config.on_bad_row)[1] for part, bad in found)
    training = training_set(config, [part for part, _ in found], hold_out=config.valid is None and not refused)
    loaded = {"train": training.train}
    if training.held_out is not None:
        notes = (f"valid: no file given, so {counted(len(training.held_out.examples), 'row')} of train held out",)
        loaded["valid"] = dataclasses.replace(training.held_out, notes=notes)
    for name in ("valid", "test"):
        if (files := getattr(config, name)) is not None:
            own, treated = _layout_of(surveys[name], layout), config.for_files(files)
            loaded[name], problems[name] = load_split(files, tokenizer, treated, own, labels=labels)
    return loaded, problems


def _split(loaded: Loaded) -> dict[str, Any]:
    lengths = loaded.examples.column("tokens")
    return {
        "format": loaded.format,
        "why": loaded.why,
        "rows": loaded.num_rows,
        "tokens": int(lengths.sum()),
        "trained_tokens": int(loaded.examples.column("trained").sum()),
        "truncated": loaded.num_truncated,
        "emptied": loaded.num_emptied,
        "duplicates": num_duplicates(loaded.examples),
        "lengths": _quantiles(lengths),
        "histogram": histogram(lengths),
        "outliers": len(far := outliers(lengths)),
        "longest": [
            {"file": example.file, "line": example.line, "tokens": len(example.input_ids)}
            for example in (loaded.examples[row] for row in far[:SHOWN_OUTLIERS])
        ],
    }


def _overlap(overlap: Overlap, is_train: bool) -> dict[str, int]:
    near = {"near_duplicates": overlap.near_duplicates}
    return near if is_train else {**near, "near_leaks": overlap.near_leaks, "shared_runs": overlap.shared_runs}


def _notes(loaded: dict[str, Loaded], overlap: Overlap) -> list[str]:
    notes = list(dict.fromkeys(note for part in loaded.values() for note in part.notes))
    if overlap.num_compared < overlap.num_training:
        compared = f"{overlap.num_compared:,} of the {overlap.num_training:,} training rows"
        notes.append(f"near rows are looked for among {compared}, evenly spread")
    return notes


def _packing(lengths: np.ndarray, packs: bool, batching: tuple[int, int, int]) -> dict[str, Any]:
    padded = padded_efficiency(lengths, *batching)
    return {"packs": packs, "efficiency": 1.0 if packs else padded, "padded_efficiency": padded}


def _languages(train: Examples) -> dict[str, int]:
    """How many of some rows are in which language (ISO 639-1), guessed by py3langid; short ones often wrongly."""
    from py3langid import classify

    places = np.unique(np.linspace(0, len(train) - 1, min(LANGUAGE_ROWS, len(train))).astype(int)) if len(train) else ()
    return shares([str(classify(said(train[int(place)]))[0]) for place in places])


def _problem(problem: Problem) -> dict[str, Any]:
    return {"file": problem.file, "line": problem.line, "reason": problem.reason}


def _quantiles(lengths: np.ndarray) -> dict[str, int]:
    """Tokens a row: shortest, median, 95 of 100, longest."""
    if not len(lengths):
        return {}
    names = {"min": 0, "median": 50, "p95": 95, "max": 100}
    return {name: int(np.percentile(lengths, at, method="higher")) for name, at in names.items()}


def _warnings(loaded: dict[str, Loaded], splits: dict[str, dict[str, Any]], leaks: dict[str, int]) -> list[str]:
    texts = [f"{name}: {text}" for name, found in loaded.items() for text in found.warnings]
    for name, split in splits.items():
        if split["duplicates"]:
            texts.append(f"{name}: {counted(split['duplicates'], 'row')} equal to an earlier row")
        if (uneven := imbalance_warning(split.get("labels", {}))) is not None:
            texts.append(f"{name}: {uneven}")
        if split["near_duplicates"]:
            texts.append(f"{name}: {counted(split['near_duplicates'], 'row')} nearly equal to an earlier row")
        texts += near_warnings(name, split.get("near_leaks", 0), split.get("shared_runs", 0))
        if split["outliers"]:
            first = split["longest"][0]
            place = f"{first['file']}:{first['line']}"
            texts.append(
                f"{name}: {counted(split['outliers'], 'row')} far longer than the others, up to {first['tokens']} "
                f"tokens ({place})"
            )
    return texts + [leak_warning(name, count) for name, count in leaks.items() if count]


def _skipped(problems: dict[str, list[Problem]], on_bad_row: str) -> list[str]:
    """What training would say of rows that it leaves out, where it may."""
    if on_bad_row != SKIP:
        return []
    of_rows = {name: [problem for problem in bad if not problem.of_file] for name, bad in problems.items()}
    return [f"{name}: {text}" for name, bad in of_rows.items() for text in tolerated(bad, on_bad_row)]


def _shown(example: Example) -> dict[str, Any]:
    return {
        "text": example.text,
        "trained_spans": [list(span) for span in example.spans],
        "file": example.file,
        "line": example.line,
    }
