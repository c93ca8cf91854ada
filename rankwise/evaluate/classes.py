"""What a classifier gets right, beside its loss: accuracy and F1, 0 to 1.

| rows | accuracy | f1 |
| --- | --- | --- |
| one label each | rows | macro: the mean of each label's F1 |
| several labels each | rows with exactly their labels | micro: over all labels of all rows |
| tags B-, I-, E-, S- and O | words | of entities: micro, right when its type and both ends are |
| other tags | words | macro |

Entities as in CoNLL 2003 (Sang and De Meulder 2003, W03-0419, section 3.2). One begins at B- or S-, at a type that
differs from the tag before, and after O, E- or S-; so a sequence that begins with I- is read as conlleval reads it.
"""

from __future__ import annotations

import re
from collections.abc import Sequence, Set
from typing import Any

_ENTITY = re.compile(r"O|[BIES]-.+")

Said = Sequence[int]
"""A row's classes by number: one; 0 or 1 for each; one for each of its tagged words."""


def accuracy(answers: Sequence[Said], truths: Sequence[Said], is_tagged: bool) -> float:
    """Share of rows (of tagged words) that are right."""
    if is_tagged:
        pairs = [pair for one, other in zip(answers, truths, strict=True) for pair in zip(one, other, strict=True)]
        return sum(a == b for a, b in pairs) / len(pairs)
    return sum(list(a) == list(b) for a, b in zip(answers, truths, strict=True)) / len(truths)


def f1(answers: Sequence[Said], truths: Sequence[Said], names: Sequence[str], is_multi: bool) -> float:
    """F1 as the table above has it; `names`: of the classes."""
    if is_multi:
        found = {(row, k) for row, one in enumerate(answers) for k, value in enumerate(one) if value}
        wanted = {(row, k) for row, one in enumerate(truths) for k, value in enumerate(one) if value}
        return _f1(found, wanted)
    if all(_ENTITY.fullmatch(name) for name in names):
        found = {(row, *e) for row, one in enumerate(answers) for e in entities([names[k] for k in one])}
        wanted = {(row, *e) for row, one in enumerate(truths) for e in entities([names[k] for k in one])}
        return _f1(found, wanted)
    found = {(row, place, k) for row, one in enumerate(answers) for place, k in enumerate(one)}
    wanted = {(row, place, k) for row, one in enumerate(truths) for place, k in enumerate(one)}
    classes = {k for *_, k in found | wanted}  # scikit-learn's macro average: those that are said or true at all
    return sum(_f1({x for x in found if x[-1] == k}, {x for x in wanted if x[-1] == k}) for k in classes) / len(classes)


def entities(tags: Sequence[str]) -> set[tuple[int, int, str]]:
    """First and last place and type of each entity of one row's tags."""
    found: set[tuple[int, int, str]] = set()
    start, kind, ended = 0, "", True  # `ended`: the tag before does not go on
    for place, tag in enumerate([*tags, "O"]):
        letter, _, own = tag.partition("-")
        if kind and (own != kind or letter in "BSO" or ended):
            found.add((start, place - 1, kind))
            kind = ""
        if own and not kind:
            start, kind = place, own
        ended = letter in "OES"
    return found


def _f1(found: Set[Any], wanted: Set[Any]) -> float:
    """2 |both| / (|found| + |wanted|); 1 when there is nothing to find and nothing was found."""
    return 2 * len(found & wanted) / (len(found) + len(wanted)) if found or wanted else 1.0
