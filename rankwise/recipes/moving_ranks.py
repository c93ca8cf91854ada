"""Ranks that move in a run: what all policies that move them have in common (`rank_movers` has the policies).

Whatever is drawn comes from the run's seed and the step, and what is decided from the model as it is then, or from what
a checkpoint holds: a run that goes on moves its ranks as the straight one does. Of several processes the first decides.
"""

from __future__ import annotations

import dataclasses
import hashlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from typing import Any

import torch
from transformers import PreTrainedModel

from rankwise import distributed
from rankwise.adapters.config import LoraConfig, start_name
from rankwise.adapters.starts import TAKEN_FROM_BASE
from rankwise.attach.attachment import need_attachment
from rankwise.attach.inject import adapter_parameters, adapter_tensors, ranks
from rankwise.errors import RequestError
from rankwise.ranks.config import ALPHAS, DEFAULT_EVERY, DEFAULT_SETTLE, MOVING, RESIZING, RanksConfig
from rankwise.ranks.dynamic import set_ranks
from rankwise.ranks.growth import ranked_layers
from rankwise.ranks.sizes import AdapterSizes, attached_sizes
from rankwise.recipes.run import RunConfig, StartFrom
from rankwise.say import Say
from rankwise.train.config import TrainConfig
from rankwise.train.every import Every
from rankwise.train.loop import Progress, Step

KEEP = ALPHAS[0]


class MoveSteps:
    """After which steps ranks may move: each period of `ranks.every`, before the part at the end in which they stay.

    Args:
        config: of the policy.
        train: how long the run is.
        rows_per_epoch: for a period in epochs.
    """

    def __init__(self, config: RanksConfig, train: TrainConfig, rows_per_epoch: int) -> None:
        self._rows_per_epoch, self._batch_size = rows_per_epoch, train.batch_size
        self.num_steps = train.num_steps(rows_per_epoch)
        every = DEFAULT_EVERY if config.every is None else config.every
        self.every = Every.parse(every, "ranks.every", self.num_steps)
        settle = DEFAULT_SETTLE if config.settle is None else config.settle
        self.last = min(int((1 - settle) * self.num_steps), self.num_steps - 1)
        self.told = f"ranks.every ({every}) and ranks.settle ({settle:g})"

    def __contains__(self, step: int) -> bool:
        return step <= self.last and self.every.due(step, self._batch_size, self._rows_per_epoch)

    def up_to(self, step: int) -> list[int]:
        """Those that are not after `step`."""
        return [number for number in range(1, step + 1) if number in self]


class RankMover(ABC):
    """Moves the ranks of a model while it is trained."""

    def __init__(self, run: RunConfig, model: PreTrainedModel) -> None:
        """Looks at the model as it begins."""
        self.config, self.model, self.seed = run.ranks, model, run.train.seed
        self.optimizer: torch.optim.Optimizer | None = None

    @property
    def alpha(self) -> str:
        """What becomes of a layer's alpha when its rank moves: see `set_ranks`."""
        return self.config.alpha or KEEP

    def watch(self, optimizer: torch.optim.Optimizer) -> None:
        """Takes note of the optimizer, whose state moves with the ranks."""
        self.optimizer = optimizer

    def restore(self, progress: Progress) -> None:
        """Gives the layers the ranks that a checkpoint's have, before its tensors are loaded."""
        if progress.ranks:
            set_ranks(self.model, progress.ranks, self.optimizer, alpha=self.alpha)
            set_alphas(self.model, progress.alphas)

    @abstractmethod
    def before(self, step: int) -> None:
        """Called before the micro batches of a step are made."""

    @abstractmethod
    def after(self, step: Step, progress: Progress, say: Say) -> None:
        """Called after a step, before anything else looks at the model."""

    def note(self, step: Step, progress: Progress, say: Say, how: str) -> None:
        """What all who look at the run are told of ranks that have moved."""
        progress.ranks = ranks(self.model)
        set_ranks(self.model, progress.ranks)  # names every layer in the configuration, as a run that goes on does
        progress.alphas = (
            {n: layer.alpha for n, layer in ranked_layers(self.model).items()} if self.alpha != KEEP else {}
        )
        step.metrics["ranks"] = dict(progress.ranks)
        distributed.check_in_step(adapter_tensors(self.model), f"after the ranks moved at step {step.number}")
        size = sum(parameter.numel() for parameter in adapter_parameters(self.model).values())
        low, high = min(progress.ranks.values()), max(progress.ranks.values())
        say(f"step {step.number}: {how}; ranks {low} to {high}, {size:,} trainable parameters")


