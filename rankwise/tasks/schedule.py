"""Stages of a run: where each begins and ends, and its learning rates (progressive training, from one task to many)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from rankwise.errors import RequestError, counted
from rankwise.tasks.config import StageConfig, TasksConfig


@dataclass(frozen=True)
class Stage:
    """A stage with its place in the run.

    Args:
        index: from 0.
        config: what the run file says.
        first, last: its steps, from 1, both in it.
        tasks: those that it trains on.
        trains: what it trains: `gate`, `adapters`.
    """

    index: int
    config: StageConfig
    first: int
    last: int
    tasks: tuple[str, ...]
    trains: tuple[str, ...]

    @property
    def kind(self) -> str:
        """`single`, `joint` or `shared`."""
        return self.config.kind

    @property
    def num_steps(self) -> int:
        """How many steps it has."""
        return self.last - self.first + 1

    @property
    def name(self) -> str:
        """What reports call it: `1 single`."""
        return f"{self.index + 1} {self.kind}"


def stages_of(config: TasksConfig, num_steps: int, batch_size: int, sizes: dict[str, int]) -> list[Stage]:
    """The stages of a run of so many steps. `sizes`: rows of each task; an epoch is one pass over those of the stage.

    Raises: RequestError where their lengths are not that of the run.
    """
    lengths = [_length(stage, batch_size, sizes) for stage in config.plan]
    said = sum(length for length in lengths if length is not None)
    left = num_steps - said
    open_ = [index for index, length in enumerate(lengths) if length is None]
    if open_ and left < 1:
        raise RequestError(
            f"tasks.stages take {counted(said, 'step')} and the run has {num_steps}: none is left for stage "
            f"{open_[0] + 1}, which says nothing of its length; shorten the others, or train longer"
        )
    if not open_ and left:
        raise RequestError(
            f"tasks.stages take {counted(said, 'step')} together, and the run has {num_steps}; set train.steps to "
            f"{said}, or leave the length of one stage out"
        )
    stages: list[Stage] = []
    first = 1
    for index, (stage, length) in enumerate(zip(config.plan, lengths, strict=True)):
        last = first + (left if length is None else length) - 1
        tasks = tuple(stage.tasks or config.names)
        stages.append(Stage(index, stage, first, last, tasks, config.trained_in(stage)))
        first = last + 1
    return stages


def _length(stage: StageConfig, batch_size: int, sizes: dict[str, int]) -> int | None:
    if stage.epochs is None:
        return stage.steps
    rows = sum(size for name, size in sizes.items() if name in (stage.tasks or sizes))
    return max(1, -(-round(stage.epochs * rows) // batch_size))


def stage_at(stages: Sequence[Stage], step: int) -> Stage:
    """The stage that `step` (from 1) is in; the last one's for steps behind it."""
    return next((stage for stage in stages if step <= stage.last), stages[-1])
