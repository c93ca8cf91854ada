"""The policies that move ranks while a run trains: `grow`, `adaptive` and `nested`."""

from __future__ import annotations

from collections.abc import Callable
from typing import final

import torch
from transformers import PreTrainedModel
from typing_extensions import override

from rankwise import distributed
from rankwise.adapters.config import start_name
from rankwise.adapters.starts import TAKEN_FROM_BASE
from rankwise.attach.attachment import need_attachment
from rankwise.attach.inject import ranks
from rankwise.errors import RequestError
from rankwise.ranks.adaptive import Importance, most_moves, moves
from rankwise.ranks.dynamic import set_ranks
from rankwise.ranks.growth import fullness, grown, ranked_layers
from rankwise.ranks.nested import prefix_at, set_prefix
from rankwise.ranks.selection import select_components
from rankwise.ranks.sketch import GradientSketch
from rankwise.recipes.moving_ranks import (
    MoveSteps,
    RankMover,
    check_moves,
    check_start,
    drawn_after,
    highest_ranks,
    sizes_of,
    within_budget,
)
from rankwise.recipes.run import RunConfig
from rankwise.say import Say
from rankwise.train.loop import Progress, Step


@final
class Grower(RankMover):
    """The policy `grow`."""

    def __init__(self, run: RunConfig, model: PreTrainedModel, rows_per_epoch: int) -> None:
        super().__init__(run, model)
        self._steps = MoveSteps(run.ranks, run.train, rows_per_epoch)
        sizes = sizes_of(model)
        self._most = highest_ranks(sizes, self.config)
        self._fits = within_budget(sizes, self.config)
        check_start(model, self.config, self._most, self._fits)
        check_moves(self._steps)
        self._sketch: GradientSketch | None = None

    @override
    def before(self, step: int) -> None:
        if self.config.measured == "gradient" and step in self._steps and self._can_grow():
            self._sketch = GradientSketch(self.model, f"{self.seed}:{step}")

    @override
    def after(self, step: Step, progress: Progress, say: Say) -> None:
        if step.number not in self._steps or not self._can_grow():
            return
        sketch, self._sketch = self._sketch, None
        measured = fullness(self.model) if sketch is None else sketch.outside()
        now = ranks(self.model)
        new = distributed.from_first(lambda: grown(now, self._most, measured, self.config, self._fits))
        if not new:
            largest = max(measured.values())
            say(f"step {step.number}: no layer grows (the largest {self.config.measured} is {largest:.2f})")
            return
        drawn = drawn_after(self.seed, step.number)
        set_ranks(self.model, new, self.optimizer, drawn, alpha=self.alpha)
        self.note(step, progress, say, f"{len(new)} of {len(now)} layers grew")

    def _can_grow(self) -> bool:
        """Whether some layer may have one rank more."""
        now = ranks(self.model)
        return any(rank < self._most[name] and self._fits({**now, name: rank + 1}) for name, rank in now.items())


@final
class Adapter(RankMover):
    """The policy `adaptive`."""

    def __init__(self, run: RunConfig, model: PreTrainedModel, rows_per_epoch: int) -> None:
        super().__init__(run, model)
        self._steps = MoveSteps(run.ranks, run.train, rows_per_epoch)
        sizes = sizes_of(model)
        self._most = highest_ranks(sizes, self.config)
        self._least = dict.fromkeys(self._most, self.config.min or 1)
        self._fits = within_budget(sizes, self.config)
        check_start(model, self.config, self._most, self._fits)
        check_moves(self._steps)
        self._importance = Importance(ranked_layers(model))
        self._at_rest = False

    @override
    def watch(self, optimizer: torch.optim.Optimizer) -> None:
        """Its gradients are whole in its own step, before a process that shares its state out drops some."""
        super().watch(optimizer)
        optimizer.register_step_pre_hook(self._observe)

    def _observe(self, optimizer: torch.optim.Optimizer, args: object, kwargs: object) -> None:
        if not self._at_rest:
            self._importance.observe()

    @override
    def restore(self, progress: Progress) -> None:
        super().restore(progress)
        self._at_rest = progress.step >= self._steps.last
        if not self._at_rest:
            self._importance.load(progress.importance)

    @override
    def before(self, step: int) -> None:
        """Nothing: the optimizer's own step is watched."""

    @override
    def after(self, step: Step, progress: Progress, say: Say) -> None:
        if step.number in self._steps:
            self._move(step, progress, say)
        self._at_rest = step.number >= self._steps.last
        progress.importance = [] if self._at_rest else self._importance.to_lists()

    def _move(self, step: Step, progress: Progress, say: Say) -> None:
        now = ranks(self.model)
        count = most_moves(sum(now.values()), step.number, self._steps.last)
        scores = self._importance.scores()
        found = distributed.from_first(lambda: moves(scores, self._least, self._most, self._fits, count))
        if not found.grown:
            say(f"step {step.number}: every rank is where it is worth most")
            return
        select_components(self.model, found.kept, self.optimizer)
        set_ranks(self.model, found.grown, optimizer=self.optimizer, generator=drawn_after(self.seed, step.number))
        self._importance.move(found.kept, found.grown)
        left = sum(now[name] - len(kept) for name, kept in found.kept.items())
        self.note(step, progress, say, f"{len(found.grown)} layers grew by one rank, {left} components left others")


@final
class Nester(RankMover):
    """The policy `nested`."""

    def __init__(self, run: RunConfig, model: PreTrainedModel, rows_per_epoch: int) -> None:
        super().__init__(run, model)
        self._least, self._most = self.config.min or 1, max(ranks(model).values())
        if self._least >= self._most:
            raise RequestError(
                f"ranks.policy: nested has nothing to nest: ranks.min ({self._least}) is no lower than the highest "
                f"rank ({self._most}); lower it, or raise adapter.r"
            )
        attachment = need_attachment(model)
        start = start_name(attachment.config.init_lora_weights)
        if start in TAKEN_FROM_BASE:
            raise RequestError(
                f"ranks.policy: nested does not go with adapter.init_lora_weights: {start}, whose start is of the "
                "whole rank; set it to true"
            )
        attachment.nested = {"least": self._least, "most": self._most}

    @override
    def before(self, step: int) -> None:
        set_prefix(self.model, prefix_at(self.seed, step, self._least, self._most))

    @override
    def after(self, step: Step, progress: Progress, say: Say) -> None:
        set_prefix(self.model, None)


MOVERS: dict[str, Callable[[RunConfig, PreTrainedModel, int], RankMover]] = {
    "grow": Grower,
    "adaptive": Adapter,
    "nested": Nester,
}
"""The policies that move ranks while training."""


def rank_mover(run: RunConfig, model: PreTrainedModel, rows_per_epoch: int) -> RankMover | None:
    """What moves the ranks of the run; None where they stay.

    Raises: RequestError for bounds that the model can't have, or ranks that could never move.
    """
    need_attachment(model).nested = None  # what a nested adapter is trained to otherwise is none
    make = MOVERS.get(run.ranks.policy)
    return None if make is None else make(run, model, rows_per_epoch)
