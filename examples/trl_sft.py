"""A fine-tune with TRL's SFTTrainer (`pip install 'rankwise[trl]'`) on a model that rankwise attached an adapter to.

    python examples/trl_sft.py --data train.jsonl --model demo --output out

TRL reads the rows, applies the chat template and packs; the adapter, its start and its file are rankwise's. Do not pass
a `peft_config`: that would wrap the model a second time.
"""

from __future__ import annotations

import argparse

import torch
from datasets import Dataset
from flat_loop import read_rows
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import SFTConfig, SFTTrainer

import rankwise as rw
from rankwise.models.load import resolve


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, help="JSONL with prompt and completion")
    parser.add_argument("--model", default="demo", help="a folder, a Hub id, or demo")
    parser.add_argument("--output", required=True)
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--lr", type=float, default=1e-3)
    args = parser.parse_args()
    torch.manual_seed(0)

    folder = resolve(args.model)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    rw.attach(model, rw.LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM"))

    conversations = [
        {
            "prompt": [{"role": "user", "content": row["prompt"]}],
            "completion": [{"role": "assistant", "content": row["completion"]}],
        }
        for row in read_rows(args.data)
    ]
    settings = SFTConfig(
        args.output, max_steps=args.steps, per_device_train_batch_size=4, learning_rate=args.lr, logging_steps=1,
        save_steps=args.steps, report_to=[], max_length=512, completion_only_loss=True, bf16=False,
        use_cpu=not torch.cuda.is_available(), gradient_checkpointing=False,
    )  # fmt: skip
    trainer = rw.resumable(
        SFTTrainer(model, args=settings, train_dataset=Dataset.from_list(conversations), processing_class=tokenizer)
    )
    trainer.train()
    losses = [line["loss"] for line in trainer.state.log_history if "loss" in line]
    trainer.save_model(f"{args.output}/adapter")
    print(f"loss: first step {losses[0]:.4f}, last step {losses[-1]:.4f}")
    print(f"saved to {args.output}/adapter: try `rankwise generate {args.output}/adapter --prompt ...`")


if __name__ == "__main__":
    main()
