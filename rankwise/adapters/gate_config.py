"""How several adapters on one model share the work: the settings of a gate, and of task embeddings. No torch here."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from rankwise.errors import RequestError, did_you_mean

HARD, SOFT, TOP_K, INFERRED = "hard", "soft", "top-k", "inferred"
MODES = (HARD, SOFT, TOP_K, INFERRED)
LEARNED = (SOFT, TOP_K)
"""Modes with logits: a fixed mixture, whatever the input."""

GLOBAL, LAYER, MODULE = "global", "layer", "module"
PER_GATE = (GLOBAL, LAYER, MODULE)
SHARED = "shared"
PER_EMBEDDING = (LAYER, SHARED)

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,63}")
"""Of a task and of an adapter's folder: it can't leave the folder that it is in."""


@dataclass(frozen=True)
class GateConfig:
    """What decides by how much each task's adapter takes part.

    Args:
        mode: `hard`: the adapter of the row's (or token's) task; `soft`: softmax(logits / temperature), the same for
            all inputs; `top-k`: the k largest of these, renormalised; `inferred`: as hard, and where no task is given a
            small classifier on the base's pooled hidden state picks it, once for each row.
        per: who has logits of its own: `global` (one set, the default), `layer` (each transformer block) or `module`.
        temperature: of the softmax; above 0. 1 by default.
        k: for `top-k`: how many adapters take part.
    """

    mode: str = HARD
    per: str | None = None
    temperature: float | None = None
    k: int | None = None

    def __post_init__(self) -> None:
        if self.mode not in MODES:
            raise RequestError(f"unknown gate mode {self.mode!r}{did_you_mean(str(self.mode), MODES)}")
        for name, value in (("per", self.per), ("temperature", self.temperature)):
            if value is not None and self.mode not in LEARNED:
                raise RequestError(
                    f"gate {name}={value!r} has no effect with mode '{self.mode}', which has no logits; leave it out, "
                    f"or choose {' or '.join(LEARNED)}"
                )
        if self.per is not None and self.per not in PER_GATE:
            raise RequestError(f"unknown gate per {self.per!r}{did_you_mean(str(self.per), PER_GATE)}")
        if self.temperature is not None and not 0 < self.temperature < math.inf:
            raise RequestError(f"gate temperature must be above 0, not {self.temperature!r}")
        if self.k is not None and self.mode != TOP_K:
            raise RequestError(f"gate k={self.k!r} has no effect with mode '{self.mode}'; it is for '{TOP_K}'")
        if self.mode == TOP_K and (type(self.k) is not int or self.k < 1):
            raise RequestError(f"gate mode '{TOP_K}' needs k, a whole number from 1, not {self.k!r}")

    def check_tasks(self, tasks: Iterable[str]) -> None:
        """Raises: RequestError for a k that leaves no adapter out."""
        number = len(list(tasks))
        if self.k is not None and self.k >= number:
            raise RequestError(
                f"gate k={self.k} leaves none of the {number} adapters out; lower it, or choose mode '{SOFT}'"
            )


@dataclass(frozen=True)
class EmbeddingConfig:
    """A learned vector for each task that scales the rank space of one shared adapter, B diag(e_t) A.

    Args:
        per: `layer`: each adapted layer has its own part of the vector; `shared`: all use the same numbers, which needs
            one rank for all layers.
    """

    per: str = LAYER

    def __post_init__(self) -> None:
        if self.per not in PER_EMBEDDING:
            raise RequestError(f"unknown embedding per {self.per!r}{did_you_mean(str(self.per), PER_EMBEDDING)}")


def check_names(tasks: Iterable[Any], what: str = "task") -> None:
    """Raises: RequestError when there is none, one stands twice, or a name could not be that of a folder."""
    names = list(tasks)
    if not names:
        raise RequestError(f"there is no {what}; name at least one")
    for name in names:
        if not isinstance(name, str) or NAME.fullmatch(name) is None:
            raise RequestError(
                f"{what} name {name!r} can't be used: take letters, digits, - and _ (at most 64, no - or _ in front)"
            )
        if names.count(name) > 1:
            raise RequestError(f"{what} '{name}' is there twice; drop one")
    folded: dict[str, str] = {}
    for name in names:  # folders on disks that don't tell capitals apart
        other = folded.setdefault(name.lower(), name)
        if other != name:
            raise RequestError(f"{what} names '{other}' and '{name}' differ in capitals only; rename one")
