"""The exactness tests as a table: for every objective, how far apart two ways to the same result come out.

    python benchmarks/exactness.py

Tiny random models in fp32 on a CPU, one thread: the cases of tests/train/objective_cases.py. The tests hold
the same differences under bounds; this prints them.
"""

from __future__ import annotations

import os
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))
os.environ["HF_HUB_OFFLINE"] = "1"

import torch  # noqa: E402
from safetensors.torch import load_file  # noqa: E402

from rankwise.recipes.finetune import train  # noqa: E402
from rankwise.train.interrupt import Interrupted  # noqa: E402
from rankwise.train.needs import NEEDS  # noqa: E402
from tests.recipes.runs import interrupting, settings  # noqa: E402
from tests.train.objective_cases import CASES  # noqa: E402
from tests.train.test_objectives_exact import NUM_ROWS, step  # noqa: E402

STEPS = 6


def apart(one: tuple[float, int, dict[str, torch.Tensor]], other: tuple[float, int, dict[str, torch.Tensor]]) -> str:
    """Difference of the losses, and the largest relative one of a parameter's gradient."""
    gradients = max(float((other[2][key] - g).norm() / g.norm()) for key, g in one[2].items() if g.norm() > 0)
    return f"{abs(one[0] - other[0]):.0e}, {gradients:.0e}"


def of_a_step(name: str, folder: Path) -> list[str]:
    """One row at a time against seven at once; packed against padded."""
    whole = step(name, folder, NUM_ROWS, packing=False)
    micro = apart(whole, step(name, folder, 1, packing=False))
    packed = apart(whole, step(name, folder, NUM_ROWS, packing=True)) if NEEDS[name].packs else "pads only"
    return [micro, packed]


def run_of(name: str, folder: Path, output: str, **changes: Any) -> dict[str, Any]:
    """A run with dropout, partial micro batches and clipping."""
    samples = {} if NEEDS[name].generates else {"samples": None, "sample_tokens": None}
    own = {"objective": name, "steps": STEPS, "batch_size": 4, "evaluate_every": 3, "save_every": 3, **samples}
    return settings(folder, folder / output, train={**own, **changes})


def largest_difference(folder: Path, one: str, other: str) -> str:
    """Between the entries of two adapters; 0 where their files are the same bytes."""
    paths = [folder / name / "adapter" / "adapter_model.safetensors" for name in (one, other)]
    if paths[0].read_bytes() == paths[1].read_bytes():
        return "same bytes"
    first, second = map(load_file, paths)
    return f"{max(float((first[key] - second[key]).abs().max()) for key in first):.0e}"


def of_a_run(name: str, folder: Path) -> list[str]:
    """Stopped and resumed, never evaluated, and watched by everything, each against the straight run."""
    CASES[name].save_model(folder / "model")
    CASES[name].write_rows(folder / "train.jsonl", 11)
    CASES[name].write_rows(folder / "valid.jsonl", 4, seed=1)
    train(run_of(name, folder, "straight"), quiet=True)
    halves = run_of(name, folder, "halves")
    try:
        train(halves, on_step=interrupting(2), quiet=True)
    except Interrupted:
        train(halves, resume=True, quiet=True)
    alone = run_of(name, folder, "alone", evaluate_every="auto", samples=None, sample_tokens=None)
    alone["data"]["valid"] = None
    train(alone, quiet=True)
    watched = run_of(name, folder, "watched", statistics=True, loggers=["tensorboard"], evaluate_every=1)
    train(watched, quiet=True)
    return [largest_difference(folder, "straight", other) for other in ("halves", "alone", "watched")]


HEADINGS = (
    "objective", "one row at a time", "packed", "stopped and resumed", "never evaluated", "statistics and loggers",
)  # fmt: skip


def main() -> None:
    """Prints the table, a line as soon as it is there."""
    torch.set_num_threads(1)
    print(f"| {' | '.join(HEADINGS)} |\n|{'---|' * len(HEADINGS)}")
    for name in CASES:
        with tempfile.TemporaryDirectory() as folder:
            cells = [f"`{name}`", *of_a_step(name, Path(folder)), *of_a_run(name, Path(folder))]
        print(f"| {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
