"""What a LoRA training step costs: the frozen limit, ours, PEFT, full fine-tuning.

    python benchmarks/step.py --size 60M --precision bf16 --rounds 20 --threads 1 --out benchmarks/results/step.jsonl

The limit is the frozen base: its forward, and the backward through activations only. Random weights; r 16, all linear
layers, batch 2 x 512. "own loss" is transformers' loss; "rows" is ours, which never holds the logits. A step is
forward, backward, AdamW.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable

import peft
import torch
from measure import header, interleaved, ratio, report
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

import rankwise as rw
from rankwise.models.batch import Batch
from rankwise.models.loss import token_losses

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


def variants(size: str, dtype: torch.dtype, ids: torch.Tensor) -> dict[str, Callable[[], object]]:
    """Every way to make a step."""
    rows = torch.arange(ids.shape[0])[:, None].expand_as(ids).contiguous()
    batch = Batch(ids, ids, rows, ids.shape[0], attention_mask=torch.ones_like(ids))

    def own(model: torch.nn.Module) -> Callable[[], torch.Tensor]:
        return lambda: model(input_ids=ids, labels=ids, use_cache=False).loss

    def by_rows(model: PreTrainedModel) -> Callable[[], torch.Tensor]:
        return lambda: token_losses(model, batch).mean()

    found: dict[str, Callable[[], object]] = {}
    for name, loss_of in (("limit, own loss", own), ("limit, rows", by_rows)):
        model = build(size, dtype).requires_grad_(False)
        model.get_input_embeddings().register_forward_hook(lambda _m, _i, out: out.requires_grad_())
        found[name] = stepper(model, loss_of(model))
    for dropout in (0.0, 0.1):
        mark = f", dropout {dropout}" if dropout else ""
        config = dict(r=16, lora_alpha=32, target_modules="all-linear", lora_dropout=dropout)
        for name, loss_of in (("ours, own loss", own), ("ours, rows", by_rows)):
            model = rw.attach(build(size, dtype), rw.LoraConfig(**config))
            found[name + mark] = stepper(model, loss_of(model))
        model = peft.get_peft_model(build(size, dtype), peft.LoraConfig(**config))
        found["PEFT" + mark] = stepper(model, own(model))
    low = peft.get_peft_model(
        build(size, dtype), peft.LoraConfig(r=16, lora_alpha=32, target_modules="all-linear"),
        autocast_adapter_dtype=False,
    )  # fmt: skip
    found["PEFT, adapters in the base's dtype"] = stepper(low, own(low))
    model = build(size, dtype)
    found["full fine-tuning"] = stepper(model, own(model))
    return found


PAIRS = [
    ("ours, rows", "PEFT"),
    ("ours, rows, dropout 0.1", "PEFT, dropout 0.1"),
    ("ours, rows", "PEFT, adapters in the base's dtype"),
    ("ours, own loss", "limit, own loss"),
    ("ours, rows", "limit, rows"),
    ("ours, rows", "limit, own loss"),
    ("PEFT", "limit, own loss"),
    ("full fine-tuning", "limit, own loss"),
]


def main() -> None:
    """Measures and reports the pairs of the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", choices=SIZES, default="60M")
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="bf16")
    parser.add_argument("--tokens", type=int, default=512, help="tokens a row, 2 rows")
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[options.precision]
    ids = torch.randint(0, VOCABULARY, (2, options.tokens), generator=torch.Generator().manual_seed(0))
    times = interleaved(variants(options.size, dtype, ids), options.rounds)
    rows = [
        {"what": f"{a} / {b}", **ratio(times, a, b), "wall_median": ratio(times, a, b, clock=1)["median"]}
        for a, b in PAIRS
    ]
    settings = {name: value for name, value in vars(options).items() if name != "out"}
    report(header(benchmark="step", **settings), rows, options.out)


if __name__ == "__main__":
    main()
