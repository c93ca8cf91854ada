"""Files to examples: rows are read one at a time, encoded a chunk at a time, written to disk and memory-mapped.

However many rows there are, memory holds some chunks and an index line for each row. What is written is kept in a cache
where that is worth it (`rankwise.data.cache`), and read back the next time, with the same counts, notes, warnings and
problems.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from rankwise.data.cache import cache_folder, entry
from rankwise.data.config import HUB_PREFIX, WHOLE, DataConfig, paths_of
from rankwise.data.encoder import Counts, Prompts
from rankwise.data.fingerprint import fingerprint
from rankwise.data.loaded import Loaded
from rankwise.data.rows import BadRows, Findings, Problem, Row, expand, iter_rows, tolerated
from rankwise.data.store import Examples, Store, StoreWriter
from rankwise.data.workers import Encoding, encoded_chunks, num_workers
from rankwise.errors import RequestError, WriteError, counted
from rankwise.models.labels import Labels
from rankwise.say import Say, to_stderr

Check = Callable[[str, str], None]
"""Takes the formats found so far and why; raises what is wrong with them."""

HUB_BYTES = 64 * 2**20
"""What a data set of the Hub is taken for when processes are counted: its size is not asked for."""


def load_examples(
    paths: str | Sequence[str],
    tokenizer: PreTrainedTokenizerBase,
    config: DataConfig,
    layout: str = WHOLE,
    say: Say = to_stderr,
    check: Check | None = None,
    labels: Labels | None = None,
) -> Loaded:
    """Reads files into examples, in the order of the files and their lines.

    Args:
        paths: of the files, as in the run file.
        tokenizer: a fast one.
        config: how they are read; its own `train`, `valid` and `test` do not count.
        layout: a key of `rankwise.data.layouts.LAYOUTS`, or one of `rankwise.data.head_encoder.HEAD_LAYOUTS`.
        say: takes what happened to the cache, a line at a time.
        check: called with the formats found and why as soon as a file's is known, before its rows are encoded.
        labels: of the training rows, for a layout with classes: any other one is a problem of its row.

    Raises: BadRows with every row that can't be used; RequestError for files that can't be read, a format that can't
        be told, a template that can't be used, or when no row has a trained token; WorkError when the disk is full.
    """
    loaded, problems = accepted(*load_split(paths, tokenizer, config, layout, say, check, labels), config.on_bad_row)
    if problems:
        raise BadRows(problems)
    check_any(loaded, paths, config)
    return loaded


def accepted(loaded: Loaded, problems: Sequence[Problem], on_bad_row: str) -> tuple[Loaded, list[Problem]]:
    """What `load_split` gave, with the problems that may not be: those that may are counted and said."""
    try:
        skipped = tolerated(problems, on_bad_row)
    except BadRows as bad:
        return loaded, bad.problems
    if problems and not loaded.num_rows:
        return loaded, list(problems)
    return replace(loaded, warnings=(*skipped, *loaded.warnings), num_skipped=len(problems)), []


def check_any(loaded: Loaded, paths: str | Sequence[str], config: DataConfig) -> None:
    """Raises: RequestError when no row has a trained token."""
    if not len(loaded.examples):
        files = ", ".join(paths_of(paths) if isinstance(paths, str) else paths)
        raise RequestError(
            f"none of the {loaded.num_rows} rows of {files} has a trained token within data.max_length="
            f"{config.max_length}: every answer begins later; raise data.max_length"
        )


def load_split(
    paths: str | Sequence[str],
    tokenizer: PreTrainedTokenizerBase,
    config: DataConfig,
    layout: str = WHOLE,
    say: Say = to_stderr,
    check: Check | None = None,
    labels: Labels | None = None,
) -> tuple[Loaded, list[Problem]]:
    """As `load_examples`, with the rows that can't be used beside the examples of the others; these raise nothing.

    Raises: RequestError for files that can't be read, a format that can't be told, or a template that can't be used.
    """
    files = expand(paths)
    data_bytes = sum(HUB_BYTES if file.startswith(HUB_PREFIX) else Path(file).stat().st_size for file in files)
    workers = num_workers(config.workers, data_bytes)
    root = cache_folder(config.cache, data_bytes)

    def build(folder: Path) -> dict[str, Any]:
        return _written(folder, _Rows(paths, config, check), Encoding(tokenizer, config, layout, labels), workers)

    began = time.perf_counter()
    if root is None:
        with tempfile.TemporaryDirectory(prefix="rankwise-") as name:
            try:
                content = build(Path(name))
            except OSError as error:
                raise WriteError(name, error.strerror or str(error)) from error
            return _opened(Path(name), content, config, "")
    with entry(root, fingerprint(files, tokenizer, config, layout, labels), build, say) as found:
        how = f"read from the cache in '{found.folder}'"
        if found.was_there and check is not None:
            check(found.content["format"], found.content["why"])
        if not found.was_there:
            seconds = time.perf_counter() - began
            by = f" by {workers} processes" if workers > 1 else ""
            how = f"encoded in {seconds:.1f} s{by}, cached in '{found.folder}'"
        return _opened(found.folder, found.content, config, how)


class _Rows:
    """The rows of files, one at a time; what else is found stands in `found` and `problems` once they are through."""

    def __init__(self, paths: str | Sequence[str], config: DataConfig, check: Check | None) -> None:
        self._paths, self._reading, self._check = paths, config.reading, check
        self.found = Findings()
        self.problems: list[Problem] = []

    def __iter__(self) -> Iterator[Row]:
        checked = 0
        for item in iter_rows(self._paths, self.found, self._reading):
            if self._check is not None and checked < len(self.found.reasons):
                self._check(*_formats(self.found))
                checked = len(self.found.reasons)
            if isinstance(item, Row):
                yield item
            else:
                self.problems.append(item)


def _formats(found: Findings) -> tuple[str, str]:
    return ", ".join(found.formats), "; ".join(found.reasons)


def _written(folder: Path, rows: _Rows, encoding: Encoding, workers: int) -> dict[str, Any]:
    """Reads and encodes all rows into the folder, and returns everything else that was found, as JSON's values."""
    counts = Counts()
    prompts: dict[str, Prompts] = {}
    notes: dict[str, None] = {}
    refused: list[Problem] = []
    with StoreWriter(folder) as writer:
        for chunk in encoded_chunks(rows, encoding, workers):
            writer.add(chunk.records)
            counts.add(chunk.rest.counts)
            for file, part in chunk.rest.prompts.items():
                prompts.setdefault(file, part).add(part)
            notes |= dict.fromkeys(chunk.rest.notes)
            refused += chunk.rest.problems
    format, why = _formats(rows.found)
    return {
        "files": list(writer.files),
        "instructions": {file: part.instruction for file, part in prompts.items()},
        "counts": asdict(counts),
        "format": format,
        "why": why,
        "num_blank": rows.found.num_blank,
        "notes": [*rows.found.notes, *notes],
        "problems": [asdict(problem) for problem in (*rows.problems, *refused)],
    }


