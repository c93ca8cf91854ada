"""Peak memory of a training step above the weights: a fresh process for each variant.

    python benchmarks/memory.py --size 60M --out benchmarks/results/memory.jsonl

Two steps of 2 x 512 tokens in bf16, r 16, all linear layers. Peak resident size of the steps (VmHWM, set back before
them), less the resident size with model and adapter built. The allocator's slack is in it, as it is for a user; the
libraries that a first step loads (65 MiB, whatever the model) are not: a tiny model has made a step before.
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from measure import header, ratio
from step import SIZES, VOCABULARY, build, stepper

VARIANTS = (
    "limit", "PEFT", "PEFT, checkpointing", "ours, own loss", "ours", "ours, fused MLP", "ours, checkpointing",
    "ours, fused MLP, checkpointing",
)  # fmt: skip


def resident_bytes() -> int:
    """Resident size of this process now."""
    with open("/proc/self/statm", encoding="ascii") as file:
        return int(file.read().split()[1]) * resource.getpagesize()


def peak_bytes() -> int:
    """The largest resident size since the peak was set back."""
    status = Path("/proc/self/status").read_text(encoding="ascii")
    return next(int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith("VmHWM:"))


def measure(variant: str, size: str) -> int:
    """Bytes above the weights at the peak."""
    torch.set_num_threads(1)
    prepare(variant, "tiny", tokens=8)()
    step = prepare(variant, size, tokens=512)
    before = resident_bytes()
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # the peak begins anew: building held fp32 weights
    step()
    step()
    return peak_bytes() - before


def prepare(variant: str, size: str, tokens: int) -> Callable[[], float]:
    """A step of the variant, model and adapter built."""
    import peft

    import rankwise as rw
    from rankwise.attach.swiglu import fuse_mlps
    from rankwise.models.batch import Batch
    from rankwise.models.loss import token_losses
    from rankwise.train.recompute import enable_gradient_checkpointing

    ids = torch.randint(0, VOCABULARY, (2, tokens))
    model = build(size, torch.bfloat16)
    if variant == "limit":
        model.requires_grad_(False)
        model.get_input_embeddings().register_forward_hook(lambda _m, _i, out: out.requires_grad_())
    elif variant.startswith("PEFT"):
        if "checkpointing" in variant:
            enable_gradient_checkpointing(model)
        model = peft.get_peft_model(model, peft.LoraConfig(r=16, lora_alpha=32, target_modules="all-linear"))
    else:
        rw.attach(model, rw.LoraConfig())
        if "fused MLP" in variant:
            fuse_mlps(model)
        if "checkpointing" in variant:
            enable_gradient_checkpointing(model)
    if variant.startswith("ours") and "own loss" not in variant:
        rows = torch.arange(2)[:, None].expand_as(ids).contiguous()
        batch = Batch(ids, ids, rows, 2, attention_mask=torch.ones_like(ids))
        return stepper(model, lambda: token_losses(model, batch).mean())
    return stepper(model, lambda: model(input_ids=ids, labels=ids, use_cache=False).loss)


def main() -> None:
    """Runs every variant in processes of its own, in turn, and prints medians and paired ratios to PEFT."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", choices=SIZES, default="60M")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--out")
    parser.add_argument("--one", choices=VARIANTS, help="measure one variant in this process")
    options = parser.parse_args()
    if options.one:
        print(measure(options.one, options.size))
        return
    found: dict[str, list[int]] = {name: [] for name in VARIANTS}
    for _ in range(options.repeats):
        for name in VARIANTS:
            command = [sys.executable, __file__, "--size", options.size, "--one", name]
            done = subprocess.run(command, check=True, capture_output=True, text=True)
            found[name].append(int(done.stdout.strip().splitlines()[-1]))
    head = header(benchmark="memory", size=options.size, repeats=options.repeats)
    rows = []
    for name, values in found.items():
        partner = "PEFT, checkpointing" if "checkpointing" in name else "PEFT"
        pairs = {which: [(float(size), 0.0) for size in found[which]] for which in (name, partner)}
        rows.append({"what": name, "mib": round(statistics.median(values) / 2**20), **ratio(pairs, name, partner)})
    print(json.dumps(head))
    for row in rows:
        print("{what:<32} {mib:>6} MiB   {median:.3f} [{low:.3f}, {high:.3f}] of PEFT alike".format_map(row))
    if options.out:
        with open(options.out, "a", encoding="utf-8") as file:
            file.write(json.dumps({"header": head, "rows": rows}) + "\n")


if __name__ == "__main__":
    main()
