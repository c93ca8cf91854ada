"""What a LoRA training step costs: the frozen limit, ours, PEFT, full fine-tuning.

    python benchmarks/step.py --size 60M --precision bf16 --rounds 20 --threads 1 --out benchmarks/results/step.jsonl
    python benchmarks/step.py --size 200M --tokens 2048 --only "ours, rows" PEFT "full fine-tuning"

The limit is the frozen base: its forward, and the backward through activations only. Random weights; r 16, all linear
layers, two rows of --tokens. "own loss" is transformers' loss; "rows" is ours, which never holds the logits. A step is
forward, backward, AdamW. "ours, rows / PEFT, checkpointing" is a step at less than the memory of the latter
(memory.py).
"""

from __future__ import annotations

import argparse
from collections.abc import Callable

import peft
import torch
from measure import header, interleaved, ratio_row, report, settings_of
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

import rankwise as rw
from rankwise.models.batch import Batch
from rankwise.models.loss import token_losses
from rankwise.train.recompute import enable_gradient_checkpointing

SIZES = {
    "tiny": dict(
        hidden_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, intermediate_size=96
    ),
    "60M": dict(
        hidden_size=512, num_hidden_layers=8, num_attention_heads=8, num_key_value_heads=4, intermediate_size=1408
    ),
    "200M": dict(
        hidden_size=1024, num_hidden_layers=12, num_attention_heads=16, num_key_value_heads=8, intermediate_size=2816
    ),
}
VOCABULARY = 32_000


def build(size: str, dtype: torch.dtype) -> PreTrainedModel:
    """A random Llama, untied."""
    torch.manual_seed(0)
    config = LlamaConfig(**SIZES[size], vocab_size=VOCABULARY, tie_word_embeddings=False)
    return LlamaForCausalLM(config).to(dtype).train()


def stepper(model: torch.nn.Module, loss: Callable[[], torch.Tensor]) -> Callable[[], float]:
    """One step: loss, backward, AdamW on what is trainable."""
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-4) if trained else None

    def step() -> float:
        value = loss()
        value.backward()
        if optimizer is not None:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        return value.item()

    return step


def variants(size: str, dtype: torch.dtype, ids: torch.Tensor) -> dict[str, Callable[[], Callable[[], float]]]:
    """Every way to make a step, by name; each is built when it is called."""
    rows = torch.arange(ids.shape[0])[:, None].expand_as(ids).contiguous()
    batch = Batch(ids, ids, rows, ids.shape[0], attention_mask=torch.ones_like(ids))

    def own(model: torch.nn.Module) -> Callable[[], float]:
        return stepper(model, lambda: model(input_ids=ids, labels=ids, use_cache=False).loss)

    def by_rows(model: PreTrainedModel) -> Callable[[], float]:
        return stepper(model, lambda: token_losses(model, batch).mean())

    def frozen() -> PreTrainedModel:
        model = build(size, dtype).requires_grad_(False)
        model.get_input_embeddings().register_forward_hook(lambda _m, _i, out: out.requires_grad_())
        return model

    def base(checkpointing: bool) -> PreTrainedModel:
        model = build(size, dtype)
        if checkpointing:
            enable_gradient_checkpointing(model)
        return model

    def ours(dropout: float = 0.0, checkpointing: bool = False, r: int = 16) -> PreTrainedModel:
        return rw.attach(base(checkpointing), rw.LoraConfig(r=r, lora_alpha=32, lora_dropout=dropout))

    def theirs(dropout: float = 0.0, checkpointing: bool = False, cast: bool = True) -> torch.nn.Module:
        config = peft.LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", lora_dropout=dropout)
        return peft.get_peft_model(base(checkpointing), config, autocast_adapter_dtype=cast)

    return {
        "limit, own loss": lambda: own(frozen()),
        "limit, rows": lambda: by_rows(frozen()),
        "ours, own loss": lambda: own(ours()),
        "ours, rows": lambda: by_rows(ours()),
        "ours, r 1, rows": lambda: by_rows(ours(r=1)),
        "PEFT": lambda: own(theirs()),
        "ours, rows, dropout 0.1": lambda: by_rows(ours(0.1)),
        "PEFT, dropout 0.1": lambda: own(theirs(0.1)),
        "PEFT, adapters in the base's dtype": lambda: own(theirs(cast=False)),
        "ours, rows, checkpointing": lambda: by_rows(ours(checkpointing=True)),
        "PEFT, checkpointing": lambda: own(theirs(checkpointing=True)),
        "full fine-tuning": lambda: own(base(False)),
        "full fine-tuning, rows": lambda: by_rows(base(False)),
    }


PAIRS = [
    ("ours, rows", "PEFT"),
    ("ours, rows, dropout 0.1", "PEFT, dropout 0.1"),
    ("ours, rows", "PEFT, adapters in the base's dtype"),
    ("ours, own loss", "limit, own loss"),
    ("ours, rows", "limit, rows"),
    ("ours, r 1, rows", "limit, rows"),
    ("ours, rows", "limit, own loss"),
    ("PEFT", "limit, own loss"),
    ("full fine-tuning", "limit, own loss"),
    ("full fine-tuning, rows", "full fine-tuning"),
    ("ours, rows", "PEFT, checkpointing"),
    ("ours, rows, checkpointing", "PEFT, checkpointing"),
    ("ours, rows, checkpointing", "ours, rows"),
]


def main() -> None:
    """Measures and reports the pairs of the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", choices=SIZES, default="60M")
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="bf16")
    parser.add_argument("--tokens", type=int, default=512, help="tokens a row, 2 rows")
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--only", nargs="+", help="names of variants (each is a model in memory); pairs of these only")
    parser.add_argument("--out")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[options.precision]
    ids = torch.randint(0, VOCABULARY, (2, options.tokens), generator=torch.Generator().manual_seed(0))
    known = variants(options.size, dtype, ids)
    unknown = set(options.only or ()) - known.keys()
    if unknown:
        parser.error(f"no variant {sorted(unknown)}; there are {list(known)}")
    chosen = {name: make() for name, make in known.items() if not options.only or name in options.only}
    settings = settings_of("step", options)
    times = interleaved(chosen, options.rounds, settings=settings, out=options.out)
    rows = [ratio_row(f"{a} / {b}", times, a, b) for a, b in PAIRS if a in times and b in times]
    report(header(**settings), rows, options.out)


if __name__ == "__main__":
    main()
