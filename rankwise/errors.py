"""What can go wrong, in two kinds: the request was wrong (exit code 2), or the work failed (exit code 1).

Every message is one line that names the thing, the value and the remedy. Programmer's mistakes stay `assert`s and
ordinary Python exceptions: they are not part of this hierarchy.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class RankwiseError(Exception):
    """An error that a user can act on. `code` is the exit code of the command line."""

    code: int = 1

    @property
    def message(self) -> str:
        """The text, in one line."""
        return " ".join(str(self).split())

    @property
    def details(self) -> list[str]:
        """Lines that are printed before the message, where there is more to say than one line holds."""
        return []


class RequestError(RankwiseError, ValueError):
    """The request was wrong: a bad value, a missing file, a setting without effect. Exit code 2."""

    code = 2


class WorkError(RankwiseError, RuntimeError):
    """The request was fine, the work failed: a diverging loss, a merge past its bound. Exit code 1."""

    code = 1


class WriteError(WorkError):
    """A file or folder could not be written: a full disk, a missing right. Exit code 1.

    Args:
        path: what was to be written.
        reason: the operating system's words.
    """

    def __init__(self, path: str, reason: str) -> None:
        super().__init__(f"cannot write '{path}': {reason}; free space or choose another folder")
        self.reason = reason


def counted(number: int, noun: str) -> str:
    """`1 row`, `2 rows`, `1,234 rows`."""
    return f"{number:,} {noun}" if number == 1 else f"{number:,} {noun}s"


def nearest(name: str, known: Iterable[str], most: int = 3) -> list[str]:
    """The known names closest to `name`, best first: by spelling, then by a shared last part (`a.b.q` and `q`)."""
    names = list(dict.fromkeys(known))
    close = difflib.get_close_matches(name, names, n=most, cutoff=0.6)
    if len(close) < most:
        tails = {known_name: known_name.rsplit(".", 1)[-1] for known_name in names}
        close_tails = difflib.get_close_matches(name.rsplit(".", 1)[-1], set(tails.values()), n=most, cutoff=0.6)
        for tail in close_tails:
            close += [known_name for known_name in names if tails[known_name] == tail and known_name not in close]
    return close[:most]


def did_you_mean(name: str, known: Iterable[str], most: int = 12) -> str:
    """The end of an error message: the nearest known names, or else what there is."""
    names = list(dict.fromkeys(known))
    close = nearest(name, names)
    if close:
        return "; did you mean " + " or ".join(f"'{n}'" for n in close) + "?"
    listed = ", ".join(names[:most]) + (", ..." if len(names) > most else "")
    return f"; known: {listed}" if names else "; there are none"
