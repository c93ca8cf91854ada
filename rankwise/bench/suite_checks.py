"""Suites and tasks that can be read and would still mislead: names of another type, things said twice or in vain.

Apart from `rankwise.bench.suite`, which what computes a cell imports: a check more makes no result stale.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rankwise.bench.kinds import UNTRAINED
from rankwise.bench.suite import RATES, SEVERAL, Suite
from rankwise.errors import RequestError

TEMPLATE = ("model", "data", "train")
"""The sections of a run file that a task has."""
SPLITS = ("train", "valid", "test")


def check_tasks(tasks: Mapping[str, Any], file: str) -> None:
    """Of a bench's `file` of tasks. Raises: RequestError for a task without what a cell needs."""
    for name, values in tasks.items():
        if name.startswith("."):
            continue
        if not isinstance(values, Mapping) or set(values) - set(TEMPLATE):
            raise RequestError(f"{file}: '{name}' must hold a run file's model:, data: and train:, without the others")
        data = values.get("data")
        for split in SPLITS:
            if not isinstance(data, Mapping) or not data.get(split):
                raise RequestError(
                    f"{file}: '{name}' has no data.{split}, and a bench trains, chooses and reports on rows of their "
                    f"own; name its file"
                )


def check_document(document: Mapping[str, Any]) -> None:
    """Of a suite's YAML, before it is read. Raises: RequestError, one line."""
    methods = document.get("methods")
    if not isinstance(methods, Mapping):
        raise RequestError(f"methods must be a mapping of names to settings, not {methods!r}")
    for name, settings in methods.items():
        if not isinstance(name, str):
            raise RequestError(f"a method's name must be text, not {name!r}; put it in quotes")
        rate = settings.get("lr") if isinstance(settings, Mapping) else None
        if rate == []:
            raise RequestError(f"methods.{name}.lr is an empty list; give a rate, or several to choose from")
        other = methods.get(rate) if isinstance(rate, str) else None
        if isinstance(other, Mapping) and isinstance(other.get("lr"), str):
            raise RequestError(f"methods.{name}.lr: '{rate}' has the rates of '{other['lr']}' itself; name that one")


def check_suite(suite: Suite, document: Mapping[str, Any]) -> None:
    """Of a suite and the YAML that it was read from. Raises: RequestError for what is said twice, or has no effect."""
    _check_once("tasks", suite.tasks)
    _check_once("tuning.tasks", suite.tuning.tasks)
    if suite.answers is not None:
        _check_once("answers.methods", suite.answers.methods)
    if suite.table == RATES:
        untrained = next((name for name, method in suite.methods.items() if method.kind in UNTRAINED), None)
        if untrained is not None:
            kind = suite.methods[untrained].kind
            raise RequestError(
                f"methods.{untrained}: kind: {kind} has no rate to compare; leave it out of table: {RATES}"
            )
    if document.get("tuning") and not any(suite.is_tuned(name) for name in suite.methods):
        raise RequestError("tuning has no effect: no method has rates to choose from; leave it out")
    if suite.table == SEVERAL and suite.share_of is not None:
        raise RequestError(f"share_of has no effect in table: {SEVERAL}; leave it out")
    for place, gain in (("margin", suite.margin), ("share_of", suite.share_of)):
        if gain is not None and gain.base == gain.to:
            raise RequestError(f"{place}: from '{gain.base}' to '{gain.to}' there is no gain; name two methods")


def _check_once(place: str, names: Sequence[str]) -> None:
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise RequestError(f"{place}: '{twice}' stands there twice; leave one out")
