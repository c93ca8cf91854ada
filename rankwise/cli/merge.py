"""`rankwise merge ADAPTER --out DIR`: a model folder, and the certificate that it does what the adapter did."""

from __future__ import annotations

import argparse
from typing import Any

MERGE_DTYPES = ("fp32", "bf16", "fp16")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the command's arguments."""
    parser.add_argument("adapter", metavar="ADAPTER", help="a run folder or an adapter folder")
    parser.add_argument("--out", required=True, metavar="DIR", help="the folder to write; must not exist")
    parser.add_argument("--task", metavar="NAME", help="of several adapters under a gate: the task to merge")
    parser.add_argument("--dtype", choices=MERGE_DTYPES, help="of the merged weights; not given: the base's own")
    parser.add_argument("--base", metavar="MODEL", help="the adapter's base model, where it is not the one it names")
    parser.add_argument("--device", default="auto", help="cpu, cuda, mps or auto")


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Merges; see `recipes.merge`."""
    from rankwise.recipes.merge import merge

    return merge(args.adapter, args.out, dtype=args.dtype, base=args.base, device=args.device, task=args.task)


def show(result: dict[str, Any]) -> None:
    """The folder and its certificate in three lines."""
    found = result["certificate"]
    stored = found["dequantised_from"]
    print(f"merged model: {result['output']} ({found['dtype']}" + (f", dequantised from {stored})" if stored else ")"))
    print(
        f"certificate: KL {found['kl']:.2e} nats a token (bound {found['bound']:.0e}; the adapter's own effect "
        f"{found['adapter_effect_kl']:.2e}), largest logit difference {found['max_abs_diff']:.2e}, "
        f"same first choice on {found['top1_agreement']:.1%} of {found['num_probe_tokens']} tokens of {found['probes']}"
    )
    print(f"rounding: {result['error']:.1e} of the merged weights, {result['update_error']:.1e} of the update")
