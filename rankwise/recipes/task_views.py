"""What is measured of a target: its base and itself; of several adapters under a gate also each alone, and their mean.

`adapter` is the target itself, as it would answer: the gate's own mixture, the task that was asked for, or the task
that its classifier finds for each row.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass

from torch import nn

from rankwise.adapters.gate_config import INFERRED
from rankwise.attach.gates import on_task
from rankwise.attach.inject import disabled
from rankwise.recipes.target import Target

BASE, ADAPTER, UNIFORM, ROUTED = "base", "adapter", "uniform", "inferred"


@dataclass(frozen=True)
class View:
    """One line of a table.

    Args:
        name: of the line.
        given: the task, or shares of tasks, that are given; None: nothing is.
        is_base: the base alone.
        is_routed: the task is the one that the classifier finds for each row.
    """

    name: str
    given: str | dict[str, float] | None = None
    is_base: bool = False
    is_routed: bool = False


def views_of(target: Target) -> list[View]:
    """The lines of an evaluation, in order. What a gate needs of the request: see `need_task`."""
    if target.adapter is None:
        return [View(target.name)]
    base, own = View(BASE, is_base=True), View(ADAPTER, target.task)
    if target.gate is None:
        return [base, own]
    tasks = target.gate.tasks
    alone = [View(f"task:{task}", task) for task in tasks]
    mean = [View(UNIFORM, dict.fromkeys(tasks, 1.0 / len(tasks)))] if len(tasks) > 1 else []
    gate = target.gate.gate
    if gate is not None and gate.mode == INFERRED:
        routed = View(ROUTED if target.task else ADAPTER, is_routed=True)
        return [base, *alone, *mean, *([own, routed] if target.task else [routed])]
    if gate is not None and gate.mode != "hard":
        own = View(ADAPTER)  # the learned mixture, whatever the rows are of
    return [base, *alone, *mean, own]


@contextlib.contextmanager
def seen(model: nn.Module, view: View) -> Iterator[None]:
    """In the block the model is what the view says. Routed ones say nothing here: their rows differ."""
    if view.is_base:
        with disabled(model):
            yield
    elif view.given is not None:
        with on_task(model, view.given):
            yield
    else:
        yield
