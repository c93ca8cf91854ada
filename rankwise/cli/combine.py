"""`rankwise combine A B ... --method M --weights ... --out DIR`: one adapter of several."""

from __future__ import annotations

import argparse
from typing import Any

from rankwise.cli.arguments import PRECISIONS, named_files, positive

METHODS = ("linear", "sum", "cat", "svd", "ties", "dare_linear", "dare_ties", "magnitude_prune")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the command's arguments."""
    parser.add_argument("adapters", nargs="+", metavar="ADAPTER", help="two or more adapter folders or run folders")
    parser.add_argument("--method", default="sum", metavar="M", help=", ".join(METHODS))
    parser.add_argument(
        "--weights", nargs="+", type=float, metavar="W",
        help="one for each adapter; not given: equal ones that add up to 1, of ties and dare_ties 1 each",
    )  # fmt: skip
    parser.add_argument("--out", required=True, metavar="DIR", help="the folder to write; must not exist")
    parser.add_argument("--rank", type=positive, metavar="R", help="svd: the rank; not given: the highest of theirs")
    parser.add_argument(
        "--energy", type=float, metavar="E", help="svd, instead: the share of squared singular values that stays"
    )
    parser.add_argument(
        "--density", type=float, metavar="D", help="ties, dare_*, magnitude_prune: the share that stays; not given: 0.5"
    )
    parser.add_argument("--seed", type=int, metavar="S", help="dare_*: of the draw; not given: 0")
    parser.add_argument("--tune", metavar="FILE", help="search the weights, by the loss on this file")
    parser.add_argument("--trials", type=positive, metavar="N", help="of --tune: at most; not given: 40")
    parser.add_argument(
        "--tasks", nargs="*", metavar="NAME=FILE",
        help="measure base, adapters and result on these files; without files: on the runs' own valid files",
    )  # fmt: skip
    parser.add_argument("--base", metavar="MODEL", help="the base of all of them, where they name none or several")
    parser.add_argument("--batch-size", type=positive, default=16, metavar="N", help="rows at a time, in measuring")
    parser.add_argument("--device", default="auto", help="cpu, cuda, mps or auto; in measuring")
    parser.add_argument("--precision", choices=PRECISIONS, default="auto", help="in measuring")


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Combines; see `recipes.combine`."""
    tasks = None if args.tasks is None else named_files(args.tasks)
    from rankwise.recipes.combine import CombineConfig, combine

    config = CombineConfig(
        rank=args.rank, energy=args.energy, density=args.density, seed=args.seed, base=args.base, tune=args.tune,
        trials=args.trials, tasks=tasks, batch_size=args.batch_size, device=args.device, precision=args.precision,
        progress=True,
    )  # fmt: skip
    return combine(args.adapters, args.out, args.method, args.weights, config)


def show(result: dict[str, Any]) -> None:
    """The folder, its error, what a search found, and the table of tasks."""
    from rich.console import Console

    from rankwise.cli.tables import bytes_text, task_table

    ranks = [module["rank"] for module in result["modules"]]
    weights = " ".join(f"{weight:g}" for weight in result["weights"])
    print(f"adapter: {result['output']} ({bytes_text(result['file_bytes'])}), by {result['method']}, weights {weights}")
    print(f"ranks {min(ranks)} to {max(ranks)}; relative error against the sum of the updates {result['error']:.2e}")
    if result["vllm_max_lora_rank"] is not None:
        print(f"vLLM serves it with --max-lora-rank {result['vllm_max_lora_rank']}")
    if (found := result["tune"]) is not None:
        print(f"loss on {found['data']}: {found['before']:.4f} to {found['after']:.4f} in {found['trials']} trials")
    if result.get("tasks"):
        Console().print(task_table(result["tasks"], result["adapters"]))
