"""Rows that say nearly the same, and rows that share a long run of words with training rows.

Near: at least `NEAR` of the sets of three words in a row are common to both (Jaccard), found by MinHash with locality
sensitive hashing (Broder 1997, "On the resemblance and containment of documents"; the library datasketch) and then
measured exactly, so that no pair is wrongly near; a pair just above the bound may be missed. Shared runs: 13 words in a
row (Brown et al. 2020, arXiv 2005.14165, appendix C). Words are lower case and without punctuation; each letter of
Chinese, Japanese and Korean is a word of its own.

What is compared is what a row says: the question without the file's shared instruction, and the answer; or the text.
"""

from __future__ import annotations

import re
import zlib
from collections.abc import Iterator, Sequence, Set
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from rankwise.data.example import Example
from rankwise.data.store import Examples
from rankwise.errors import counted

if TYPE_CHECKING:
    from datasketch import MinHash

NEAR = 0.8
SHINGLE_WORDS = 3
RUN_WORDS = 13
PERMUTATIONS = 64
MOST_ROWS = 20_000
"""Training rows compared for nearness: of more, evenly spread ones. Shared runs are looked for in all of them."""
FEW_ROWS = 1_000
"""Training rows, and rows of the other split, that are looked at before every run."""

_LETTERS = "\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uac00-\ud7af"
_WORD = re.compile(rf"[{_LETTERS}]|[^\W{_LETTERS}]+")


@dataclass(frozen=True)
class Overlap:
    """Of one split: rows near an earlier one, rows near a training row, rows that share a run of words with one.

    Rows that are equal, letter by letter, are not in these: they are duplicates and leaks. `num_compared`: training
    rows that were compared for nearness, of `num_training`.
    """

    near_duplicates: int
    near_leaks: int
    shared_runs: int
    num_compared: int
    num_training: int


def near_warnings(split: str, near: int, shared: int) -> list[str]:
    """What is said of rows that are not training rows, but nearly."""
    texts = [f"{split}: {counted(near, 'row')} nearly equal to a training row"] if near else []
    if shared:
        texts.append(f"{split}: {counted(shared, 'row')} with {RUN_WORDS} words in a row that a training row has too")
    return texts


def said(example: Example) -> str:
    """What a row says, without what the template and a shared instruction add."""
    asked = f"{example.source or example.prompt_text}\n{example.answer}"
    return asked if asked.strip() else example.text


def words_of(text: str) -> list[str]:
    """The words of a text."""
    return _WORD.findall(text.lower())


def runs_of(words: Sequence[str], length: int) -> set[int]:
    """A number for each run of `length` words; one for all of them where there are fewer."""
    if len(words) <= length:
        return {zlib.crc32(" ".join(words).encode("utf-8", "surrogatepass"))} if words else set()
    texts = (" ".join(words[start : start + length]) for start in range(len(words) - length + 1))
    return {zlib.crc32(text.encode("utf-8", "surrogatepass")) for text in texts}


class NearIndex:
    """Rows by what they say; asked for one that is near another."""

    def __init__(self) -> None:
        from datasketch import MinHashLSH

        self._index = MinHashLSH(threshold=NEAR, num_perm=PERMUTATIONS)
        self._sets: list[set[int]] = []
        self._keys: list[int] = []

    def has_near(self, shingles: set[int], key: int) -> bool:
        """Whether some row in here is near, other than those that are equal (of the same `key`)."""
        if not shingles:
            return False
        found = (int(str(place)) for place in self._index.query(_sketch(shingles)))
        return any(self._keys[place] != key and _likeness(self._sets[place], shingles) >= NEAR for place in found)

    def add(self, shingles: set[int], key: int) -> None:
        """Takes a row in."""
        if not shingles:
            return
        self._index.insert(len(self._sets), _sketch(shingles), check_duplication=False)
        self._sets.append(shingles)
        self._keys.append(key)


def _sketch(shingles: set[int]) -> MinHash:
    from datasketch import MinHash

    sketch = MinHash(num_perm=PERMUTATIONS, hashfunc=int)
    sketch.update_batch(sorted(shingles))
    return sketch


def _likeness(one: set[int], other: set[int]) -> float:
    return len(one & other) / len(one | other)


def overlaps(splits: dict[str, Examples], most_rows: int = MOST_ROWS) -> dict[str, Overlap]:
    """The overlap of each split with itself and with `train`, which must be one of them."""
    train = splits["train"]
    keys = train.column("key")
    index = NearIndex()
    chosen = _spread(len(train), most_rows)
    near_in_train = _near(index, ((int(row), train[int(row)]) for row in chosen), keys, grows=True)
    result = {"train": Overlap(near_in_train, 0, 0, len(chosen), len(train))}
    others = {name: examples for name, examples in splits.items() if name != "train"}
    shared = shared_runs(others, train)
    for name, examples in others.items():
        own = examples.column("key")
        most = range(min(len(examples), most_rows))
        near = _near(index, ((row, examples[row]) for row in most), own, grows=False, apart=set(keys.tolist()))
        duplicates = _near(NearIndex(), ((row, examples[row]) for row in most), own, grows=True)
        result[name] = Overlap(duplicates, near, shared[name], len(chosen), len(train))
    return result


def overlap_in_short(train: Examples, other: Examples) -> Overlap:
    """The overlap of `other` with `train`, looked for in few rows of both: for the beginning of every run."""
    few = {name: examples.at(_spread(len(examples), FEW_ROWS)) for name, examples in (("train", train), ("", other))}
    return overlaps(few)[""]


def _spread(count: int, most: int) -> np.ndarray:
    """At most `most` of `count` rows, evenly spread."""
    return np.unique(np.linspace(0, count - 1, min(most, count)).astype(np.int64)) if count else np.zeros(0, np.int64)


def _near(
    index: NearIndex,
    rows: Iterator[tuple[int, Example]],
    keys: np.ndarray,
    grows: bool,
    apart: Set[int] = frozenset(),
) -> int:
    """How many rows are near one in the index; `grows`: each is then taken in. Rows whose key is in `apart` are not."""
    count = 0
    for row, example in rows:
        key = int(keys[row])
        if key in apart:
            continue
        shingles = runs_of(words_of(said(example)), SHINGLE_WORDS)
        count += index.has_near(shingles, key)
        if grows:
            index.add(shingles, key)
    return count


def shared_runs(splits: dict[str, Examples], train: Examples) -> dict[str, int]:
    """For each split, rows with a run of 13 words that a training row has too; equal rows are not counted."""
    leaked = set(train.column("key").tolist())
    owners: dict[int, set[tuple[str, int]]] = {}
    for name, examples in splits.items():
        keys = examples.column("key")
        for row in range(len(examples)):
            words = words_of(said(examples[row])) if int(keys[row]) not in leaked else []
            for run in runs_of(words, RUN_WORDS) if len(words) >= RUN_WORDS else ():
                owners.setdefault(run, set()).add((name, row))
    found: set[tuple[str, int]] = set()
    if owners:
        for row in range(len(train)):
            words = words_of(said(train[row]))
            if len(words) >= RUN_WORDS:
                for run in runs_of(words, RUN_WORDS) & owners.keys():
                    found |= owners[run]
    return {name: sum(owner == name for owner, _ in found) for name in splits}
