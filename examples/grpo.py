"""Reinforcement learning with TRL's GRPOTrainer, the model with its adapter off being the reference.

    pip install 'rankwise[trl]'
    python examples/grpo.py --data train.jsonl --model demo --output out

GRPO (Shao et al. 2024, arXiv 2402.03300) holds the model to a reference by a KL term, times beta. TRL finds PEFT's
adapters by PEFT's class, and would load a whole second base for any other model. So the trainer is made with beta = 0,
which loads none, and then given its beta and the base alone: no second model in memory.

The reward is a plain function of the answers. This one wants short answers in capitals, which any model can learn.
"""

from __future__ import annotations

import argparse

import torch
from datasets import Dataset
from flat_loop import read_rows
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import GRPOConfig, GRPOTrainer

import rankwise as rw
from rankwise.models.load import resolve


def capitals(completions: list, **columns: object) -> list[float]:
    """The share of an answer's letters that are capitals; 0 for one without letters."""
    texts = [answer[0]["content"] if isinstance(answer, list) else answer for answer in completions]
    letters = [[letter for letter in text if letter.isalpha()] for text in texts]
    return [sum(letter.isupper() for letter in found) / len(found) if found else 0.0 for found in letters]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, help="JSONL with prompt")
    parser.add_argument("--model", default="demo", help="a folder, a Hub id, or demo")
    parser.add_argument("--output", required=True)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--beta", type=float, default=0.04)
    parser.add_argument("--answers", type=int, default=4, help="to each prompt")
    parser.add_argument("--tokens", type=int, default=32, help="of an answer, at most")
    args = parser.parse_args()
    torch.manual_seed(0)

    folder = resolve(args.model)
    tokenizer = AutoTokenizer.from_pretrained(folder, padding_side="left")
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    rw.attach(model, rw.LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM"))

    prompts = [{"prompt": [{"role": "user", "content": row["prompt"]}]} for row in read_rows(args.data)]
    settings = GRPOConfig(
        args.output, max_steps=args.steps, per_device_train_batch_size=args.answers, num_generations=args.answers,
        max_completion_length=args.tokens, learning_rate=args.lr, logging_steps=1, save_steps=args.steps, report_to=[],
        bf16=False, use_cpu=not torch.cuda.is_available(), gradient_checkpointing=False, beta=0.0,
    )  # fmt: skip
    trainer = GRPOTrainer(
        model, capitals, args=settings, train_dataset=Dataset.from_list(prompts), processing_class=tokenizer
    )
    trainer.beta, trainer.ref_model = args.beta, rw.BaseAlone(model)
    trainer.train()

    lines = [line for line in trainer.state.log_history if "reward" in line]
    trainer.save_model(f"{args.output}/adapter")
    print(f"kl: first step {lines[0]['kl']:.6f}, last step {lines[-1]['kl']:.6f}")
    print(f"reward: first step {lines[0]['reward']:.3f}, last step {lines[-1]['reward']:.3f}")


if __name__ == "__main__":
    main()
