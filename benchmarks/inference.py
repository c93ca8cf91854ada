"""What an unmerged adapter costs at inference: decode of 1 and 8 rows, prefill 8 x 128; base, ours, PEFT, merged.

    python benchmarks/inference.py --rounds 30 --out benchmarks/results/inference.jsonl

200M random parameters in bf16 or fp32, r 16, all linear layers; forwards through the decoder, without the output head.
"ours, off" passes through our layers without adapters, "ours, r 1" makes the same calls as ours on a sixteenth of its
factors: what lies between them is calls, and from there to "ours" bytes and arithmetic.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable

import peft
import torch
from measure import header, interleaved, ratio_row, report, settings_of
from step import SIZES, VOCABULARY, build

import rankwise as rw


def forward(model: torch.nn.Module, ids: torch.Tensor, times: int) -> Callable[[], object]:
    """`times` forwards of the decoder without gradients."""

    @torch.no_grad()
    def run() -> None:
        for _ in range(times):
            model(input_ids=ids, use_cache=False)

    return run


def without_adapters(model: torch.nn.Module, run: Callable[[], object]) -> Callable[[], object]:
    """`run`, with the model's adapters switched off."""

    def off() -> None:
        with rw.disabled(model):
            run()

    return off


def main() -> None:
    """Measures each model on both shapes."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", choices=SIZES, default="200M")
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="bf16")
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[options.precision]
    base = build(options.size, dtype).eval()
    ours = rw.attach(build(options.size, dtype), rw.LoraConfig(init_lora_weights=False)).eval()
    theirs = peft.get_peft_model(
        build(options.size, dtype),
        peft.LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", init_lora_weights=False),
    ).eval()
    merged = rw.merge(rw.attach(build(options.size, dtype), rw.LoraConfig(init_lora_weights=False))).eval()
    thin = rw.attach(build(options.size, dtype), rw.LoraConfig(r=1, init_lora_weights=False)).eval()
    models = {
        "base": base.model,
        "ours": ours.model,
        "ours, r 1": thin.model,
        "PEFT": theirs.base_model.model.model,
        "merged": merged.model,
    }
    shapes = {"decode 1 x 1": ((1, 1), 8), "decode 8 x 1": ((8, 1), 8), "prefill 8 x 128": ((8, 128), 1)}
    rows: list[dict[str, object]] = []
    for shape_name, (shape, repeats) in shapes.items():
        ids = torch.randint(0, VOCABULARY, shape, generator=torch.Generator().manual_seed(0))
        runs = {name: forward(model, ids, repeats) for name, model in models.items()}
        runs["ours, off"] = without_adapters(ours, runs["ours"])
        times = interleaved(
            runs, options.rounds,
            settings={**settings_of("inference", options), "shape": shape_name}, out=options.out,
        )  # fmt: skip
        rows += [ratio_row(f"{shape_name}: {name} / base", times, name, "base") for name in runs if name != "base"]
    report(header(**settings_of("inference", options)), rows, options.out)


if __name__ == "__main__":
    main()
