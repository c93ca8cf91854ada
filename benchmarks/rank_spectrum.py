"""What `ranks: {policy: spectrum}` costs before training, against the steps of the run: paired CPU times.

    python benchmarks/rank_spectrum.py [--rounds 3] [--steps 2] [--model demo] [--data TRAIN.jsonl]

Each round measures once (attaching a probe, two passes, the decompositions, taking it out) and then trains `--steps`
steps of the same run; the ratio is of a measurement to STEPS steps.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
from pathlib import Path

import torch

from rankwise.attach.inject import detach
from rankwise.recipes.finetune_job import prepare
from rankwise.recipes.measured_ranks import choose
from rankwise.recipes.run import LoraConfig, read_run
from rankwise.say import silent
from rankwise.train.loop import take_step

STEPS = 200
DATA = Path(__file__).parents[1] / "rankwise" / "recipes" / "demo_data" / "train.jsonl"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=2)
    parser.add_argument("--model", default="demo")
    parser.add_argument("--data", default=str(DATA))
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    run = read_run(
        {
            "model": {"name": args.model, "device": "cpu"},
            "adapter": {"r": 16},
            "data": {"train": args.data, "valid_split": 0},
            "train": {"steps": STEPS, "precision": "fp32", "evaluate_every": None},
        }
    )
    job = prepare(run, None, silent)
    wanted = read_run({**_plain(run), "ranks": {"policy": "spectrum", "budget": 16 * 305_280}})
    assert isinstance(run.adapter, LoraConfig)
    ratios = []
    for number in range(args.rounds):
        start = time.process_time()
        for step in range(args.steps):
            take_step(job.model, job.optimizer, job.batches(step + 1), job.objective, job.plan, job.progress)
        a_step = (time.process_time() - start) / args.steps
        fresh = prepare(run, None, silent).model
        detach(fresh)
        start = time.process_time()
        choose(fresh, run.adapter, wanted, job.data, silent, goes_on=False)
        measuring = time.process_time() - start
        ratios.append(measuring / (STEPS * a_step))
        print(json.dumps({"round": number, "step_s": a_step, "measuring_s": measuring, "ratio": ratios[-1]}))
    print(
        f"{statistics.median(ratios):.3f} of {STEPS} steps ({min(ratios):.3f} to {max(ratios):.3f}), CPU time, "
        f"{args.threads} thread(s), fp32, torch {torch.__version__}, {platform.machine()}"
    )


def _plain(run) -> dict:
    from rankwise.recipes.run import run_document

    return run_document(run)


if __name__ == "__main__":
    main()
