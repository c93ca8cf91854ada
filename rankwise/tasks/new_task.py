"""A new task by its vector alone: everything learned stays as it is, and a few hundred numbers are fitted.

The vector starts as the mean of those that are there, which for vectors alike is what the shared adapter does anyhow.
No other parameter takes a gradient, so no other task changes by a bit.

Legend: E entries of a vector (the shared adapter's ranks, summed over layers, or one rank).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from rankwise.adapters.gate_config import check_names
from rankwise.attach.gates import mixture_of, on_task, train_parts
from rankwise.errors import RequestError, WorkError

DEFAULT_LR = 0.05
"""Of Adam on entries that are near 1."""


@dataclass(frozen=True)
class LearnedTask:
    """What `learn_task` did: how many numbers it fitted, out of how many of the whole adapter, and each step's loss."""

    parameters: int
    share_of_adapter: float
    losses: list[float]


def add_task(model: nn.Module, task: str) -> nn.Parameter:
    """Gives the attached task embedding one more task, whose vector is the mean of the others', and returns it.

    From then on that vector alone is trained (`rankwise.train_parts(model, ["embedding:NAME"])`).

    Raises: RequestError for a gate (whose tasks have adapters of their own), a name that is there or can't be used.
    """
    mixture = mixture_of(model)
    if mixture.embedding is None:
        raise RequestError(
            f"task '{task}' can't be added to a gate, whose tasks have an adapter each: train one and attach the gate "
            "anew with it; a vector alone is for task embeddings"
        )
    check_names([*mixture.tasks, task])
    vectors = [vector.detach() for vector in mixture.vectors]
    vector = nn.Parameter(torch.stack(vectors).mean(0))
    mixture.vectors.append(vector)
    mixture.tasks = (*mixture.tasks, task)
    train_parts(model, [f"embedding:{task}"])
    return vector


def learn_task(
    model: nn.Module,
    task: str,
    loss: Callable[[int], Tensor],
    steps: int = 50,
    lr: float = DEFAULT_LR,
) -> LearnedTask:
    """Adds `task` to the attached task embedding and fits its vector, by Adam.

    Args:
        model: with task embeddings attached.
        task: the new task's name.
        loss: gives the loss of step 1, 2, ... (of a batch of its rows); the model is on the task then.
        steps: how many.
        lr: Adam's rate.

    Raises: RequestError, as `add_task`; WorkError, with the task taken away again, when a loss is not finite.
    """
    if steps < 1 or not 0 < lr < math.inf:
        raise RequestError(f"steps ({steps}) must be at least 1, and lr ({lr:g}) above 0")
    vector = add_task(model, task)
    mixture = mixture_of(model)
    optimizer = torch.optim.Adam([vector], lr=lr)
    losses: list[float] = []
    try:
        with on_task(model, task):
            for step in range(1, steps + 1):
                optimizer.zero_grad(set_to_none=True)
                value = loss(step)
                losses.append(float(value.detach()))
                if not math.isfinite(losses[-1]):
                    raise WorkError(f"task '{task}': the loss of step {step} is {losses[-1]}; lower lr ({lr:g})")
                value.backward()
                optimizer.step()
    except BaseException:
        mixture.tasks = mixture.tasks[:-1]
        mixture.vectors = nn.ParameterList(list(mixture.vectors)[:-1])
        raise
    own = sum(other.numel() for other in mixture.vectors) + sum(
        parameter.numel() for name, parameter in model.named_parameters() if ".lora_A." in name or ".lora_B." in name
    )
    return LearnedTask(vector.numel(), vector.numel() / own, losses)
