"""Going on with a run: which checkpoint, and whether the run file still asks for the same training."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from rankwise import distributed
from rankwise.data.config import BY_HASH, ERROR, LINE
from rankwise.errors import RequestError
from rankwise.recipes.output import RunFolder
from rankwise.recipes.provenance import joined_hash
from rankwise.recipes.run import RunConfig, flat_settings
from rankwise.say import Say
from rankwise.train.config import AUTO, TrainConfig
from rankwise.train.optim import learning_rate
from rankwise.train.precision import Precision, choose_precision
from rankwise.train.state import Checkpoint, checkpoint_folders, find_checkpoint

FREE = (
    "output", "model.trust_remote_code", "data.test", "train.log_every", "train.evaluate_every",
    "train.save_every", "train.keep_checkpoints", "train.keep_best", "train.early_stopping",
    "train.early_stopping_min_delta", "train.loggers", "train.statistics", "train.samples", "train.sample_tokens",
    "train.share_optimizer_from", "data.workers", "data.cache", "tasks.conflict_every",
)  # fmt: skip
"""Settings that change nothing in what is learned."""

PROCESSES = "processes"
"""How many processes train: no setting, but kept with them."""

ROUNDING = (
    "train.micro_batch_size", "train.gradient_checkpointing", "train.fused_mlp", "model.device", "train.sharding",
    PROCESSES,
)  # fmt: skip
"""Settings that change rounding (and which units dropout takes), not what is computed: allowed, and said."""

BEFORE: dict[str, Any] = {
    "data.valid_split": 0, "data.split_by": BY_HASH, "data.mixing_temperature": None, "data.text_rows": LINE,
    "data.sources": [{"weight": None, "epochs": None, "format": None, "columns": None}],
    "data.on_bad_row": ERROR, "tasks.data": [],
}  # fmt: skip
"""What checkpoints of earlier versions, which do not have these settings, did."""

LENGTH = ("train.steps", "train.epochs")
"""Compared by what they did to the steps already taken."""


def training_settings(run: RunConfig, data: Mapping[str, Mapping[str, str]]) -> dict[str, Any]:
    """The settings that decide what is learned, flat (`train.lr`); data files by their contents, not their names."""
    settings = {name: value for name, value in flat_settings(run).items() if name not in FREE}
    settings[PROCESSES] = distributed.world_size()
    settings["data.sources"] = [
        {"weight": one.weight, "epochs": one.epochs, "format": one.format, "columns": one.columns}
        for one in run.data.sources
    ]
    settings["tasks.data"] = list(run.tasks.names)
    for split in ("train", "valid"):
        settings[f"data.{split}"] = joined_hash(dict(data[split])) if split in data else None
    return settings


def usable_checkpoint(folder: RunFolder, say: Say) -> Checkpoint | None:
    """The checkpoint that `--resume` goes on from, or None to start afresh; says which, and what was damaged.

    Raises: WorkError when checkpoints are there and none is whole; RequestError when a finished run has none.
    """
    checkpoint, problems = find_checkpoint(folder.path)
    for problem in problems:
        say(f"{problem}; using the one before")
    if checkpoint is not None:
        say(f"going on from '{checkpoint.folder}', after step {checkpoint.step}")
    elif folder.is_finished:
        raise RequestError(f"the run in '{folder.path}' is finished and kept no checkpoint; choose another output")
    else:
        say(f"no checkpoint in '{folder.path}': starting afresh")
    return checkpoint


def check_not_moved(run_file: Path, output: str | None) -> None:
    """Raises: RequestError for the run file of a run's folder that no longer lies where the file says: it was moved."""
    folder = run_file.absolute().parent
    if output is None or Path(output).exists() or not checkpoint_folders(folder):
        return
    raise RequestError(
        f"'{run_file}' lies in a run's folder with checkpoints, and its output, '{output}', is not there: the "
        f"folder was moved; go on with output={shlex.quote(str(folder))}"
    )


def run_precision(name: str, device: torch.device, checkpoint: Checkpoint | None) -> Precision:
    """The precision for `train.precision`; `auto` of a run that goes on is what it was when the run began."""
    if checkpoint is None or name != AUTO:
        return choose_precision(name, device)
    return Precision(checkpoint.settings["train.precision"], "as when the run began")


def check_settings(checkpoint: Checkpoint, now: Mapping[str, Any], say: Say) -> None:
    """The run file still describes the run that the checkpoint is of; the length is checked by `check_length`.

    Raises: RequestError naming the first setting that differs.
    """
    before = checkpoint.settings
    for key in [*before, *(key for key in now if key not in before)]:
        old, new = before.get(key, BEFORE.get(key)), now.get(key)
        if old == new or key in LENGTH:
            continue
        if key in ROUNDING:
            say(f"{key} was {old} and is now {new}: the results stay the same up to rounding and dropout")
            continue
        if key in ("data.train", "data.valid") and old and new:
            raise RequestError(
                f"the contents of {key} have changed since the run began; restore them, or choose another output"
            )
        raise RequestError(
            f"{key} was {old!r} when the run began and is now {new!r}; set it back to go on, or choose another output"
        )


def check_length(checkpoint: Checkpoint, train: TrainConfig, rows_per_epoch: int) -> None:
    """A run may be made longer or shorter where that leaves the steps already done as they were.

    Raises: RequestError when they would have had other learning rates or rows.
    """
    before = as_begun(checkpoint, train)
    if (before.steps, before.epochs) == (train.steps, train.epochs):
        return
    step = checkpoint.step
    was, now = (_so_far(config, rows_per_epoch, step) for config in (before, train))
    name = "steps" if before.steps is not None and train.steps is not None else "epochs"
    if train.num_steps(rows_per_epoch) < step:
        raise RequestError(
            f"train.{name} asks for {train.num_steps(rows_per_epoch)} steps, and {step} are done already; ask for more"
        )
    if was != now:
        raise RequestError(
            f"train.{name} was {getattr(before, name)} and is now {getattr(train, name)}, which would have changed the "
            f"{step} steps already done ({train.schedule} schedule, warm-up {train.warmup}); set it back, or choose "
            "another output"
        )


def as_begun(checkpoint: Checkpoint, train: TrainConfig) -> TrainConfig:
    """`train` with the length that the run of the checkpoint had."""
    return TrainConfig(**{**vars(train), **{key.removeprefix("train."): checkpoint.settings[key] for key in LENGTH}})


def _so_far(train: TrainConfig, rows_per_epoch: int, step: int) -> tuple[list[float], int] | None:
    """Learning rates of the steps up to `step`, and how many rows they took; None when the run is shorter."""
    num_steps = train.num_steps(rows_per_epoch)
    if num_steps < step:
        return None
    warmup = train.warmup_steps(num_steps)
    rates = [learning_rate(s, num_steps, train.lr, train.schedule, warmup, train.lr_floor) for s in range(1, step + 1)]
    return rates, min(step * train.batch_size, train.num_rows(rows_per_epoch))
