"""The training loop: one function, with hooks between optimizer steps.

A step minimises the weighted sum of the losses of all its micro batches divided by the sum of the weights in the whole
step (each is 1, unless an answer has another), so that k micro batches equal one big batch, on one process or on many.
Everything else (evaluation, samples, logging, saving, interruption; growth of ranks and task schedules) is a hook: a
function of the finished `Step`. `loss` over several steps is the mean of theirs by trained tokens.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from rankwise import distributed
from rankwise.adapters.sharing import unchanging
from rankwise.errors import WorkError
from rankwise.train.evaluations import Evaluations
from rankwise.train.objective import Filler, MicroBatch, Objective, total_weight, weighted_sum
from rankwise.train.optim import trained_parameters
from rankwise.train.optimizers import set_learning_rate
from rankwise.train.scale import LossScale
from rankwise.train.statistics import Measure, Norms
from rankwise.train.watch import LossWatch


@dataclass(frozen=True)
class LoopPlan:
    """How many steps, at which rate (a function of the step, from 1), and the norm that gradients are clipped to.

    `patience`: evaluations in turn without a lower loss that end the run before its last step; None: none do.
    """

    num_steps: int
    learning_rate: Callable[[int], float]
    max_grad_norm: float | None = None
    patience: int | None = None
    measure: Measure | None = None
    """What is measured of each step's gradients, before they are clipped; None: nothing."""


@dataclass
class Progress:
    """How far a run has come; a checkpoint holds it whole."""

    step: int = 0
    num_tokens: int = 0
    num_trained_tokens: int = 0
    train_s: float = 0.0
    """Time spent in steps: evaluation, generation and saving are not in it."""
    loss: float | None = None
    """Mean loss of the last logged interval."""
    best_valid_loss: float | None = None
    interval_loss: float = 0.0
    """Sum of the losses since the last log line, over `interval_trained` tokens; with tokens and time likewise."""
    interval_trained: int = 0
    interval_tokens: int = 0
    interval_s: float = 0.0
    interval_figures: dict[str, list[float]] = field(default_factory=dict)
    """Sum and count of each figure of the objective's meter, likewise."""
    ranks: dict[str, int] = field(default_factory=dict)
    """Of all layers, where they have moved."""
    alphas: dict[str, float] = field(default_factory=dict)
    """Likewise: each follows from the one before, so that they can't be computed again to the last bit."""
    importance: list[list[float]] = field(default_factory=list)
    """What `ranks.policy: adaptive` remembers of each layer's components."""
    tasks: dict[str, Any] = field(default_factory=dict)
    """Where a run on several tasks stands with them: its stage, the tasks' shares and losses."""
    evaluations: Evaluations = field(default_factory=Evaluations)
    watch: LossWatch = field(default_factory=LossWatch)
    scale: LossScale = field(default_factory=LossScale)


@dataclass
class Step:
    """A finished optimizer step, as hooks and `on_step` see it. Hooks may add figures to `metrics`."""

    number: int
    num_steps: int
    loss: float
    lr: float
    grad_norm: float
    num_tokens: int
    num_trained_tokens: int
    seconds: float
    metrics: dict[str, Any] = field(default_factory=dict)
    is_skipped: bool = False
    """Whether its gradients overflowed fp16 (`grad_norm` is not finite then), and nothing was updated."""

    statistics: Norms = field(default_factory=dict)
    """What `LoopPlan.measure` gave; nothing for a step that was skipped."""
    stops_early: bool = False
    """Whether its evaluation was one too many without a lower loss."""

    @property
    def is_last(self) -> bool:
        """Whether the run ends with it."""
        return self.number == self.num_steps or self.stops_early


Hook = Callable[[Step], None]


def fit(
    model: PreTrainedModel,
    optimizer: torch.optim.Optimizer,
    batches: Callable[[int], list[MicroBatch]],
    objective: Objective,
    plan: LoopPlan,
    progress: Progress,
    hooks: Sequence[Hook] = (),
) -> Progress:
    """Trains from `progress.step` to `plan.num_steps`, calling each of `hooks` in order after every step.

    It ends before that when a hook has taken evaluations in (`progress.evaluations`) that are stale by `plan.patience`.

    `batches(step)` gives this process's micro batches of a step, on the model's device. `progress` is changed in place
    and returned. Hooks run with the gradients gone; one that raises ends the run.

    Raises: WorkError when nothing in a step carries a label, when no gradient reaches the parameters, or when the loss
        or the gradient is not finite (the parameters are then as before the step) or the loss diverges. In fp16 a step
        whose gradients overflow is skipped instead; its rows count as read, and its place in the schedule is taken.
    """
    while progress.step < plan.num_steps and not progress.evaluations.are_stale(plan.patience):
        step = take_step(model, optimizer, batches(progress.step + 1), objective, plan, progress)
        progress.watch.check(step.number, step.loss)
        for hook in hooks:
            hook(step)
    return progress


