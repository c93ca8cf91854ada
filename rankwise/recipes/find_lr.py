"""`rankwise find-lr`: a range test on a run's own model, adapter and data; the run's output folder is not touched."""

from __future__ import annotations

import dataclasses
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import yaml

from rankwise.attach.checkpoint import load_native_state, native_state
from rankwise.errors import RequestError, WorkError
from rankwise.files import file_obstacle, replacing, write_text
from rankwise.recipes.finetune_job import Job, optimizer_of, prepare
from rankwise.recipes.moving_ranks import at_start
from rankwise.recipes.run import RunConfig, read_run
from rankwise.say import silent, to_stderr
from rankwise.train.log import ProgressBar, peak_memory_bytes
from rankwise.train.loop import LoopPlan, Progress, take_step
from rankwise.train.objective import MicroBatch, total_weight, weighted_sum
from rankwise.train.range_test import LEAST_STEPS, MOST_STEPS, Found, RangeTest, one_pass, read_curve
from rankwise.train.rng import seed_everything, untouched
from rankwise.train.scale import LossScale

_SECTION = re.compile(r"^train:[ \t]*(?P<inline>\{.*)?", re.MULTILINE)
_RATE = re.compile(r"(?P<key>\blr:[ \t]*)(?P<value>[^\s,}#]+)")


def find_lr(
    run: RunConfig | Mapping[str, Any] | str | os.PathLike[str],
    test: RangeTest | None = None,
    picture: Path | None = None,
    quiet: bool = False,
) -> dict[str, Any]:
    """Tests growing rates and picks one: `lr`, `curve` (list of `lr`, `loss`), `lowest_at`, `current`, `picture`.

    Args:
        run: a run file, a mapping of the same shape, or a RunConfig.
        test: the range; not given: 1e-5 to 1 in `steps_for` steps, 3 restarts.
        picture: where the curve is drawn, a PNG; None: nowhere.
        quiet: print nothing on stderr.

    Raises: RequestError for what is wrong with the request; WorkError when the curve speaks for no rate.
    """
    config = read_run(run)
    test = test or RangeTest(num_steps=steps_for(config))
    if picture is not None and (found := file_obstacle(picture)) is not None:
        raise RequestError(f"the picture '{picture}' can't be made: {found}; choose another with --out")
    job = prepare(_as_test(config, test), None, silent if quiet else to_stderr)
    result = measure(job, test, quiet)
    if picture is not None:
        draw(result, config.train.lr, picture)
    return {
        "lr": result.lr,
        "lowest_at": result.lowest_at,
        "current": config.train.lr,
        "curve": [{"lr": lr, "loss": loss} for lr, loss in result.curve],
        "picture": None if picture is None else str(picture),
    }


def steps_for(run: RunConfig) -> int:
    """Steps of a pass for a run: as many as it has, from 40 to 100; 100 where its epochs say how long it is."""
    steps = run.train.steps
    return MOST_STEPS if steps is None else min(max(steps, LEAST_STEPS), MOST_STEPS)


def _as_test(run: RunConfig, test: RangeTest) -> RunConfig:
    """The run with the length and the schedule of the test, and with the ranks that it begins with."""
    steps = test.num_restarts * test.num_steps
    train = dataclasses.replace(
        run.train, steps=steps, epochs=None, warmup=0, schedule="constant", lr_floor=0.0
    )  # fmt: skip
    return dataclasses.replace(at_start(run), train=train)


def measure(job: Job, test: RangeTest, quiet: bool = True) -> Found:
    """Runs the passes of `test` on a prepared run, and leaves its model as it was.

    Raises: WorkError as `read_curve`.
    """
    rates = test.rates
    start = {name: tensor.detach().clone() for name, tensor in native_state(job.model).items()}
    passes: list[list[float]] = []
    before: list[float] = []
    with ProgressBar(test.num_restarts * test.num_steps, 0, shown=not quiet) as bar:
        for restart in range(test.num_restarts):
            first = restart * test.num_steps + 1
            batches = [job.batches(first + number) for number in range(test.num_steps)]
            losses = [untrained_loss(job, step) for step in batches]
            before += losses
            try:
                passes.append(one_pass(rates, losses, _Trainer(job, batches, rates, restart, bar).step))
            finally:
                load_native_state(job.model, start)
    return read_curve(rates, passes, sum(before) / len(before))


def untrained_loss(job: Job, batches: list[MicroBatch]) -> float:
    """Mean loss of a step's rows under the model as it is, with dropout off: what its step would start from."""
    trained = [batch for batch in batches if job.objective.count(batch)]
    total, weight = 0.0, 0.0
    with untouched(job.model, job.model.device), torch.no_grad(), job.objective.meter.closed():
        for batch, losses in zip(trained, job.objective.losses_of(job.model, trained), strict=True):
            weights = job.objective.weights(batch)
            total += float(weighted_sum(losses.double(), weights))
            weight += total_weight(weights, losses.numel())
    if not weight:
        raise WorkError("a step has nothing that is trained on; see `rankwise data preview`, or raise train.batch_size")
    return total / weight


