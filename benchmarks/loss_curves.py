"""Whether our step learns what the plain path learns: the same adapter, rows and rates; losses step by step.

    python benchmarks/loss_curves.py --size 60M --precision fp32 --out benchmarks/results/loss_curves.jsonl

Ours is what a run does: rows end to end, attention per segment, the fused layers, the loss by rows. The plain path is
PEFT on padded rows with transformers' own loss. Both start from one adapter folder. Rows repeat a few phrases, so that
there is something to learn. In fp32 the losses must agree to 1e-4 after 50 steps; in bf16 both round, each its own way.
"""

from __future__ import annotations

import argparse
import json
import tempfile

import numpy as np
import peft
import torch
from matplotlib.figure import Figure
from measure import header, settings_of
from real_lengths import PAD, Row, _padded
from step import SIZES, build

import rankwise as rw
from rankwise.attach.inject import adapter_parameters
from rankwise.data.packing import collate
from rankwise.train.loop import LoopPlan, Progress, take_step
from rankwise.train.objectives import OBJECTIVES
from rankwise.train.optimizers import make_optimizer

ROWS, LR = 4, 1e-3
BETAS = (0.9, 0.999)


def phrased_rows(count: int) -> list[list[int]]:
    """Rows of 20 to 80 tokens, made of 16 phrases of 8 tokens."""
    draw = np.random.default_rng(0)
    phrases = draw.integers(1, 400, (16, 8))
    return [
        phrases[draw.integers(0, 16, 10)].flatten()[: int(length)].tolist() for length in draw.integers(20, 81, count)
    ]


def ours(size: str, dtype: torch.dtype, folder: str, rows: list[list[int]], steps: int) -> list[float]:
    """The losses of rankwise's own steps."""
    model = rw.load_adapter(build(size, dtype), folder, trainable=True)
    optimizer = make_optimizer(adapter_parameters(model), LR, BETAS, 0.0)
    plan, progress = LoopPlan(10**9, lambda step: LR), Progress()
    losses = []
    for number in range(steps):
        batch = collate([Row(ids) for ids in rows[number * ROWS : (number + 1) * ROWS]], PAD, True)  # type: ignore[list-item]
        losses.append(take_step(model, optimizer, [batch], OBJECTIVES["text"], plan, progress).loss)
    return losses


def plain(size: str, dtype: torch.dtype, folder: str, rows: list[list[int]], steps: int) -> list[float]:
    """The losses of a bare PEFT loop."""
    model = peft.PeftModel.from_pretrained(build(size, dtype), folder, is_trainable=True)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=LR, betas=BETAS, weight_decay=0.0)
    losses = []
    for number in range(steps):
        loss = model(**_padded(rows[number * ROWS : (number + 1) * ROWS]), use_cache=False).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        losses.append(loss.item())
    return losses


def draw(curves: dict[str, list[float]], path: str) -> None:
    """Both curves over one another."""
    figure = Figure(figsize=(6, 3.2), layout="constrained")
    axes = figure.subplots()
    for (name, losses), style in zip(curves.items(), ("-", "--"), strict=True):
        axes.plot(range(1, len(losses) + 1), losses, style, label=name)
    axes.set(xlabel="step", ylabel="loss, nats a token")
    axes.legend()
    figure.savefig(path, dpi=110)


def main() -> None:
    """Trains both ways and compares."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", choices=SIZES, default="60M")
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="fp32")
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out")
    parser.add_argument("--picture", help="a PNG of both curves")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[options.precision]
    rows = phrased_rows(options.steps * ROWS)
    with tempfile.TemporaryDirectory() as root:
        folder = f"{root}/adapter"
        rw.save_adapter(rw.attach(build(options.size, dtype), rw.LoraConfig()), folder)
        curves = {
            "ours": ours(options.size, dtype, folder, rows, options.steps),
            "plain": plain(options.size, dtype, folder, rows, options.steps),
        }
    apart = np.abs(np.subtract(curves["ours"], curves["plain"]))
    row = {
        "what": f"loss after {options.steps} steps", "ours": curves["ours"][-1], "plain": curves["plain"][-1],
        "difference": float(apart[-1]), "largest_difference": float(apart.max()), "first": curves["plain"][0],
    }  # fmt: skip
    print(json.dumps(row))
    if options.picture:
        draw(curves, options.picture)
    if options.out:
        head = header(**settings_of("loss_curves", options))
        head.pop("picture")
        with open(options.out, "a", encoding="utf-8") as file:
            file.write(json.dumps({"header": head, "rows": [row], "curves": curves}) + "\n")


if __name__ == "__main__":
    main()
