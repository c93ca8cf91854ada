"""What loading gives: examples, and what became of the rows they were made of."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from rankwise.data.store import Examples
from rankwise.errors import counted


@dataclass(frozen=True)
class Loaded:
    """Examples, and what became of the rows.

    `format`, `why`: the formats found, and by what; `num_rows`: rows read; `num_truncated`: rows that were longer than
    `max_length`; `num_emptied`: those of them that lost every trained token and were dropped; `notes`: choices made for
    the user; `warnings`: what is probably a mistake.
    """

    examples: Examples
    format: str
    why: str
    num_rows: int
    num_truncated: int
    num_emptied: int = 0
    notes: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()
    num_skipped: int = 0
    """Rows left out because they can't be used, where `data.on_bad_row` allows that."""
    how: str = ""
    """Where the examples come from, where a cache has to do with it."""


def num_leaked(examples: Examples, training: Examples) -> int:
    """How many rows are training rows too, compared by hashes of all that they say."""
    return int(np.isin(examples.column("key"), training.column("key")).sum())


def num_duplicates(examples: Examples) -> int:
    """How many rows are equal to an earlier one, by the same hashes."""
    keys = examples.column("key")
    return len(keys) - len(np.unique(keys))


def leak_warning(split: str, count: int) -> str:
    """What is said of leaked rows."""
    return f"{split}: {counted(count, 'row')} also in the training files"