def set_alphas(model: PreTrainedModel, alphas: Mapping[str, float]) -> None:
    """Gives layers their alphas, which `set_ranks` has brought near already."""
    layers, attachment = ranked_layers(model), need_attachment(model)
    for name, alpha in alphas.items():
        layers[name].alpha = alpha
    pattern = {
        **attachment.config.alpha_pattern,
        **{n: alphas[n] for n in attachment.config.alpha_pattern if n in alphas},
    }
    attachment.config = attachment.config.with_(alpha_pattern=pattern)


def drawn_after(seed: int, step: int) -> torch.Generator:
    """For what is drawn after a step: the same in a run that goes on."""
    digest = hashlib.sha256(f"ranks:{seed}:{step}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))


# --- bounds --------------------------------------------------------------------------------------------------------


def sizes_of(model: PreTrainedModel) -> AdapterSizes:
    """The sizes of the attached adapter at any ranks."""
    start = start_name(need_attachment(model).config.init_lora_weights)
    return attached_sizes(model, copies=2 if start in TAKEN_FROM_BASE else 1)


def highest_ranks(sizes: AdapterSizes, config: RanksConfig) -> dict[str, int]:
    """The highest rank of each layer: `ranks.max`, or the smaller side of its weight where that is less."""
    return {name: side if config.max is None else min(side, config.max) for name, side in sizes.most.items()}


def within_budget(sizes: AdapterSizes, config: RanksConfig) -> Callable[[Mapping[str, int]], bool]:
    """Whether all ranks together are within `ranks.budget`; without one they always are."""
    budget = config.most_parameters
    return lambda now: budget is None or sizes.total(now, budget) <= budget.amount


def check_start(
    model: PreTrainedModel,
    config: RanksConfig,
    most: Mapping[str, int],
    fits: Callable[[Mapping[str, int]], bool],
) -> None:
    """Raises: RequestError where the ranks at the start are above their bounds, or can't move within them."""
    now = ranks(model)
    where = "adapter.r" if config.start is None else "ranks.start"
    for name, rank in now.items():
        if config.max is not None and rank > config.max:
            raise RequestError(f"{where} gives '{name}' the rank {rank}, above ranks.max ({config.max}); lower one")
        if config.min is not None and rank < config.min:
            raise RequestError(f"{where} gives '{name}' the rank {rank}, below ranks.min ({config.min}); raise one")
    if not fits(now):
        raise RequestError(
            f"ranks.budget ({config.most_parameters}) is below what the adapter has at the start; raise it, or lower "
            f"{where}"
        )
    higher = {name: rank for name, rank in now.items() if rank < most[name]}
    if not higher:
        raise RequestError(f"no layer can grow: {where} is the highest rank already; raise ranks.max, or lower {where}")
    if config.budget is not None and fits(most):
        raise RequestError(
            f"ranks.budget ({config.most_parameters}) has no effect: all layers at their highest rank are within it; "
            "lower it"
        )


def check_moves(steps: MoveSteps) -> None:
    """Raises: RequestError where ranks would never move."""
    if not steps.up_to(steps.last):
        raise RequestError(
            f"{steps.told} leave no step of {steps.num_steps} after which ranks may move; lower ranks.every, or train "
            "longer"
        )


def check_same_moves(run: RunConfig, begun: TrainConfig, rows_per_epoch: int, step: int) -> None:
    """A run may be made longer or shorter where that leaves the moves up to `step` as they were.

    `begun`: the run's `train` as it was when the run began.

    Raises: RequestError when it doesn't.
    """
    if run.ranks.policy not in RESIZING:
        return
    was, would = (MoveSteps(run.ranks, train, rows_per_epoch).up_to(step) for train in (begun, run.train))
    if was != would:
        other = next(iter(set(was) ^ set(would)))
        raise RequestError(
            f"with the new length of the run its ranks would have moved otherwise after step {other}, which is done "
            "already (ranks.settle is a share of the steps); set it back, or choose another output"
        )


# --- the recipe's other places -------------------------------------------------------------------------------------


def starting_config(config: LoraConfig, settings: RanksConfig) -> LoraConfig:
    """The adapter with the rank that `ranks.start` gives every layer."""
    return config if settings.start is None else config.with_(r=settings.start)


def at_start(run: RunConfig) -> RunConfig:
    """The run with ranks that stay what they are at its start, where they would move."""
    if run.ranks.policy not in MOVING:
        return run
    adapter = run.adapter if isinstance(run.adapter, StartFrom) else starting_config(run.adapter, run.ranks)
    return dataclasses.replace(run, adapter=adapter, ranks=RanksConfig())


class BeforeSteps:
    """Micro batches of a step, with a word to the mover before.

    Args:
        batches: what makes them.
        mover: is told of the step.
    """

    def __init__(self, batches: Callable[[int], Any], mover: RankMover) -> None:
        self._batches, self._mover = batches, mover

    def __call__(self, step: int) -> Any:
        """The micro batches of `step`."""
        self._mover.before(step)
        return self._batches(step)
