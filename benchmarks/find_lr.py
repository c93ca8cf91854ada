"""Whether find-lr picks well: the gain in validation loss at its pick, against the best of a grid of seven rates.

    python benchmarks/find_lr.py RUN.yaml --name modernize --out benchmarks/results/find_lr.jsonl

For each seed: the range test as `rankwise find-lr` makes it, then one whole run at each rate of the grid and at the
pick. The gain of a run is the validation loss of the untrained adapter less that after the last step. Losses do not
depend on what else the machine does; the times do. Finished runs are kept in OUT.partial, by run file, seed and rate,
so that a long comparison can be stopped and started again.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from measure import header, settings_of

from rankwise.errors import WorkError
from rankwise.evaluate.perplexity import measure_loss
from rankwise.recipes.find_lr import find_lr
from rankwise.recipes.finetune import train
from rankwise.recipes.finetune_job import prepare
from rankwise.recipes.run import read_run
from rankwise.say import silent
from rankwise.train.interrupt import Interrupted
from rankwise.train.range_test import pick_below

GRID = [round(10 ** (-4 + half / 2), 8) for half in range(7)]
"""1e-4 to 1e-1 in half decades."""


class Runs:
    """Finished figures on disk: a line a figure."""

    def __init__(self, path: Path) -> None:
        self.path = path
        lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
        self.done: dict[str, dict[str, Any]] = {(row := json.loads(line))["key"]: row for line in lines}

    def get(self, key: str, measure: Any) -> dict[str, Any]:
        """The figures of `key`, measured if they are not there."""
        if key not in self.done:
            start = time.process_time()
            row = {"key": key, **measure(), "cpu_s": round(time.process_time() - start, 1)}
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(row) + "\n")
            self.done[key] = row
            print({name: value for name, value in row.items() if name != "curve"}, flush=True)
        return self.done[key]


def untrained(run_file: str, overrides: list[str]) -> dict[str, Any]:
    """Validation loss before the first step."""
    job = prepare(read_run(run_file, overrides), None, silent)
    assert job.data.valid is not None
    found = measure_loss(
        job.model, job.objective, job.data.valid.examples, job.data.pad_id, job.run.train.micro_rows,
        job.batches.packing,
    )  # fmt: skip
    return {"loss": found.loss}


def tested(run_file: str, overrides: list[str]) -> dict[str, Any]:
    """The range test's curve, and where it is lowest; which rate that speaks for is decided when it is read."""
    found = find_lr(read_run(run_file, overrides), quiet=True)
    return {key: found[key] for key in ("lowest_at", "curve")}


def trained(run_file: str, overrides: list[str]) -> dict[str, Any]:
    """Validation loss after the last step; None where the run broke."""
    with tempfile.TemporaryDirectory() as folder:
        quick = ["train.save_every=null", "train.samples=0", f"output={folder}/run"]
        config = read_run(run_file, [*overrides, *quick])
        try:
            return {"loss": train(config, quiet=True)["best_valid_loss"]}
        except Interrupted:
            raise  # stopped from outside: no result
        except WorkError as error:
            return {"loss": None, "error": str(error)}


def compare(run_file: str, name: str, seeds: int, runs: Runs) -> list[dict[str, Any]]:
    """A row for each seed."""
    rows = []
    for seed in range(seeds):
        base = [f"train.seed={seed}"]
        # one evaluation, after the last step: best_valid_loss is its
        last = [*base, "train.evaluate_every=1000000"]
        curve = runs.get(f"{name}/{seed}/curve", lambda base=base: tested(run_file, base))
        pick = pick_below(curve["lowest_at"])
        before = runs.get(f"{name}/{seed}/untrained", lambda base=base: untrained(run_file, base))["loss"]
        gains = {}
        for rate in [*GRID, pick]:
            loss = runs.get(f"{name}/{seed}/{rate:g}", lambda r=rate, o=last: trained(run_file, [*o, f"train.lr={r}"]))[
                "loss"
            ]
            gains[rate] = -np.inf if loss is None else before - loss
        best = max(GRID, key=lambda rate: gains[rate])
        rows.append({
            "name": name, "seed": seed, "pick": pick, "gain": gains[pick], "best_rate": best,
            "best_gain": gains[best], "share": gains[pick] / gains[best],
        })  # fmt: skip
    return rows


def main() -> None:
    """Compares and writes a result."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run_file")
    parser.add_argument("--name", required=True)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", required=True)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    rows = compare(options.run_file, options.name, options.seeds, Runs(Path(f"{options.out}.partial")))
    for row in rows:
        print(json.dumps(row))
    print(f"median share of the best gain: {np.median([row['share'] for row in rows]):.3f}")
    with open(options.out, "a", encoding="utf-8") as file:
        file.write(json.dumps({"header": header(**settings_of("find_lr", options)), "rows": rows}) + "\n")


if __name__ == "__main__":
    main()
