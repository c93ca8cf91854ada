"""`rankwise fold TARGET [--task NAME] [--rank R|--energy E] --out DIR`: a gate as one plain adapter."""

from __future__ import annotations

import argparse
from typing import Any

from rankwise.cli.arguments import positive


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the command's arguments."""
    parser.add_argument("target", metavar="TARGET", help="the folder of a gate or of task embeddings, or a run folder")
    parser.add_argument(
        "--task", metavar="NAME", help="the task whose adapter it is to be; not given: the learned mixture"
    )
    parser.add_argument(
        "--rank", type=positive, metavar="R", help="the rank of every layer that would have a higher one"
    )
    parser.add_argument(
        "--energy",
        type=float,
        metavar="E",
        help="instead: the share of each layer's squared singular values that stays",
    )
    parser.add_argument("--out", required=True, metavar="DIR", help="the folder to write; must not exist")


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Folds; see `recipes.fold`."""
    from rankwise.recipes.fold import fold

    return fold(args.target, args.out, task=args.task, rank=args.rank, energy=args.energy)


def show(result: dict[str, Any]) -> None:
    """The folder, what it is of, and its error."""
    from rankwise.cli.tables import bytes_text

    what = f"task {result['task']}" if result["task"] else f"the mixture of {', '.join(result['tasks'])}"
    ranks = [module["rank"] for module in result["modules"]]
    print(f"adapter: {result['output']} ({bytes_text(result['file_bytes'])}), {what}")
    print(f"ranks {min(ranks)} to {max(ranks)}; relative error of the update {result['error']:.2e}")
    if result["vllm_max_lora_rank"] is not None:
        print(f"vLLM serves it with --max-lora-rank {result['vllm_max_lora_rank']}")
