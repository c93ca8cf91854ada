"""Rows held out of the training data where there is no file of validation rows.

By hash, the default: a row is held out if the hash of what it says is small enough. Rows that say the same are on the
same side, so nothing leaks; the side of a row does not depend on where it stands, so reordering the file, or adding
rows to it, moves no other row across (with a number of rows in place of a fraction, at most a few near the limit). By
a column: the same with the hash of the row's value in it, so that a speaker, a document or a user is on one side only.
By row: so many rows by chance, whatever they say.
"""

from __future__ import annotations

import numpy as np

from rankwise.data.packing import epoch_order

AUTO_SHARE = 0.05
AUTO_MOST_ROWS = 200
AUTO_LEAST_ROWS = 100
"""`auto` holds out so much, at most so many rows, and nothing of fewer rows than that."""

ROW_SEED = 0
_RANGE = 2**64


def auto_rows(num_rows: int) -> int:
    """How many rows `auto` holds out."""
    return min(round(AUTO_SHARE * num_rows), AUTO_MOST_ROWS) if num_rows >= AUTO_LEAST_ROWS else 0


def held_out_by_key(keys: np.ndarray, amount: int | float) -> np.ndarray:
    """Which rows are held out, [n] booleans. `keys`: [n] hashes; `amount`: a number of rows, or a fraction of them.

    A fraction is of the hashes' range, so about that part of the rows, and the same rows however many others there are.
    A number of rows is met by the smallest hashes; rows of one hash go together, which may make it a few more.
    """
    mixed = _mixed(keys)
    if isinstance(amount, float):
        return mixed < np.uint64(int(amount * _RANGE))
    if amount == 0:
        return np.zeros(len(keys), dtype=bool)
    limit = np.partition(mixed, min(amount, len(mixed)) - 1)[min(amount, len(mixed)) - 1]
    return mixed <= limit


def held_out_by_row(num_rows: int, amount: int | float) -> np.ndarray:
    """Which rows are held out, [n] booleans: so many of them, by chance."""
    count = round(amount * num_rows) if isinstance(amount, float) else amount
    chosen = np.zeros(num_rows, dtype=bool)
    chosen[epoch_order(num_rows, ROW_SEED, 0)[:count]] = True
    return chosen


def _mixed(keys: np.ndarray) -> np.ndarray:
    """The hashes, permuted, so that being held out says nothing about any other use of them."""
    return keys * np.uint64(0x9E3779B97F4A7C15)