class _Trainer:
    """One pass: its own optimizer, from the adapter's start."""

    def __init__(
        self, job: Job, batches: list[list[MicroBatch]], rates: list[float], restart: int, bar: ProgressBar
    ) -> None:
        self.job, self.batches, self.bar = job, batches, bar
        self.done = restart * len(rates)
        self.optimizer = optimizer_of(job.run.train, job.model)
        self.plan = LoopPlan(len(rates), lambda step: rates[step - 1], job.plan.max_grad_norm)
        self.progress = Progress(scale=LossScale.of(job.run.train.precision))
        seed_everything(job.run.train.seed + restart)

    def step(self, number: int, rate: float) -> float:
        """Trains on the rows of step `number` at `rate`; their loss before the update."""
        job = self.job
        taken = take_step(job.model, self.optimizer, self.batches[number], job.objective, self.plan, self.progress)
        self.bar.update(self.done + number + 1, taken.loss, self._tokens_per_s, peak_memory_bytes(job.model.device))
        return taken.loss

    @property
    def _tokens_per_s(self) -> float:
        return self.progress.num_tokens / self.progress.train_s


def draw(found: Found, current: float, path: Path) -> None:
    """Writes a PNG: the smoothed curve over the rates, the pick, the run's present rate."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.add_subplot()
    axes.plot([lr for lr, _ in found.curve], [loss for _, loss in found.curve], linewidth=2, label="loss, smoothed")
    axes.axvline(found.lr, color="tab:green", label=f"pick: {found.lr:g}")
    axes.axvline(found.lowest_at, color="tab:grey", linestyle=":", label=f"lowest at {found.lowest_at:.2g}")
    axes.axvline(current, color="tab:orange", linestyle="--", label=f"the run file's: {current:g}")
    axes.set(
        xscale="log", xlabel="learning rate", ylabel="loss, nats per trained unit", title="learning-rate range test"
    )
    axes.grid(alpha=0.3)
    axes.legend()
    canvas = FigureCanvasAgg(figure)
    with replacing(path) as temporary:
        canvas.print_figure(temporary, dpi=120, format="png")


def check_apply(run_file: Path) -> None:
    """Raises: RequestError where `apply_rate` will not be able to write, before a test has taken its minutes."""
    if (found := file_obstacle(run_file)) is not None:
        raise RequestError(f"--apply can't write '{run_file}': {found}; leave it out, or copy the run file")
    if with_rate(_own_text(run_file)[0], 1.0) is None:
        raise RequestError(
            f"'{run_file}' writes train: in a way that can't be changed safely; leave --apply out, or write train: "
            "with a setting a line"
        )


def apply_rate(run_file: Path, lr: float) -> None:
    """Writes `train.lr` into a run file and leaves every other letter of it, line ends too, as it was.

    Raises: RequestError when the file's own way of writing `train:` can't be changed so; it is then untouched.
    """
    before, line_end = _own_text(run_file)
    after = with_rate(before, lr)
    if after is None:
        raise RequestError(
            f"'{run_file}' writes train: in a way that can't be changed safely; set train.lr to {lr:g} there"
        )
    write_text(run_file, after.replace("\n", line_end))


def _own_text(run_file: Path) -> tuple[str, str]:
    """The text, and what ends its lines: where all end in CRLF, they are given as LF."""
    with open(run_file, encoding="utf-8", newline="") as file:
        text = file.read()
    plain = text.replace("\r\n", "\n")
    return (plain, "\r\n") if plain != text and text.count("\n") == text.count("\r\n") else (text, "\n")


def with_rate(text: str, lr: float) -> str | None:
    """The text of a run file with `train.lr` set; None where that can't be done without changing anything else."""
    value = f"{lr:.1e}"
    document = yaml.safe_load(text)
    wanted = {**document, "train": {**(document.get("train") or {}), "lr": float(value)}}
    for candidate in _candidates(text, value):
        try:
            if yaml.safe_load(candidate) == wanted:
                return candidate
        except yaml.YAMLError:
            continue
    return None


def _candidates(text: str, value: str) -> list[str]:
    """Ways to write the rate into the text; the right one is the one that reads back so."""
    section = _SECTION.search(text)
    if section is None:
        return [f"{text.rstrip()}\ntrain:\n  lr: {value}\n" if text.strip() else f"train:\n  lr: {value}\n"]
    found = [
        text[: match.start("value")] + value + text[match.end("value") :]
        for match in _RATE.finditer(text, section.start())
    ]
    brace = text.find("{", section.start())
    if section["inline"] is not None:
        empty = text[brace + 1 :].lstrip().startswith("}")
        found.append(f"{text[: brace + 1]}lr: {value}{'' if empty else ', '}{text[brace + 1 :]}")
    indent = re.search(r"\n([ \t]+)\S", text[section.end() :])
    found.append(f"{text[: section.end()]}\n{indent[1] if indent else '  '}lr: {value}{text[section.end() :]}")
    return found
