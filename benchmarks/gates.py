"""What a gate of several adapters costs: 8 rows of one token, 8 x 64 and a training step, against one LoRA adapter.

    python benchmarks/gates.py --rounds 15 --out benchmarks/results/gates.jsonl

A random Llama (8 layers, hidden 512) in fp32, adapters of r 16 on all linear layers. `task`: a hard gate with one task
for the batch; `rows`: each of 8 rows of another task; `soft`: a learned mixture.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable

import torch
from measure import header, interleaved, ratio_row, report, settings_of
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

import rankwise as rw

ROWS = 8


def build() -> PreTrainedModel:
    """The base."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=2000, hidden_size=512, intermediate_size=1408, num_hidden_layers=8, num_attention_heads=8,
        num_key_value_heads=8,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


def gate(adapters: int, mode: str, task: object = None) -> PreTrainedModel:
    """The base with so many adapters."""
    every = {f"task{i}": rw.LoraConfig(r=16, init_lora_weights=False) for i in range(adapters)}
    model = rw.attach_gate(build(), every, rw.GateConfig(mode))
    rw.set_task(model, task)
    return model


def work(model: PreTrainedModel, ids: torch.Tensor, trains: bool) -> Callable[[], object]:
    """A forward without gradients, or one with its backward pass."""

    def forward() -> None:
        with torch.no_grad():
            model(input_ids=ids, use_cache=False)

    def step() -> None:
        model(input_ids=ids, labels=ids).loss.backward()
        model.zero_grad(set_to_none=True)

    return step if trains else forward


def main() -> None:
    """Measures each on each shape."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--adapters", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    models = {
        "LoRA": rw.attach(build(), rw.LoraConfig(r=16, init_lora_weights=False)),
        "task": gate(options.adapters, "hard", "task1"),
        "rows": gate(options.adapters, "hard", torch.arange(ROWS) % options.adapters),
        "soft": gate(options.adapters, "soft"),
    }
    rows: list[dict[str, object]] = []
    for name, tokens, trains in (("8 x 1", 1, False), ("8 x 64", 64, False), ("step 8 x 64", 64, True)):
        ids = torch.randint(0, 2000, (ROWS, tokens), generator=torch.Generator().manual_seed(0))
        times = interleaved(
            {key: work(model, ids, trains) for key, model in models.items()}, options.rounds,
            settings={**settings_of("gates", options), "shape": name}, out=options.out,
        )  # fmt: skip
        rows += [ratio_row(f"{name}: {key} / LoRA", times, key, "LoRA") for key in ("task", "rows", "soft")]
    report(header(**settings_of("gates", options)), rows, options.out)


if __name__ == "__main__":
    main()
