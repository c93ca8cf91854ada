"""Tokens a second on rows of real lengths: ours, a bare PEFT loop and TRL's SFTTrainer, each at several settings.

    python benchmarks/real_lengths.py --rounds 20 --threads 1 --out benchmarks/results/real_lengths.jsonl

Lengths are log-normal with mean 123 (sigma 0.8, from 8 to 1,024 tokens); 8 rows a step; every token is trained on; r
16, all linear layers, no dropout, AdamW. In each round every variant takes a step on the same rows, so that ratios are
paired; TRL packs by itself, so its step has other rows, and figures are per real token (padding is not counted).

- ours: `rankwise`'s own step (`take_step`), rows end to end with attention per segment; and padded.
- PEFT: a bare loop with transformers' own loss: padded; bucketed (the 8 rows are of like length); packed into one row
  with the block mask that transformers builds from position ids.
- TRL: SFTTrainer's own collator and `training_step`: as it comes (it checkpoints); without checkpointing; and packed.
  Its loss needs Triton to be fast, which a CPU has not: no claim about GPUs follows.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import tempfile
from collections.abc import Callable, Iterator

import numpy as np
import peft
import torch
from measure import header, interleaved, per_token, ratio_row, report, settings_of
from step import SIZES, VOCABULARY, build
from transformers import PreTrainedModel, PreTrainedTokenizerFast

import rankwise as rw
from rankwise.attach.inject import adapter_parameters
from rankwise.data.packing import collate
from rankwise.models.batch import Batch
from rankwise.train.loop import LoopPlan, Progress, take_step
from rankwise.train.objectives import OBJECTIVES
from rankwise.train.optimizers import make_optimizer

MEAN_TOKENS, SIGMA, SHORTEST, LONGEST = 123, 0.8, 8, 1024
ROWS = 8
PAD = 0
LR = 1e-4

Step = Callable[[int], int]
"""Takes one optimizer step, on the rows of a round, and returns how many real tokens were in it."""


def rows_of_real_lengths(count: int) -> list[list[int]]:
    """Random tokens in rows whose lengths are like those of instruction data."""
    draw = np.random.default_rng(0)
    lengths = np.exp(draw.normal(np.log(MEAN_TOKENS) - SIGMA**2 / 2, SIGMA, count)).round().clip(SHORTEST, LONGEST)
    return [draw.integers(1, VOCABULARY, int(length)).tolist() for length in lengths]


class Row:
    """As much of an Example as `collate` reads."""

    def __init__(self, ids: list[int]) -> None:
        self.input_ids = self.labels = ids
        self.weights: tuple[()] = ()


def ours(size: str, dtype: torch.dtype, batches: list[list[list[int]]], packing: bool) -> Step:
    """rankwise's own step."""
    model = rw.attach(build(size, dtype), rw.LoraConfig())
    optimizer = make_optimizer(adapter_parameters(model), LR, (0.9, 0.999), 0.0)
    plan, progress = LoopPlan(10**9, lambda step: LR), Progress()

    def step(number: int) -> int:
        batch: Batch = collate([Row(ids) for ids in batches[number]], PAD, packing)  # type: ignore[arg-type, list-item]
        return take_step(model, optimizer, [batch], OBJECTIVES["text"], plan, progress).num_tokens

    return step


def bare(size: str, dtype: torch.dtype, batches: list[list[list[int]]], packing: bool) -> Step:
    """A loop as PEFT's examples have it."""
    config = peft.LoraConfig(r=16, lora_alpha=32, target_modules="all-linear")
    model = peft.get_peft_model(build(size, dtype), config)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=LR)

    def step(number: int) -> int:
        rows = batches[number]
        model(**(_packed(rows) if packing else _padded(rows)), use_cache=False).loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return sum(map(len, rows))

    return step


def _padded(rows: list[list[int]]) -> dict[str, torch.Tensor]:
    longest = max(map(len, rows))
    ids = torch.tensor([row + [PAD] * (longest - len(row)) for row in rows])
    mask = torch.tensor([[1] * len(row) + [0] * (longest - len(row)) for row in rows])
    return {"input_ids": ids, "attention_mask": mask, "labels": ids.masked_fill(mask == 0, -100)}


def _packed(rows: list[list[int]]) -> dict[str, torch.Tensor]:
    ids = torch.tensor([[token for row in rows for token in row]])
    labels = torch.tensor([[label for row in rows for label in (-100, *row[1:])]])
    positions = torch.tensor([[place for row in rows for place in range(len(row))]])
    return {"input_ids": ids, "position_ids": positions, "labels": labels}


