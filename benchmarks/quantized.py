"""A base in 8 and 4 bits against bf16, on the demo's model (SmolLM2-135M): memory, a training step, one decoded token.

    python benchmarks/quantized.py --out benchmarks/results/quantized.jsonl

Memory: a fresh process for each variant; two steps of 2 x 256 tokens in bf16, r 16, all linear layers. `weights`: the
bytes of all parameters and quantisation scales; the rest is resident size above what the process had before it loaded
the model. Time: all variants in one process in turn, CPU time, paired ratios to the bf16 base.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import logging
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import bitsandbytes
import peft
import torch
from measure import header, interleaved, ratio, report
from memory import resident_bytes

import rankwise as rw
from rankwise.models.batch import Batch
from rankwise.models.config import ModelConfig
from rankwise.models.load import load_model
from rankwise.models.loss import token_losses
from rankwise.train.recompute import enable_gradient_checkpointing

STORAGES = {"bf16": "none", "8bit": "8bit", "nf4": "4bit"}
VARIANTS = tuple(f"{storage}{more}" for more in ("", ", checkpointing", ", PEFT") for storage in STORAGES)
ROWS, TOKENS = 2, 256


def build(variant: str) -> Any:
    """The model with its adapter: ours, or PEFT's on a base that transformers and bitsandbytes alone have loaded."""
    storage, _, more = variant.partition(", ")
    config = ModelConfig(quantization=STORAGES[storage], device="cpu")
    if more == "PEFT":
        model = _as_users_load(config)
        return peft.get_peft_model(model, peft.LoraConfig(r=16, lora_alpha=32, target_modules="all-linear"))
    model = rw.attach(load_model(config, torch.bfloat16), rw.LoraConfig())
    if more == "checkpointing":
        enable_gradient_checkpointing(model)
    return model


def _as_users_load(config: ModelConfig) -> Any:
    import transformers

    from rankwise.models.load import resolve
    from rankwise.models.quantization import bits_settings

    how: dict[str, Any] = {"dtype": torch.bfloat16}
    if config.is_quantized:
        how |= {"quantization_config": bits_settings(config, torch.bfloat16, []), "device_map": {"": "cpu"}}
    return transformers.AutoModelForCausalLM.from_pretrained(resolve(config.name), **how)


def stepper(model: Any, variant: str) -> Callable[[], object]:
    """One step of training, with the loss that each has."""
    ids = torch.randint(0, 49152, (ROWS, TOKENS), generator=torch.Generator().manual_seed(0))
    rows = torch.arange(ROWS)[:, None].expand_as(ids).contiguous()
    batch = Batch(ids, ids, rows, ROWS, attention_mask=torch.ones_like(ids))
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]

    def step() -> None:
        model.train()
        loss = model(input_ids=ids, labels=ids, use_cache=False).loss if "PEFT" in variant else None
        (token_losses(model, batch).mean() if loss is None else loss).backward()
        for parameter in trained:
            parameter.grad = None

    return step


def decoder(model: Any) -> Callable[[], object]:
    """One token through the model in evaluation mode, without a cache."""
    ids = torch.ones(1, 1, dtype=torch.long)

    def decode() -> None:
        model.eval()
        with torch.no_grad():
            model(input_ids=ids, use_cache=False)

    return decode


def weight_bytes(model: Any) -> int:
    """Bytes of the parameters, once each, and of the scales that quantised ones need."""
    total = 0
    for parameter in model.parameters():
        total += parameter.numel() * parameter.element_size()
        state = vars(parameter).get("quant_state")
        for part in (state, state.state2 if state is not None and state.nested else None):
            total += 0 if part is None else part.absmax.numel() * part.absmax.element_size()
    for module in model.modules():
        if isinstance(module, bitsandbytes.nn.Linear8bitLt):
            scales = module.weight.SCB if module.state.SCB is None else module.state.SCB
            total += scales.numel() * scales.element_size()
    return total


def measure_memory(variant: str) -> dict[str, int]:
    """In this process: bytes of the weights, resident after loading, and at the peak of two steps."""
    torch.set_num_threads(1)
    import transformers

    assert transformers.AutoModelForCausalLM.from_pretrained and transformers.LlamaForCausalLM
    before = resident_bytes()
    model = build(variant)
    found = {"weights": weight_bytes(model), "loaded": resident_bytes() - before}
    step = stepper(model, variant)
    Path("/proc/self/clear_refs").write_text("5")  # the peak so far is that of loading
    step()
    step()
    lines = Path("/proc/self/status").read_text().splitlines()
    peak_kib = next(int(line.split()[1]) for line in lines if line.startswith("VmHWM"))
    return {**found, "peak": peak_kib * 1024 - before}


def memory(repeats: int, out: str | None) -> None:
    """Every variant in processes of its own; medians."""
    found: dict[str, list[dict[str, int]]] = {name: [] for name in VARIANTS}
    for _ in range(repeats):
        for name in VARIANTS:
            command = [sys.executable, __file__, "--one", name]
            done = subprocess.run(command, check=True, capture_output=True, text=True)
            found[name].append(json.loads(done.stdout.strip().splitlines()[-1]))
    head = header(benchmark="quantized memory", rows=ROWS, tokens=TOKENS, repeats=repeats)
    rows = [
        {"what": name, **{key: round(statistics.median(v[key] for v in values) / 2**20) for key in values[0]}}
        for name, values in found.items()
    ]
    print(json.dumps(head))
    for row in rows:
        print(f"{row['what']:<22} weights {row['weights']:>4} MiB  loaded {row['loaded']:>4}  peak {row['peak']:>5}")
    if out:
        with open(out, "a", encoding="utf-8") as file:
            file.write(json.dumps({"header": head, "rows": rows}) + "\n")


def speed(rounds: int, out: str | None) -> None:
    """A step and a decoded token of each variant, in turn."""
    torch.set_num_threads(1)
    names = [name for name in VARIANTS if "checkpointing" not in name]
    models = {name: build(name) for name in names}
    rows: list[dict[str, object]] = []
    for what, make, warmup, many in (
        ("step", lambda name: stepper(models[name], name), 1, rounds),
        ("decode", lambda name: decoder(models[name]), 2, 4 * rounds),
    ):
        times = interleaved({name: make(name) for name in names}, many, warmup)
        pairs = [(name, "bf16") for name in names[1:]] + [(name, f"{name}, PEFT") for name in STORAGES]
        for name, reference in dict.fromkeys(pairs):
            wall = ratio(times, name, reference, 1)
            row = {"what": f"{what}: {name} / {reference}", **ratio(times, name, reference)}
            rows.append({**row, "wall_median": wall["median"]})
    head = header(benchmark="quantized speed", rows=ROWS, tokens=TOKENS)
    report(head, rows, out)


def main() -> None:
    """Memory, then speed."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=3, help="of the memory of each variant; 0: not measured")
    parser.add_argument("--rounds", type=int, default=10, help="of timing; 0: not timed")
    parser.add_argument("--out")
    parser.add_argument("--one", choices=VARIANTS, help="measure the memory of one variant in this process")
    options = parser.parse_args()
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    if options.one:
        with contextlib.redirect_stderr(tempfile.TemporaryFile("w")):  # loading bars
            found = measure_memory(options.one)
        print(json.dumps(found))
        return
    if options.repeats:
        memory(options.repeats, options.out)
    if options.rounds:
        speed(options.rounds, options.out)


if __name__ == "__main__":
    main()
