"""Attention on a CPU with bf16 instructions: ours by blocks against torch's flash attention, by length of a segment.

    python benchmarks/attention.py --rounds 20 --out benchmarks/results/attention.jsonl

Causal, bf16, `--rows` segments of the same length, heads of SmolLM2 (9 of 64, 3 for keys) or of the size asked for. A
pass is forward and backward, or the forward without gradients.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable

import torch
from measure import header, interleaved, ratio_row, report, settings_of
from torch.nn.functional import scaled_dot_product_attention

from rankwise.models.blocked import blocked_attention, fits

LENGTHS = (16, 32, 64, 97, 128, 200, 256, 512, 1024, 2048, 4096)


def passes(rows: int, heads: int, keys: int, size: int, length: int) -> dict[str, Callable[[], object]]:
    """One pass of each kind."""
    generator = torch.Generator().manual_seed(0)

    def draw(number: int) -> torch.Tensor:
        drawn = torch.randn(rows, length, number, size, generator=generator).bfloat16()
        return drawn.transpose(1, 2).requires_grad_()

    inputs = [draw(heads), draw(keys), draw(keys)]
    upstream = torch.randn(rows, length, heads, size, generator=generator).bfloat16()
    assert fits(*inputs, None), "this CPU does not multiply bf16 matrices: nothing to compare"

    def ours() -> torch.Tensor:
        return blocked_attention(*inputs, None, True, None)

    def flash() -> torch.Tensor:
        found = scaled_dot_product_attention(*inputs, is_causal=True, enable_gqa=heads != keys)
        return found.transpose(1, 2).contiguous()

    def both(attend: Callable[[], torch.Tensor]) -> Callable[[], object]:
        return lambda: torch.autograd.grad(attend(), inputs, upstream)

    def forward(attend: Callable[[], torch.Tensor]) -> Callable[[], object]:
        return torch.no_grad()(attend)

    return {
        "ours": both(ours), "flash": both(flash), "ours, forward": forward(ours), "flash, forward": forward(flash),
    }  # fmt: skip


def repeated(once: Callable[[], object], times: int) -> Callable[[], None]:
    """`once`, so often that a clock can see it."""

    def many() -> None:
        for _ in range(times):
            once()

    return many


def main() -> None:
    """Measures and reports each length."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=1)
    parser.add_argument("--heads", type=int, nargs=3, default=(9, 3, 64), help="of queries, of keys, and their size")
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    rows = []
    for length in LENGTHS:
        often = max(1, 20_000 // length // max(1, length // 256))
        chosen = {name: repeated(one, often) for name, one in passes(options.rows, *options.heads, length).items()}
        times = interleaved(chosen, options.rounds)
        rows.append(ratio_row(f"{length} tokens: ours / flash", times, "ours", "flash"))
        rows.append(ratio_row(f"{length} tokens, forward: ours / flash", times, "ours, forward", "flash, forward"))
    report(header(**settings_of("attention", options)), rows, options.out)


if __name__ == "__main__":
    main()