def trl_trainer(size: str, dtype: torch.dtype, rows: list[list[int]], folder: str, **settings: object) -> Step:
    """SFTTrainer with its own collator, sampler and training step; its optimizer is AdamW too."""
    import datasets
    import trl

    config = trl.SFTConfig(
        output_dir=folder, per_device_train_batch_size=1 if settings.get("packing") else ROWS, max_length=LONGEST,
        bf16=False, use_cpu=True, report_to=[], disable_tqdm=True, logging_strategy="no", save_strategy="no",
        dataloader_num_workers=0, learning_rate=LR, optim="adamw_torch", max_grad_norm=0.0, **settings,
    )  # fmt: skip
    data = datasets.Dataset.from_dict({"input_ids": rows})
    trainer = trl.SFTTrainer(
        model=build(size, dtype), args=config, train_dataset=data, processing_class=_tokenizer(),
        peft_config=peft.LoraConfig(r=16, lora_alpha=32, target_modules="all-linear"),
    )  # fmt: skip
    trainer.current_gradient_accumulation_steps = 1  # as `train` sets it
    model: PreTrainedModel = trainer.model_wrapped
    optimizer = trainer.create_optimizer()
    endless = _endless(trainer.get_train_dataloader())

    def step(number: int) -> int:
        inputs = next(endless)
        num_tokens = int(inputs["attention_mask"].sum()) if "attention_mask" in inputs else inputs["input_ids"].numel()
        trainer.training_step(model, inputs)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return num_tokens

    return step


def _tokenizer() -> PreTrainedTokenizerFast:
    """SFTTrainer wants one; the rows are token ids already."""
    from tokenizers import Tokenizer, models

    tokenizer = Tokenizer(models.WordLevel({"<pad>": PAD, "<end>": 1}, unk_token="<pad>"))
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<end>")


def _endless(loader: object) -> Iterator[dict[str, torch.Tensor]]:
    while True:
        yield from loader  # type: ignore[misc]


def variants(size: str, dtype: torch.dtype, rounds: int, warmup: int, folder: str) -> dict[str, Step]:
    """Every way to train on the rows of a round; rounds are numbered from -warmup."""
    rows = rows_of_real_lengths((rounds + warmup) * ROWS)
    batches = [rows[start : start + ROWS] for start in range(0, len(rows), ROWS)]
    by_length = sorted(rows, key=len)
    buckets = [by_length[start : start + ROWS] for start in range(0, len(rows), ROWS)]
    buckets = [buckets[place] for place in np.random.default_rng(1).permutation(len(buckets))]
    found = {
        "ours, packed": ours(size, dtype, batches, True),
        "ours, padded": ours(size, dtype, batches, False),
        "PEFT, padded": bare(size, dtype, batches, False),
        "PEFT, bucketed": bare(size, dtype, buckets, False),
        "PEFT, packed": bare(size, dtype, batches, True),
    }
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stderr(nowhere), contextlib.redirect_stdout(nowhere):
        for name, settings in TRL_SETTINGS.items():
            found[name] = trl_trainer(size, dtype, rows, folder, **settings)
    return found


TRL_SETTINGS: dict[str, dict[str, object]] = {
    "TRL, default": {},
    "TRL, padded, no checkpointing": {"gradient_checkpointing": False},
    "TRL, packed, no checkpointing": {"gradient_checkpointing": False, "packing": True},
}


def main() -> None:
    """Measures all variants; ratios are of tokens a second, the other's in the denominator."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", choices=SIZES, default="60M")
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="bf16")
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[options.precision]
    warmup = 1
    tokens: dict[str, list[int]] = {}
    with tempfile.TemporaryDirectory() as folder:
        steps = variants(options.size, dtype, options.rounds, warmup, folder)
        times = interleaved(
            {name: (lambda number, s=step: s(number + warmup)) for name, step in steps.items()},
            options.rounds, warmup, settings_of("real_lengths", options), options.out, counts=tokens,
        )  # fmt: skip
    speeds = per_token(times, tokens)
    best_trl = min(TRL_SETTINGS, key=lambda name: np.median([cpu for cpu, _ in speeds[name]]))
    best = " (TRL's best)"
    pairs = [
        ("PEFT, padded", "ours, packed"), ("PEFT, bucketed", "ours, packed"), ("PEFT, packed", "ours, packed"),
        ("PEFT, padded", "ours, padded"), *((name, "ours, packed") for name in TRL_SETTINGS),
    ]  # fmt: skip
    rows = [ratio_row(f"tokens/s, {b} / {a}{best if a == best_trl else ''}", speeds, a, b) for a, b in pairs]
    report(header(**settings_of("real_lengths", options)), rows, options.out)


if __name__ == "__main__":
    main()
