"""What a head says: the names of its classes in order, or how an embedding is pooled; beside an adapter, `head.json`.

PEFT's folder has no place for these, and without them its weights can't be read: a row of logits is nothing without
names. A model folder has them in its own config.json (`id2label`, `problem_type`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from rankwise.errors import RequestError

SINGLE, MULTI = "single_label_classification", "multi_label_classification"
"""transformers' names for one class of several, and any number of them."""
POOLINGS = ("mean", "cls", "last")


@dataclass(frozen=True)
class Labels:
    """Names of classes; the place of a name is its number. `is_multi`: a row may have any number of them."""

    names: tuple[str, ...]
    is_multi: bool = False

    @property
    def ids(self) -> dict[str, int]:
        """Numbers by name."""
        return {name: index for index, name in enumerate(self.names)}

    @property
    def problem_type(self) -> str:
        """The name that transformers has for it."""
        return MULTI if self.is_multi else SINGLE

    def to_config(self) -> dict[str, Any]:
        """The fields of a model's config."""
        return {
            "num_labels": len(self.names),
            "id2label": dict(enumerate(self.names)),
            "label2id": self.ids,
            "problem_type": self.problem_type,
        }


@dataclass(frozen=True)
class Head:
    """The content of `head.json`: `labels` of a classifier, or `pooling` (one of POOLINGS) of an embedding model."""

    labels: Labels | None = None
    pooling: str | None = None

    def to_dict(self) -> dict[str, Any]:
        """As plain values for JSON."""
        if self.labels is None:
            return {"pooling": self.pooling, "normalised": True}
        return {"labels": list(self.labels.names), "problem_type": self.labels.problem_type}


def head_from_dict(fields: Mapping[str, Any], where: str) -> Head:
    """What `Head.to_dict` gave; `where` names the file in messages.

    Raises: RequestError for anything else.
    """
    names, kind, pooling = fields.get("labels"), fields.get("problem_type"), fields.get("pooling")
    if isinstance(names, list) and names and all(isinstance(name, str) for name in names) and kind in (SINGLE, MULTI):
        if len(set(names)) != len(names):
            raise RequestError(f"'{where}' names a label twice; each needs a name of its own")
        return Head(labels=Labels(tuple(names), kind == MULTI))
    if pooling in POOLINGS:
        return Head(pooling=pooling)
    raise RequestError(
        f"'{where}' must hold `labels` (a list of names) and `problem_type` ({SINGLE} or {MULTI}), or `pooling` "
        f"({', '.join(POOLINGS)}); it holds {', '.join(fields) or 'nothing'}"
    )
