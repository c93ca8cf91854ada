"""Lines for people, on stderr; stdout belongs to a command's result."""

from __future__ import annotations

import sys
from collections.abc import Callable

Say = Callable[[str], None]
"""Takes one line for people."""


def to_stderr(line: str) -> None:
    """Prints a line at once."""
    print(line, file=sys.stderr, flush=True)


def silent(line: str) -> None:
    """Takes a line and prints nothing."""
