"""A training step of a classifier on rows of real lengths: ours, whose padding costs nothing, against PEFT's.

    python benchmarks/classifier.py --rounds 20 --out benchmarks/results/classifier.jsonl

MiniLM (the demo's encoder) with a new head, r 8 on all linear layers of its blocks, 16 rows of the quality bench's
reviews a step, fp32, dropout as the model has it. A round is eight steps, forward and backward, on the same rows for
all variants. "bucketed" takes rows of like length together, as Trainer's `group_by_length` does.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Sequence
from pathlib import Path

import peft
import torch
from measure import header, interleaved, ratio_row, report, settings_of
from transformers import AutoModelForSequenceClassification, AutoTokenizer

import rankwise as rw
from rankwise.models.embedded import embedded_source
from rankwise.models.heads import class_losses, head_logits
from rankwise.models.label_batch import LabelBatch

ROWS = 16
AT_ONCE = 8
"""Steps in a round: as many as rows are sorted within, so that all variants read the same rows."""
REVIEWS = Path(__file__).parent / "quality" / "data" / "sentiment" / "movies" / "train.jsonl"
TARGETS = r".*\.layer\.\d+\..*(query|key|value|dense)"


def batches(folder: str, bucketed: bool) -> list[LabelBatch]:
    """The reviews in their order, `ROWS` at a time; bucketed: sorted by length within eight such batches."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    rows = [json.loads(line) for line in REVIEWS.read_text(encoding="utf-8").splitlines()]
    labels = {name: number for number, name in enumerate(sorted({row["label"] for row in rows}))}
    if bucketed:
        sizes = {row["text"]: len(tokenizer(row["text"])["input_ids"]) for row in rows}
        chunks = [rows[start : start + AT_ONCE * ROWS] for start in range(0, len(rows), AT_ONCE * ROWS)]
        rows = [row for chunk in chunks for row in sorted(chunk, key=lambda one: sizes[one["text"]])]
    found = []
    for start in range(0, len(rows) - ROWS, ROWS):
        chosen = rows[start : start + ROWS]
        read = tokenizer([row["text"] for row in chosen], padding=True, truncation=True, max_length=128,
                         return_tensors="pt")  # fmt: skip
        targets = torch.tensor([labels[row["label"]] for row in chosen])
        found.append(LabelBatch(read["input_ids"], read["attention_mask"], targets))
    return found


def steps(folder: str) -> dict[str, Callable[[int], None]]:
    """The steps of a round of each variant, by the round's number."""

    def base() -> torch.nn.Module:
        torch.manual_seed(0)
        return AutoModelForSequenceClassification.from_pretrained(folder, num_labels=2)

    def ours(padded: bool) -> Callable[[LabelBatch], torch.Tensor]:
        model = rw.attach(
            base(), rw.LoraConfig(r=8, lora_alpha=32, target_modules=TARGETS, modules_to_save=["classifier"])
        ).train()
        if padded:
            return lambda one: class_losses(_plain(model, one), one).mean()
        return lambda one: class_losses(head_logits(model, one), one).mean()

    def theirs() -> Callable[[LabelBatch], torch.Tensor]:
        config = peft.LoraConfig(r=8, lora_alpha=32, target_modules=TARGETS, task_type="SEQ_CLS")
        model = peft.get_peft_model(base(), config).train()
        return lambda one: model(input_ids=one.input_ids, attention_mask=one.attention_mask, labels=one.targets).loss

    mixed, sorted_rows = batches(folder, False), batches(folder, True)
    pairs = {
        "ours": (ours(False), mixed), "ours, padded": (ours(True), mixed), "PEFT": (theirs(), mixed),
        "PEFT, bucketed": (theirs(), sorted_rows), "ours, bucketed": (ours(False), sorted_rows),
    }  # fmt: skip

    def step(loss: Callable[[LabelBatch], torch.Tensor], rows: Sequence[LabelBatch]) -> Callable[[int], None]:
        def once(number: int) -> None:
            for one in rows[AT_ONCE * number % len(rows) :][:AT_ONCE]:
                loss(one).backward()

        return once

    return {name: step(*pair) for name, pair in pairs.items()}


def _plain(model: torch.nn.Module, one: LabelBatch) -> torch.Tensor:
    return model(input_ids=one.input_ids, attention_mask=one.attention_mask).logits


def main() -> None:
    """Measures and reports."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    variants = steps(embedded_source("demo-encoder"))
    settings = settings_of("classifier", options)
    times = interleaved(variants, options.rounds, settings=settings, out=options.out)
    compared = [("ours", "PEFT"), ("ours", "PEFT, bucketed"), ("ours, bucketed", "PEFT, bucketed"),
                ("ours, padded", "PEFT"), ("ours", "ours, padded")]  # fmt: skip
    rows = [ratio_row(f"{one} / {other}", times, one, other) for one, other in compared]
    report(header(**settings), rows, options.out)


if __name__ == "__main__":
    main()
