"""What a run on several tasks has besides the others: its stages, the shares of the tasks, and their losses.

All of it that changes while training is in `state`, which a checkpoint holds, so that a run goes on as if it had never
stopped. Of several processes each holds the same.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from rankwise.errors import RequestError
from rankwise.recipes.run import RunConfig
from rankwise.tasks.config import BEHIND, SINGLE, earlier_tasks
from rankwise.tasks.sampling import Draw, Stretch, shares_of, with_replay
from rankwise.tasks.schedule import Stage, stage_at, stages_of
from rankwise.train.loop import LoopPlan
from rankwise.train.optim import learning_rate
from rankwise.train.task_order import TaskOrder


class TaskRun:
    """The tasks of a run and where it stands with them.

    Args:
        run: resolved.
        sizes: training rows of each task, in their order.

    Raises: RequestError where the stages don't fit the run's length.
    """

    def __init__(self, run: RunConfig, sizes: Sequence[int]) -> None:
        self.config, self._train, self.seed = run.tasks, run.train, run.train.seed
        self.names = self.config.names
        self.sizes = dict(zip(self.names, sizes, strict=True))
        num_rows = sum(sizes)
        num_steps = run.train.num_steps(num_rows)
        self.stages = stages_of(self.config, num_steps, run.train.batch_size, self.sizes)
        for stage in self.stages:
            run.train.warmup_steps(stage.num_steps)
        self.stage: Stage | None = None
        """The one that the model is made for; None: not yet."""
        self.losses: dict[str, float] = {}
        """The validation loss of each task, of the last evaluation."""
        self.references: dict[str, float] = dict(self.config.drawn.references or {})
        self.history: list[dict[str, Any]] = []
        """Of each stage that is over: its name, its last step, and the tasks' losses then."""
        self.router: dict[str, Any] | None = None
        """How well the classifier of an inferred gate does, once it is there."""
        self.isolated: list[str] | None = None
        """Layers with an adapter for each task, where that was decided; None: not yet, or all."""
        first = Stretch(1, self._shares(self.stages[0]), [0] * len(self.names))
        self.draw = Draw(run.train.batch_size, run.train.num_rows(num_rows), first)
        self.order = TaskOrder(sizes, self.draw, run.train.seed)

    def state(self) -> dict[str, Any]:
        """What a checkpoint holds."""
        return {
            "stage": None if self.stage is None else self.stage.index,
            "stretch": self.draw.stretch.to_dict(),
            "losses": dict(self.losses),
            "references": dict(self.references),
            "history": list(self.history),
            "isolated": self.isolated,
        }

    def restore(self, state: Mapping[str, Any]) -> None:
        """Puts back what `state` gave; the model is made by the one who asks for the stage."""
        self.stage = None if state["stage"] is None else self.stages[state["stage"]]
        self.draw.begin(Stretch(**state["stretch"]))
        self.losses, self.references = dict(state["losses"]), dict(state["references"])
        self.history, self.isolated = list(state["history"]), state["isolated"]

    def begin(self, stage: Stage) -> None:
        """The run is in this stage from its first step on."""
        self.stage = stage
        self._redraw(stage.first)

    def take_losses(self, step: int, losses: Mapping[str, float]) -> dict[str, Any]:
        """Takes the validation losses after `step` in; figures for its line of metrics.

        The shares of `behind` follow them from the next step on; at a stage's end they are kept as its result, and
        those of a first stage of single adapters as references.
        """
        self.losses = dict(losses)
        stage = stage_at(self.stages, step)
        if step == stage.last and stage.kind == SINGLE and stage.index == 0:
            self.references = {name: losses[name] for name in stage.tasks} | self.references
        figures: dict[str, Any] = {"valid_loss_mean": mean(losses), "valid_loss_worst": max(losses.values())}
        if self.config.drawn.by == BEHIND and step < stage.last:
            self._redraw(step + 1)
            figures["shares"] = dict(zip(self.names, self.draw.stretch.shares, strict=True))
        return figures

    def end_of_stage(self, step: int) -> None:
        """Notes the end of a stage, where `step` is its last."""
        stage = stage_at(self.stages, step)
        if step == stage.last:
            self.history.append({"stage": stage.name, "step": step, "losses": dict(self.losses)})

    def stage_name(self, step: int) -> str:
        """What reports call the stage that `step` is in."""
        return stage_at(self.stages, step).name

    def _redraw(self, first: int) -> None:
        """New shares from the step `first` on."""
        shares = self._shares(stage_at(self.stages, first))
        if shares != self.draw.stretch.shares:
            self.draw.begin(Stretch(first, shares, self.draw.before(first)))

    def _shares(self, stage: Stage) -> list[float]:
        sizes = {name: self.sizes[name] for name in stage.tasks}
        known = all(name in self.references and name in self.losses for name in sizes)
        now = shares_of(self.config.drawn, sizes, self.losses if known else None, self.references if known else None)
        earlier = {name: float(self.sizes[name]) for name in earlier_tasks(self.config, stage.index)}
        drawn = with_replay(now, earlier, self.config.replay or 0.0)
        return [drawn.get(name, 0.0) for name in self.names]

    def plan(self, plan: LoopPlan) -> LoopPlan:
        """The run's plan with the rates of its stages."""
        return dataclasses.replace(plan, learning_rate=self._rate)

    def _rate(self, step: int) -> float:
        stage, train = stage_at(self.stages, step), self._train
        lr = train.lr if stage.config.lr is None else stage.config.lr
        warmup = train.warmup_steps(stage.num_steps)
        return learning_rate(step - stage.first + 1, stage.num_steps, lr, train.schedule, warmup, train.lr_floor)

    def summary(self) -> dict[str, Any]:
        """The tasks' part of summary.json."""
        figures: dict[str, Any] = {"losses": dict(self.losses)} if self.losses else {}
        if self.losses:
            worst = max(self.losses, key=lambda name: self.losses[name])
            figures |= {"mean": mean(self.losses), "worst": worst}
        router = {} if self.router is None else {"router": self.router}
        return {**figures, "stages": list(self.history), "isolated": self.isolated, **router}


def mean(losses: Mapping[str, float]) -> float:
    """Of the tasks' losses, each counting once."""
    return sum(losses.values()) / len(losses)


def check_same_stages(run: RunConfig, begun: Any) -> None:
    """A run with several stages keeps its length: they are parts of it.

    Raises: RequestError when it doesn't; `begun` is `train` as it was when the run began.
    """
    if len(run.tasks.plan) > 1 and (begun.steps, begun.epochs) != (run.train.steps, run.train.epochs):
        raise RequestError(
            f"train.steps and train.epochs were {begun.steps} and {begun.epochs} when the run began and are now "
            f"{run.train.steps} and {run.train.epochs}: its stages would have been others; set them back, or choose "
            "another output"
        )