def take_step(
    model: PreTrainedModel,
    optimizer: torch.optim.Optimizer,
    micro_batches: Sequence[MicroBatch],
    objective: Objective,
    plan: LoopPlan,
    progress: Progress,
) -> Step:
    """One optimizer step on `micro_batches`; `progress` moves on by it. Raises: as `fit`."""
    started = time.perf_counter()
    number = progress.step + 1
    lr = plan.learning_rate(number)
    set_learning_rate(optimizer, lr)
    model.train()
    optimizer.zero_grad(set_to_none=True)
    scale = progress.scale
    with unchanging():
        loss, num_trained, num_tokens = accumulate(model, optimizer, micro_batches, objective, number, scale.factor)
    scale.unscale(trained_parameters(optimizer))
    statistics = plan.measure() if plan.measure is not None else {}
    grad_norm = clip_gradients(trained_parameters(optimizer), plan.max_grad_norm)
    is_finite = math.isfinite(grad_norm)
    if not math.isfinite(loss) or not (is_finite or scale.is_dynamic):
        what = f"the loss is {loss}" if not math.isfinite(loss) else f"the gradient's norm is {grad_norm}"
        raise WorkError(
            f"step {number}: {what}; lower train.lr ({lr:g} at this step), or try train.precision=fp32 if it was bf16 "
            "or fp16"
        )
    if number == 1 and grad_norm == 0:
        raise WorkError(
            "no gradient reaches the adapter: its layers take no part in the loss; change adapter.target_modules"
        )
    scale.update(number, is_finite)
    if is_finite:
        optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    seconds = time.perf_counter() - started
    progress.step = number
    progress.num_tokens += num_tokens
    progress.num_trained_tokens += num_trained
    progress.train_s += seconds
    progress.interval_loss += loss * num_trained
    progress.interval_trained += num_trained
    progress.interval_tokens += num_tokens
    progress.interval_s += seconds
    objective.meter.pour(progress.interval_figures)
    return Step(
        number, plan.num_steps, loss, lr, grad_norm, num_tokens, num_trained, seconds, is_skipped=not is_finite,
        statistics=statistics if is_finite else {},
    )  # fmt: skip


def accumulate(
    model: PreTrainedModel,
    optimizer: torch.optim.Optimizer,
    micro_batches: Sequence[MicroBatch],
    objective: Objective,
    number: int,
    factor: float = 1.0,
) -> tuple[float, int, int]:
    """Gradients of `factor` times the step's mean loss, over all micro batches and processes, into `.grad`.

    Returns that mean loss, the number of losses in it, and the number of tokens read.

    Raises: WorkError when there is no loss at all in the step, or it does not depend on any parameter.
    """
    counts = [0 if isinstance(batch, Filler) else objective.count(batch) for batch in micro_batches]
    weights = [None if isinstance(batch, Filler) else objective.weights(batch) for batch in micro_batches]
    own_weight = sum(total_weight(w, n) for w, n in zip(weights, counts, strict=True))
    own_tokens = sum(batch.num_tokens for batch in micro_batches)
    totals = torch.tensor([own_weight, sum(counts), own_tokens], dtype=torch.float64)  # exact up to 2**53
    distributed.all_reduce_sum([totals])
    weight, num_trained, num_tokens = float(totals[0]), int(totals[1]), int(totals[2])
    if num_trained == 0:
        raise WorkError(
            f"step {number}: not one of its {num_tokens} tokens is trained on; the answers are masked or cut off: see "
            "`rankwise data preview`, raise data.max_length, or drop the rows without an answer"
        )
    mean_loss = torch.zeros((), dtype=torch.float64)
    own = [batch for batch, n in zip(micro_batches, counts, strict=True) if n]
    losses_of_each = objective.losses_of(model, own)
    for batch, count, weights_of_batch in zip(micro_batches, counts, weights, strict=True):
        if isinstance(batch, Filler):
            with objective.meter.closed():
                losses = objective.losses(model, batch.batch)[:0]  # their sum is 0, and so are its gradients
        elif count == 0:
            continue
        else:
            losses = next(losses_of_each)
        assert losses.numel() == count, f"{losses.numel()} losses where {count} were counted"
        if not losses.requires_grad:
            raise WorkError("the loss does not depend on the adapter: nothing is attached or everything is frozen")
        share = weighted_sum(losses, weights_of_batch) / weight
        (share * factor).backward()
        mean_loss += share.detach().cpu().double()
    assert next(losses_of_each, None) is None  # to its end: other processes may wait for it there
    if distributed.world_size() > 1:
        gradients = [_gradient(parameter) for parameter in trained_parameters(optimizer)]
        distributed.all_reduce_sum([mean_loss, *gradients])
    return float(mean_loss), num_trained, num_tokens


def _gradient(parameter: nn.Parameter) -> Tensor:
    """Its gradient; zeros where this process had no batch for it, since all processes sum the same tensors."""
    if parameter.grad is None:
        parameter.grad = torch.zeros_like(parameter)
    return parameter.grad


def clip_gradients(parameters: Sequence[nn.Parameter], max_norm: float | None) -> float:
    """Scales the gradients down to a total norm of `max_norm` (None or 0: not); returns the norm before that."""
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    norm = nn.utils.get_total_norm(gradients)
    if max_norm:
        nn.utils.clip_grads_with_norm_(parameters, max_norm, norm)
    return float(norm)
