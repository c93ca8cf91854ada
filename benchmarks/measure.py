"""Paired timing in one process: A B C A B C ..., ratios round by round, medians with bootstrap intervals.

Machines are noisy and drift, so nothing is compared across runs: a ratio is made of two measurements a moment apart.
With an output file a long run can be stopped and started again: every finished round is kept beside it, in
`FILE.partial`, and counts if the settings are the same.
"""

from __future__ import annotations

import argparse
import inspect
import json
import os
import platform
import statistics
import subprocess
import time
from collections.abc import Callable
from datetime import date
from pathlib import Path

import numpy as np
import torch

from rankwise.models.blocked import has_bf16_products

Times = dict[str, list[tuple[float, float]]]
"""CPU and wall seconds of each variant, round by round."""


def settings_of(benchmark: str, options: argparse.Namespace) -> dict[str, object]:
    """What a run was asked for: it decides which finished rounds count."""
    return {"benchmark": benchmark, **{name: value for name, value in vars(options).items() if name != "out"}}


def header(**settings: object) -> dict[str, object]:
    """Machine, versions, commit and settings: the first line of every result."""
    import peft
    import transformers

    cpu = next(
        (line.split(":")[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in line),
        platform.processor(),
    )
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], cwd=Path(__file__).parent, capture_output=True, text=True
    ).stdout.strip()
    return {
        "date": date.today().isoformat(), "cpu": cpu, "cores": os.cpu_count(),
        "instructions": torch.backends.cpu.get_cpu_capability() + (", bf16" if has_bf16_products() else ""),
        "threads": torch.get_num_threads(), "torch": torch.__version__,
        "transformers": transformers.__version__, "peft": peft.__version__, "python": platform.python_version(),
        "commit": commit, **settings,
    }  # fmt: skip


def interleaved(
    variants: dict[str, Callable[..., object]],
    rounds: int,
    warmup: int = 2,
    settings: dict[str, object] | None = None,
    out: str | None = None,
    counts: dict[str, list[int]] | None = None,
) -> Times:
    """CPU and wall seconds of each variant in each round; the order turns by one each round.

    A variant may take the round's number, which is negative while warming up. `counts` receives what each returned.
    Rounds that `out` has from an earlier run with the same `settings` are not measured again.
    """
    names = list(variants)
    done = _finished(out, settings, names)[:rounds]
    for number in range(-warmup, rounds):
        if 0 <= number < len(done):
            continue
        times, given = {}, {}
        for name in names[number % len(names) :] + names[: number % len(names)]:
            arguments = (number,) if inspect.signature(variants[name]).parameters.keys() & {"number"} else ()
            cpu, wall = time.process_time(), time.perf_counter()
            given[name] = variants[name](*arguments)
            times[name] = (time.process_time() - cpu, time.perf_counter() - wall)
        if number >= 0:
            done.append({"times": times, "given": given if counts is not None else {}})
            _keep(out, settings, done[-1])
    if counts is not None:
        counts.update({name: [entry["given"][name] for entry in done] for name in names})
    return {name: [tuple(entry["times"][name]) for entry in done] for name in names}


def _partial(out: str) -> Path:
    return Path(f"{out}.partial")


def _finished(out: str | None, settings: dict[str, object] | None, names: list[str]) -> list[dict]:
    if out is None or settings is None or not _partial(out).exists():
        return []
    lines = [json.loads(line) for line in _partial(out).read_text(encoding="utf-8").splitlines()]
    return [line for line in lines if line["settings"] == settings and line["times"].keys() == set(names)]


def _keep(out: str | None, settings: dict[str, object] | None, entry: dict) -> None:
    if out is not None and settings is not None:
        with open(_partial(out), "a", encoding="utf-8") as file:
            file.write(json.dumps({"settings": settings, **entry}) + "\n")


def per_token(times: Times, counts: dict[str, list[int]]) -> Times:
    """Seconds a token."""
    return {
        name: [(cpu / n, wall / n) for (cpu, wall), n in zip(rounds, counts[name], strict=True)]
        for name, rounds in times.items()
    }


def ratio(times: Times, name: str, reference: str, clock: int = 0) -> dict[str, float]:
    """Median of the paired ratios with its 95 % bootstrap interval. `clock`: 0 CPU time, 1 wall time."""
    pairs = [a[clock] / b[clock] for a, b in zip(times[name], times[reference], strict=True)]
    draws = np.random.default_rng(0).choice(pairs, (2000, len(pairs)))
    low, high = np.percentile(np.median(draws, axis=1), [2.5, 97.5])
    return {"median": statistics.median(pairs), "low": float(low), "high": float(high), "pairs": len(pairs)}


def ratio_row(what: str, times: Times, name: str, reference: str) -> dict[str, object]:
    """A line of a result: the ratio of CPU times, and that of wall times beside it."""
    wall = ratio(times, name, reference, clock=1)
    return {
        "what": what, **ratio(times, name, reference),
        "wall_median": wall["median"], "wall_low": wall["low"], "wall_high": wall["high"],
    }  # fmt: skip


def report(head: dict[str, object], rows: list[dict[str, object]], out: str | None) -> None:
    """Prints the header and a line a row; appends both as JSON lines to `out`, and drops what was kept for going on."""
    print(json.dumps(head))
    for row in rows:
        print(
            f"{row['what']:<64} cpu {row['median']:.3f} [{row['low']:.3f}, {row['high']:.3f}]"
            f"  wall {row['wall_median']:.3f}  ({row['pairs']} pairs)"
        )
    if out is not None:
        with open(out, "a", encoding="utf-8") as file:
            file.write(json.dumps({"header": head, "rows": rows}) + "\n")
        _partial(out).unlink(missing_ok=True)
