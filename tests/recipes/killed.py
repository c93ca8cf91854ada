"""Runs in processes that can be killed: forked from one that has imported everything, so that each is there at once."""

from __future__ import annotations

import multiprocessing
import os
import random
import signal
import time
from collections.abc import Callable
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import torch
from transformers.models.llama import modeling_llama  # noqa: F401 (so that no child has to)

from rankwise.recipes.finetune import train

POLL_S = 0.0005
LONGEST_SAVE_S = 0.05


def _train(run: dict[str, Any], num_threads: int) -> None:
    torch.set_num_threads(num_threads)
    torch.manual_seed(os.getpid())  # nothing may depend on what a process did before
    train(run, resume=True, quiet=True)


def start(run: dict[str, Any]) -> BaseProcess:
    """Begins a run, or goes on with it, in a process of its own."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])
    process = context.Process(target=_train, args=(run, 1))
    process.start()
    return process


def finish(run: dict[str, Any]) -> float:
    """Runs to the end; how long that took, in seconds."""
    process, started = start(run), time.monotonic()
    process.join()
    assert process.exitcode == 0
    return time.monotonic() - started


def after(seconds: float) -> Callable[[BaseProcess, Path], None]:
    """Waits so long, or until the run is over."""
    return lambda process, output: process.join(seconds)


def inside_save(number: int, seconds: float) -> Callable[[BaseProcess, Path], None]:
    """Waits for so many half-written checkpoints to appear, and `seconds` more."""

    def wait(process: BaseProcess, output: Path) -> None:
        seen: set[str] = set()
        while process.is_alive() and len(seen) < number:
            seen |= {path.name for path in (output / "checkpoints").glob(".step-*.tmp")}
            time.sleep(POLL_S)
        time.sleep(seconds)

    return wait


def moments(draw: random.Random, count: int, run_s: float, num_saves: int) -> list[Callable[[BaseProcess, Path], None]]:
    """Random moments of a run that takes `run_s`: every second one anywhere, the others inside of saves."""
    anywhere = [after(draw.uniform(0, run_s)) for _ in range((count + 1) // 2)]
    saves = [inside_save(draw.randint(1, num_saves), draw.uniform(0, LONGEST_SAVE_S)) for _ in range(count // 2)]
    mixed = [*anywhere, *saves]
    draw.shuffle(mixed)
    return mixed


def kill(run: dict[str, Any], wait: Callable[[BaseProcess, Path], None]) -> str | None:
    """Begins or goes on and kills it at that moment; what it was in the middle of, or None where it was over before."""
    output = Path(run["output"])
    process = start(run)
    wait(process, output)
    assert process.pid is not None
    if process.is_alive():
        os.kill(process.pid, signal.SIGKILL)
    process.join()
    if process.exitcode == 0:
        return None
    assert process.exitcode == -signal.SIGKILL
    if list(output.glob("checkpoints/.step-*.tmp")):
        return "a save"
    if list(output.glob(".*.tmp")):
        return "another write"
    return "steps" if list(output.glob("checkpoints/step-*")) else "the beginning"
