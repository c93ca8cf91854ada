"""Paired timing in one process: A B C A B C ..., ratios round by round, medians with bootstrap intervals.

Machines are noisy and drift, so nothing is compared across runs: a ratio is made of two measurements a moment apart.
"""

from __future__ import annotations

import json
import platform
import statistics
import time
from collections.abc import Callable
from datetime import date
from pathlib import Path

import numpy as np
import torch


def header(**settings: object) -> dict[str, object]:
    """Machine, versions and settings: the first line of every result."""
    import peft
    import transformers

    cpu = next(
        (line.split(":")[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in line),
        platform.processor(),
    )
    return {
        "date": date.today().isoformat(), "cpu": cpu, "threads": torch.get_num_threads(), "torch": torch.__version__,
        "transformers": transformers.__version__, "peft": peft.__version__, "python": platform.python_version(),
        **settings,
    }  # fmt: skip


def interleaved(
    variants: dict[str, Callable[[], object]], rounds: int, warmup: int = 2
) -> dict[str, list[tuple[float, float]]]:
    """CPU and wall seconds of each variant in each round; the order turns by one each round."""
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in variants}
    names = list(variants)
    for number in range(-warmup, rounds):
        for name in names[number % len(names) :] + names[: number % len(names)]:
            cpu, wall = time.process_time(), time.perf_counter()
            variants[name]()
            if number >= 0:
                times[name].append((time.process_time() - cpu, time.perf_counter() - wall))
    return times


def ratio(times: dict[str, list[tuple[float, float]]], name: str, reference: str, clock: int = 0) -> dict[str, float]:
    """Median of the paired ratios with its 95 % bootstrap interval. `clock`: 0 CPU time, 1 wall time."""
    pairs = [a[clock] / b[clock] for a, b in zip(times[name], times[reference], strict=True)]
    draws = np.random.default_rng(0).choice(pairs, (2000, len(pairs)))
    low, high = np.percentile(np.median(draws, axis=1), [2.5, 97.5])
    return {"median": statistics.median(pairs), "low": float(low), "high": float(high), "pairs": len(pairs)}


def report(head: dict[str, object], rows: list[dict[str, object]], out: str | None) -> None:
    """Prints the header and a line a row; appends both as JSON lines to `out`."""
    print(json.dumps(head))
    for row in rows:
        print(
            f"{row['what']:<58} cpu {row['median']:.3f} [{row['low']:.3f}, {row['high']:.3f}]"
            f"  wall {row['wall_median']:.3f}  ({row['pairs']} pairs)"
        )
    if out is not None:
        with open(out, "a", encoding="utf-8") as file:
            file.write(json.dumps({"header": head, "rows": rows}) + "\n")
