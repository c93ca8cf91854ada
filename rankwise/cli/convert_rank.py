"""`rankwise convert-rank ADAPTER --rank R|--energy E --out DIR`: an adapter of lower ranks, and what that costs."""

from __future__ import annotations

import argparse
from typing import Any

from rankwise.cli.arguments import positive

METHODS = ("auto", "svd", "prefix")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the command's arguments."""
    parser.add_argument("adapter", metavar="ADAPTER", help="an adapter folder, or a run folder")
    parser.add_argument("--rank", type=positive, metavar="R", help="the rank of every layer that has a higher one")
    parser.add_argument(
        "--energy",
        type=float,
        metavar="E",
        help="instead: the share of each layer's squared singular values that stays",
    )
    parser.add_argument(
        "--method", choices=METHODS, default="auto", help="prefix: of a nested adapter, at no cost; auto: that, or svd"
    )
    parser.add_argument("--out", required=True, metavar="DIR", help="the folder to write; must not exist")


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Converts; see `recipes.convert_rank`."""
    from rankwise.recipes.convert_rank import convert_rank

    return convert_rank(args.adapter, args.out, rank=args.rank, energy=args.energy, method=args.method)


def show(result: dict[str, Any]) -> None:
    """The folder, its error, and the layers that lost most."""
    from rankwise.cli.tables import bytes_text

    ranks = [module["rank"] for module in result["modules"]]
    print(f"adapter: {result['output']} ({bytes_text(result['file_bytes'])}), by {result['method']}")
    print(f"ranks {min(ranks)} to {max(ranks)}; relative error of the update {result['error']:.2e}")
    if result["vllm_max_lora_rank"] is not None:
        print(f"vLLM serves it with --max-lora-rank {result['vllm_max_lora_rank']}")
    for module in sorted(result["modules"], key=lambda module: -module["error"])[:3]:
        print(f"  {module['name']}: rank {module['before']} to {module['rank']}, error {module['error']:.2e}")