def _opened(folder: Path, content: dict[str, Any], config: DataConfig, how: str) -> tuple[Loaded, list[Problem]]:
    """What `_written` wrote and returned."""
    counts = Counts(**content["counts"])
    blank = (f"{counted(content['num_blank'], 'blank line')} skipped",) if content["num_blank"] else ()
    weighted = (f"{counted(counts.weighted, 'row')} with answers of a weight other than 0 and 1",)
    loaded = Loaded(
        examples=Examples([Store(folder, content["files"], content["instructions"])]),
        format=content["format"],
        why=content["why"],
        num_rows=counts.rows,
        num_truncated=counts.truncated,
        num_emptied=counts.emptied,
        notes=(*blank, *(weighted if counts.weighted else ()), *content["notes"]),
        warnings=_warnings(counts, config),
        how=how,
    )
    return loaded, [Problem(**problem) for problem in content["problems"]]


def _warnings(counts: Counts, config: DataConfig) -> tuple[str, ...]:
    length = f"data.max_length={config.max_length}"
    texts = {
        f"cut at {length}: what lies beyond is not trained on": counts.truncated - counts.emptied,
        f"left out: no token of an answer is within {length}": counts.emptied,
        "with an answer that begins inside a token of its header; that token is not trained on": counts.merged,
        "with a prompt that is tokenised otherwise alone than in front of its answer": counts.apart,
        "with special tokens of the tokenizer written in the text; they are read as those tokens": counts.special,
    }
    words = f"{counted(counts.words, 'word')} whose tag is not learned: beyond {length}, or without a token"
    return (
        *(f"{counted(count, 'row')} {text}" for text, count in texts.items() if count),
        *([words] if counts.words else []),
    )
