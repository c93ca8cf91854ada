"""What a run says while it runs: metrics.jsonl, the loggers that were asked for, and a progress bar on stderr."""

from __future__ import annotations

import contextlib
import json
import math
import resource
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from rankwise.errors import WorkError, WriteError
from rankwise.files import write_text
from rankwise.say import Say
from rankwise.train.loggers import LOGGERS, LoggedRun, Logger
from rankwise.train.rng import rng_state, set_rng_state

PLAIN_LINE_S = 10.0
"""Where stderr is not a terminal, a line at most so often."""


class JsonLines:
    """A file with one JSON document a line, each flushed as it is written."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def append(self, line: Mapping[str, Any]) -> None:
        """Adds one line. JSON has no NaN: such a value is a programmer's mistake here.

        Raises: WriteError when it can't be written.
        """
        text = json.dumps(line, ensure_ascii=False, allow_nan=False) + "\n"
        try:
            with open(self.path, "a", encoding="utf-8") as file:
                file.write(text)
        except OSError as error:
            raise WriteError(str(self.path), error.strerror or str(error)) from error

    def read(self) -> list[dict[str, Any]]:
        """All whole lines; a last line that a crash cut off is left out. Raises: WorkError for one that is not JSON."""
        if not self.path.exists():
            return []
        lines = self.path.read_bytes().split(b"\n")[:-1]  # what follows the last line feed was never finished
        found: list[dict[str, Any]] = []
        for number, line in enumerate(lines, start=1):
            try:
                found += [json.loads(line)] if line.strip() else []
            except ValueError:  # what a power failure leaves of blocks that were not written yet
                raise WorkError(f"'{self.path}', line {number}: not JSON; remove that line to go on") from None
        return found

    def drop_after(self, step: int) -> None:
        """Leaves only lines whose `step` is at most `step`: a resumed run writes the later ones again."""
        kept = [line for line in self.read() if line["step"] <= step]
        write_text(self.path, "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in kept))


class Loggers:
    """The loggers of a run. One that fails, at its start or later, is dropped with one warning: no run stops for it.

    Loggers may draw random numbers and print; training and stdout do not notice.

    Args:
        names: keys of `LOGGERS`; none on all processes but the first.
        run: of a logger called NAME, what it is told, its folder being that of all loggers.
        say: takes the warnings.
    """

    def __init__(self, names: Iterable[str], run: LoggedRun, say: Say) -> None:
        self._say = say
        self._open: dict[str, Logger] = {}
        for name in names:
            self._call(name, lambda name=name: self._start(name, run))

    def _start(self, name: str, run: LoggedRun) -> None:
        folder = run.folder / name
        folder.mkdir(parents=True, exist_ok=True)
        self._open[name] = LOGGERS[name].open(replace(run, folder=folder))

    def __enter__(self) -> Loggers:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for name, logger in list(self._open.items()):
            self._call(name, logger.close)
        self._open = {}

    def log(self, line: Mapping[str, Any]) -> None:
        """Gives a line of metrics.jsonl to each: what is a number in it, `a: {b: 1}` as `a/b`."""
        figures = dict(_numbers(line))
        step = int(figures.pop("step"))
        for name, logger in list(self._open.items()):
            self._call(name, lambda logger=logger: logger.log(step, figures))

    def _call(self, name: str, work: Callable[[], None]) -> None:
        cpu = torch.device("cpu")
        state = rng_state(cpu)
        try:
            with contextlib.redirect_stdout(sys.stderr):
                work()
        except (Exception, SystemExit) as error:  # noqa: BLE001 (whatever it is, the run goes on)
            reason = " ".join(str(error).split())[:300] or "no reason given"
            self._open.pop(name, None)
            self._say(f"warning: the logger {name} failed and is dropped ({type(error).__name__}: {reason})")
        finally:
            set_rng_state(state, cpu)


def _numbers(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, float]]:
    for name, value in values.items():
        if isinstance(value, Mapping):
            yield from _numbers(value, f"{prefix}{name}/")
        elif isinstance(value, (int, float)):
            yield f"{prefix}{name}", value


def peak_memory_bytes(device: torch.device) -> int:
    """The most memory so far: of the device on CUDA, else of this process (resident)."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


class ProgressBar:
    """Steps done with loss, tokens/s, memory and time left; plain lines where stderr is not a terminal.

    Args:
        num_steps, done: of the whole run, and how many are behind.
        shown: false draws nothing and prints nothing.
    """

    def __init__(self, num_steps: int, done: int, shown: bool = True) -> None:
        self._console = Console(stderr=True, highlight=False, soft_wrap=True)
        self._bar = Progress(
            TextColumn("training"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[figures]}"),
            TextColumn("left"), TimeRemainingColumn(),
            console=self._console, disable=not (shown and self._console.is_terminal),
        )  # fmt: skip
        self._task = self._bar.add_task("training", total=num_steps, completed=done, figures="")
        self._plain = shown and not self._console.is_terminal
        self._shown = shown
        self._num_steps, self._first = num_steps, done
        self._started = self._printed = time.monotonic()

    def __enter__(self) -> ProgressBar:
        self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.stop()

    def say(self, text: str) -> None:
        """A line above the bar."""
        if self._shown:
            self._console.print(text, markup=False)

    def update(self, step: int, loss: float, tokens_per_s: float, memory_bytes: int) -> None:
        """After a step: its loss, and the speed and the memory so far."""
        figures = f"loss {loss:.4f}  {tokens_per_s:,.0f} tokens/s  {memory_bytes / 2**30:.2f} GiB"
        self._bar.update(self._task, completed=step, figures=figures)
        now = time.monotonic()
        is_edge = step in (self._first + 1, self._num_steps)
        if self._plain and (is_edge or now - self._printed >= PLAIN_LINE_S):
            self._printed = now
            left = (now - self._started) / (step - self._first) * (self._num_steps - step)
            self.say(f"step {step}/{self._num_steps}  {figures}  {clock(left)} left")


def clock(seconds: float) -> str:
    """`1:02:03` or `2:03`."""
    minutes, rest = divmod(math.ceil(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"
