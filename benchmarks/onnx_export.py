"""ONNX exports of the demo model against torch: exactness, adapters that are switched, 8 bits, speed.

    python benchmarks/onnx_export.py --folder /tmp/exports --out benchmarks/results/onnx_export.jsonl

Three adapters of ranks 1, 8 and 16 on all linear layers of SmolLM2-135M-Instruct, with random B of a size that moves
the logits by a few units, in fp32. Texts are the demo's validation verses. Exports that are in the folder already are
used again.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from pathlib import Path
from typing import Any

import torch
from measure import header, interleaved, ratio, settings_of

import rankwise as rw
from rankwise.export.onnx_runtime import OnnxModel
from rankwise.export.onnx_verify import onnx_prefill, onnx_steps, written
from rankwise.export.report import size_of
from rankwise.export.same_text import same_text
from rankwise.export.speed import torch_prefill, torch_steps
from rankwise.models.config import ModelConfig
from rankwise.models.load import load_model, load_tokenizer
from rankwise.recipes.export import export

RANKS = (1, 8, 16)
DEMO = ModelConfig("demo", "cpu")
VERSES = Path(rw.__file__).parent / "recipes" / "demo_data" / "valid.jsonl"


def adapter_folder(root: Path, rank: int) -> Path:
    """An adapter of that rank with random factors."""
    folder = root / f"r{rank}"
    if not folder.exists():
        model = load_model(DEMO, torch.float32)
        torch.manual_seed(rank)
        rw.attach(model, rw.LoraConfig(r=rank, lora_alpha=2 * rank, init_lora_weights=False, task_type="CAUSAL_LM"))
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if name.endswith("lora_B"):
                    parameter.mul_(0.15)
        rw.save_adapter(model, folder)
    return folder


def exported(root: Path, name: str, settings: dict[str, Any]) -> tuple[Path, float | None]:
    """An export of the rank-8 adapter, and the seconds that it took; None where it was there."""
    out = root / name
    if out.exists():
        return out, None
    start = time.perf_counter()
    export(str(root / "r8"), str(out), "onnx", settings, device="cpu")
    return out, time.perf_counter() - start


def prompts(number: int, tokens: int) -> list[list[int]]:
    """Beginnings of verses."""
    tokenizer = load_tokenizer(DEMO)
    rows = [json.loads(line) for line in VERSES.read_text(encoding="utf-8").splitlines()[:number]]
    return [tokenizer(" ".join(map(str, row.values())))["input_ids"][:tokens] for row in rows]


def texts(model: OnnxModel, root: Path, number: int, tokens: int) -> list[dict[str, Any]]:
    """For each adapter the share of greedy tokens that are torch's too, and the largest difference of logits."""
    rows, chosen = [], prompts(number, 24)
    for rank in RANKS:
        torch_model = load_model(DEMO, torch.float32)
        rw.load_adapter(torch_model, root / f"r{rank}")
        rw.merge(torch_model)
        answers = written(model, chosen, f"r{rank}", tokens)
        largest = 0.0
        for prompt in chosen[:5]:
            with torch.no_grad():
                wanted = torch_model(torch.tensor([prompt])).logits[0]
            largest = max(largest, float((torch.from_numpy(model.logits(prompt, f"r{rank}")) - wanted).abs().max()))
        share = same_text(torch_model.eval(), chosen, answers)
        rows.append({"what": f"fp32, adapter of rank {rank}, against torch merged", "prompts": number, "tokens": tokens,
                     "same_text": share, "max_abs_diff": largest})  # fmt: skip
        print(rows[-1], flush=True)
    return rows


def swaps(model: OnnxModel) -> dict[str, Any]:
    """Milliseconds for the first use of an adapter and for a later one, and to check a file while opening."""
    first, again, check = [], [], []
    for _ in range(7):
        for name in model.manifest.adapters:
            model.adapters.forget(name)
            times = [time.perf_counter()]
            for step in (model.adapters.options, model.adapters.options, model.adapters.check):
                step([name])
                times.append(time.perf_counter())
            for found, start, end in zip((first, again, check), times, times[1:], strict=False):
                found.append(1e3 * (end - start))
    medians = {name: statistics.median(found) for name, found in (("first_use", first), ("later_use", again))}
    return {"what": "adapter swap, ms", **medians, "longest_first_use": max(first), "check": statistics.median(check)}


def main() -> None:
    """Exports, measures, prints; appends to `--out`."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--folder", required=True)
    parser.add_argument("--prompts", type=int, default=20, help="continued by each adapter; 0 leaves that out")
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    root = Path(options.folder)
    for rank in RANKS:
        adapter_folder(root, rank)
    more = [f"r{rank}={root / f'r{rank}'}" for rank in RANKS if rank != 8]
    plain, _ = exported(root, "fp32", {"adapters": more})
    kinds = {"int8": {"int8": "weights"}, "int8-full": {"int8": "full"}}
    rows: list[dict[str, Any]] = []
    models = {"onnx fp32": OnnxModel(plain, options.threads)}
    for name, settings in kinds.items():
        folder, seconds = exported(root, name, settings)
        report = json.loads((folder / "export_report.json").read_text())["report"]
        rows.append({
            "what": f"{name}, adapter of rank 8", "kl": report[1]["kl"], "by_token_kl": report[1]["by_token_kl"],
            "top1_agreement": report[1]["top1_agreement"], "left_out": report[1]["left_out"], "export_s": seconds,
            "size_to_fp32": size_of(folder / "model.onnx.data") / size_of(plain / "model.onnx.data"),
        })  # fmt: skip
        print(rows[-1], flush=True)
        models[f"onnx {name}"] = OnnxModel(folder, options.threads)
    rows.append(swaps(models["onnx fp32"]))
    torch_model = load_model(DEMO, torch.float32)
    [prompt] = prompts(1, 24)
    long = [token for row in prompts(20, 64) for token in row][:256]
    for what, variants in {
        "decode, 8 tokens behind 24": {
            "torch fp32": torch_steps(torch_model, prompt, 8),
            **{name: onnx_steps(model, prompt, 8, None) for name, model in models.items()},
        },
        "prefill, 256 tokens": {
            "torch fp32": torch_prefill(torch_model, long),
            **{name: onnx_prefill(model, long, None) for name, model in models.items()},
        },
    }.items():
        times = interleaved(variants, options.rounds)
        for name in list(models):
            for reference in ("torch fp32", "onnx fp32"):
                if name != reference:
                    found = ratio(times, name, reference, clock=1)
                    rows.append({"what": f"{what}: {name} / {reference}, wall", **found})
                    print(rows[-1], flush=True)
    if options.prompts:
        rows += texts(models["onnx fp32"], root, options.prompts, options.tokens)
    head = header(**settings_of("onnx_export", options))
    print(json.dumps(head))
    for row in rows:
        print(row)
    if options.out is not None:
        with open(options.out, "a", encoding="utf-8") as file:
            file.write(json.dumps({"header": head, "rows": rows}) + "\n")


if __name__ == "__main__":
    main()
