"""A whole LoRA fine-tune in one file, without rankwise's training loop: a model from Hugging Face, a plain torch loop.

    python examples/flat_loop.py --data train.jsonl --model demo --output my-adapter

`train.jsonl` holds {"prompt": ..., "completion": ...} rows. rankwise gives the adapter (`attach`), its file
(`save_adapter`) and the switch back to the base (`disabled`); the rest is what you would write anyway. The recipe that
does the same with packing, exact resume, evaluation and a certificate is `rankwise train`; see examples/notebook.py.
"""

from __future__ import annotations

import argparse
import json
import math
import random
from collections.abc import Iterator

import torch
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, AutoTokenizer

import rankwise as rw
from rankwise.models.load import resolve

IGNORED = -100


def read_rows(path: str) -> list[dict[str, str]]:
    with open(path, encoding="utf-8") as file:
        return [json.loads(line) for line in file if line.strip()]


def encode(tokenizer, row: dict[str, str], max_length: int) -> tuple[list[int], list[int]]:
    """Token ids and labels of one row: the loss sees the answer and the token that ends it, never the question."""
    question = [{"role": "user", "content": row["prompt"]}]
    answer = [*question, {"role": "assistant", "content": row["completion"]}]
    prompt = tokenizer.apply_chat_template(question, add_generation_prompt=True, tokenize=False)
    text = tokenizer.apply_chat_template(answer, tokenize=False)
    assert text.startswith(prompt), "this chat template rewrites the question once it is answered"
    prompt_ids = tokenizer(prompt, add_special_tokens=False)["input_ids"]
    answer_ids = tokenizer(text[len(prompt) :].rstrip(), add_special_tokens=False)["input_ids"]
    ids = (prompt_ids + answer_ids)[:max_length]
    return ids, ([IGNORED] * len(prompt_ids) + answer_ids)[:max_length]


def batches(rows: list[tuple[list[int], list[int]]], size: int, pad: int, seed: int) -> Iterator[dict]:
    """Shuffled epochs without end, padded on the right."""
    rng = random.Random(seed)
    while True:
        order = rng.sample(rows, len(rows))
        for start in range(0, len(order) - size + 1, size):
            chosen = order[start : start + size]
            longest = max(len(ids) for ids, _ in chosen)
            yield {
                "input_ids": torch.tensor([ids + [pad] * (longest - len(ids)) for ids, _ in chosen]),
                "attention_mask": torch.tensor([[1] * len(ids) + [0] * (longest - len(ids)) for ids, _ in chosen]),
                "labels": torch.tensor([labels + [IGNORED] * (longest - len(labels)) for _, labels in chosen]),
            }


def mean_loss(model, batch: dict) -> torch.Tensor:
    """Cross entropy in nats, mean over the trained tokens of the batch."""
    logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    return F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), batch["labels"][:, 1:].flatten(), ignore_index=IGNORED)


def learning_rate(step: int, steps: int, highest: float) -> float:
    """Five steps in a hundred of warm-up, then half a cosine."""
    warmup = max(1, steps // 20)
    if step <= warmup:
        return highest * step / warmup
    return highest * 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True)
    parser.add_argument("--model", default="demo", help="a folder, a Hub id, or `demo`")
    parser.add_argument("--output", default="my-adapter")
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()
    torch.manual_seed(0)

    folder = resolve(args.model)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).to(args.device)
    rows = [encode(tokenizer, row, max_length=512) for row in read_rows(args.data)]
    pad = tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id

    rw.attach(model, rw.LoraConfig(r=16, lora_alpha=32, target_modules="all-linear"))
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    print(f"{sum(p.numel() for p in trained):,} trainable parameters in {len(rw.ranks(model))} layers")
    optimizer = torch.optim.AdamW(trained, lr=args.lr, weight_decay=0.0)

    model.train()
    stream = batches(rows, min(args.batch_size, len(rows)), pad, seed=0)
    for step in range(1, args.steps + 1):
        batch = {name: tensor.to(args.device) for name, tensor in next(stream).items()}
        optimizer.param_groups[0]["lr"] = learning_rate(step, args.steps, args.lr)
        loss = mean_loss(model, batch)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        if step == 1 or step % 10 == 0 or step == args.steps:
            print(f"step {step:4d}  loss {loss.item():.4f}", flush=True)

    rw.save_adapter(model, args.output)
    model.eval()
    with torch.no_grad():
        after = mean_loss(model, batch).item()
        with rw.disabled(model):
            before = mean_loss(model, batch).item()
    print(f"last batch: base {before:.4f}, adapter {after:.4f}")
    print(f"saved to {args.output}: PEFT, vLLM and `rankwise generate {args.output} --prompt ...` load it")


if __name__ == "__main__":
    main()
