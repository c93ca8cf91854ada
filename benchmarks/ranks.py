"""What moving ranks costs: growing every layer of a model, deciding which grow, and AdaLoRA's importance in each step.

    python benchmarks/ranks.py --size 200M --tokens 64 --rounds 10 --out benchmarks/results/ranks.jsonl

Random weights, fp32, all linear layers, AdamW. Growth, decision and pruning are in seconds: of r 16 to 20 and back. The
ratios are of a whole step (two rows of --tokens, forward, backward, AdamW) with and without what is observed in it, on
one model, in turns; "importance alone" is the time inside of it, which is less noisy. Few tokens are the worst case:
what is observed does not depend on them.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable

import numpy as np
import torch
from measure import header, interleaved, ratio_row, report, settings_of
from step import SIZES, VOCABULARY, build

import rankwise as rw
from rankwise.attach.inject import adapter_parameters
from rankwise.ranks.adaptive import Importance
from rankwise.ranks.growth import fullness, ranked_layers
from rankwise.ranks.selection import select_components
from rankwise.ranks.sketch import GradientSketch

RANK, MORE = 16, 4


class Stepper:
    """A model that trains, and what may be observed in a step."""

    def __init__(self, size: str, ids: torch.Tensor) -> None:
        self.model, self.ids = rw.attach(build(size, torch.float32), rw.LoraConfig(r=RANK, lora_alpha=32)), ids
        self.optimizer = torch.optim.AdamW(adapter_parameters(self.model).values(), lr=1e-4)
        self.importance = Importance(ranked_layers(self.model))
        self.observes = False
        self.taken: list[tuple[float, float]] = []
        """CPU and wall seconds of what was observed in each step that did."""
        self.optimizer.register_step_pre_hook(self._observe)
        self.step()

    def _observe(self, *_: object) -> None:
        if self.observes:
            self.taken.append(seconds(lambda: (self.importance.observe(), self.importance.to_lists())))

    def step(self, observes: bool = False, sketches: bool = False) -> float:
        """Forward, backward, AdamW."""
        self.observes = observes
        sketch = GradientSketch(self.model, "0") if sketches else None
        loss = self.model(input_ids=self.ids, labels=self.ids, use_cache=False).loss
        loss.backward()
        self.optimizer.step()
        if sketch is not None:
            sketch.outside()
        self.optimizer.zero_grad(set_to_none=True)
        return loss.item()

    def grow(self) -> None:
        """Every layer by MORE ranks."""
        layers = ranked_layers(self.model)
        rw.set_ranks(self.model, dict.fromkeys(layers, RANK + MORE), optimizer=self.optimizer)

    def prune(self) -> None:
        """And back."""
        layers = ranked_layers(self.model)
        select_components(self.model, {name: range(RANK) for name in layers}, self.optimizer)


def seconds(work: Callable[[], object]) -> tuple[float, float]:
    """CPU and wall seconds of one call."""
    cpu, wall = time.process_time(), time.perf_counter()
    work()
    return time.process_time() - cpu, time.perf_counter() - wall


def seconds_row(what: str, times: list[tuple[float, float]]) -> dict[str, object]:
    """A line of a result: medians of seconds, with the bootstrap interval of the CPU time's."""
    cpu, wall = np.array(times).T
    draws = np.median(np.random.default_rng(0).choice(cpu, (2000, len(cpu))), axis=1)
    low, high = np.percentile(draws, [2.5, 97.5])
    return {
        "what": f"{what}, seconds", "median": float(np.median(cpu)), "low": float(low), "high": float(high),
        "wall_median": float(np.median(wall)), "pairs": len(cpu),
    }  # fmt: skip


def main() -> None:
    """Measures and reports."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", choices=SIZES, default="200M")
    parser.add_argument("--tokens", type=int, default=64, help="tokens a row, 2 rows")
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    ids = torch.randint(0, VOCABULARY, (2, options.tokens), generator=torch.Generator().manual_seed(0))
    stepper = Stepper(options.size, ids)
    events: dict[str, list[tuple[float, float]]] = {}
    for number in range(-1, options.rounds):
        for what, work in (
            ("effective ranks of all layers", lambda: fullness(stepper.model)),
            (f"growing all layers, {RANK} to {RANK + MORE}", stepper.grow),
            (f"pruning all layers, {RANK + MORE} to {RANK}", stepper.prune),
        ):
            taken = seconds(work)
            if number >= 0:
                events.setdefault(what, []).append(taken)
    settings = settings_of("ranks", options)
    variants = {
        "step": stepper.step,
        "with importance": lambda: stepper.step(observes=True),
        "with a sketch": lambda: stepper.step(sketches=True),
    }
    times = interleaved(variants, options.rounds, settings=settings)
    times["importance alone"] = stepper.taken[-options.rounds :]
    rows = [seconds_row(what, taken) for what, taken in events.items()]
    pairs = [("with importance", "step"), ("importance alone", "with importance"), ("with a sketch", "step")]
    rows += [ratio_row(f"{a} / {b}", times, a, b) for a, b in pairs]
    report(header(layers=len(ranked_layers(stepper.model)), **settings), rows, options.out)


if __name__ == "__main__":
    main()
