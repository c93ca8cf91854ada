"""A fine-tune with transformers' own Trainer: the model is an ordinary one to it, its checkpoints are adapter folders.

    python examples/trainer.py --data train.jsonl --valid valid.jsonl --model demo --output out
    python examples/trainer.py ... --resume        # goes on from the last checkpoint in `out`

`attach` has put the adapter in: there is no `peft_config`. `resumable` lets the trainer load adapter folders, for
--resume and for the best checkpoint at the end. `rankwise train` does the same with packing, and without the logits.
"""

from __future__ import annotations

import argparse

import torch
from flat_loop import encode, read_rows
from transformers import AutoModelForCausalLM, AutoTokenizer, DataCollatorForSeq2Seq, Trainer, TrainingArguments

import rankwise as rw
from rankwise.models.load import resolve


def rows_of(tokenizer, path: str) -> list[dict[str, list[int]]]:
    """Token ids, and labels of the answers alone, as Trainer's collators take them."""
    encoded = [encode(tokenizer, row, max_length=512) for row in read_rows(path)]
    return [{"input_ids": ids, "attention_mask": [1] * len(ids), "labels": labels} for ids, labels in encoded]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, help="JSONL with prompt and completion")
    parser.add_argument("--valid", required=True, help="the same, for the evaluation loss")
    parser.add_argument("--model", default="demo", help="a folder, a Hub id, or demo")
    parser.add_argument("--output", required=True)
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--every", type=int, default=20, help="steps between evaluations and checkpoints")
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--resume", action="store_true")
    args = parser.parse_args()
    torch.manual_seed(0)

    folder = resolve(args.model)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    rw.attach(model, rw.LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM"))

    settings = TrainingArguments(
        args.output, max_steps=args.steps, per_device_train_batch_size=4, per_device_eval_batch_size=4,
        learning_rate=args.lr, lr_scheduler_type="cosine", logging_steps=1, report_to=[],
        use_cpu=not torch.cuda.is_available(), eval_strategy="steps", eval_steps=args.every, save_steps=args.every,
        save_total_limit=2, load_best_model_at_end=True, metric_for_best_model="eval_loss",
    )  # fmt: skip
    trainer = rw.resumable(
        Trainer(
            model,
            settings,
            train_dataset=rows_of(tokenizer, args.data),  # type: ignore[arg-type]
            eval_dataset=rows_of(tokenizer, args.valid),  # type: ignore[arg-type]
            data_collator=DataCollatorForSeq2Seq(tokenizer, padding=True),
            processing_class=tokenizer,
        )
    )
    trainer.train(resume_from_checkpoint=args.resume or None)
    after = trainer.evaluate()["eval_loss"]
    with rw.disabled(model):
        before = trainer.evaluate()["eval_loss"]
    trainer.save_model(f"{args.output}/adapter")
    print(f"validation loss: base {before:.4f}, adapter {after:.4f}, best {trainer.state.best_model_checkpoint}")


if __name__ == "__main__":
    main()
