"""What a row says as a number of 64 bits, wherever it stands: so rows are compared and split without being held.

Two different rows share a number with a chance of 1 in 2**64; among a million rows, any two with 1 in 37 million.
"""

from __future__ import annotations

import hashlib
from dataclasses import MISSING, fields
from typing import Any

from rankwise.data.fields import LABEL, TAG, Turn
from rankwise.data.rows import Row

_PLACE = ("file", "line", "turns", "group")
_MORE = tuple((field.name, field.default) for field in fields(Row) if field.name not in _PLACE)
_TURN_MORE = tuple((field.name, field.default) for field in fields(Turn) if field.name not in ("role", "content"))


def row_key(row: Row) -> int:
    """A hash of everything in the row but its place, its group, and what is said of it (labels and tags). Fields at
    their defaults do not count: rows keep their number when `Row` gets a new field."""
    parts: list[str] = []
    for turn in row.turns:
        if turn.role in (LABEL, TAG):
            continue
        parts += (turn.role, turn.content)
        _add_others(parts, turn, _TURN_MORE)
    _add_others(parts, row, _MORE)
    return text_key("\0".join(parts))


def row_group(row: Row) -> int:
    """A hash of the row's group; 0 for none."""
    return 0 if row.group is None else text_key(row.group)


def _add_others(parts: list[str], value: Any, names: tuple[tuple[str, Any], ...]) -> None:
    for name, default in names:
        content = getattr(value, name)
        if default is MISSING or content != default:
            parts.append(f"{name}={content!r}")


def text_key(text: str) -> int:
    """A hash of a text, from 0 to 2**64 - 1."""
    return int.from_bytes(hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).digest(), "little")
