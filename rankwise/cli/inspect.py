"""`rankwise inspect ADAPTER`: what an adapter folder holds, read from the folder alone."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the command's arguments."""
    parser.add_argument("adapter", metavar="ADAPTER", help="an adapter folder, or a run folder")
    parser.add_argument("--picture", metavar="FILE", help="draw the rank map into this PNG or SVG")


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Reads; see `recipes.inspect_gate`."""
    from rankwise.recipes.inspect_gate import inspect_adapters

    return inspect_adapters(args.adapter, None if args.picture is None else Path(args.picture).expanduser().absolute())


def show(result: dict[str, Any]) -> None:
    """A table row for each module, the rank map and its history, a summary."""
    from rich.console import Console
    from rich.table import Table

    from rankwise.cli.tables import bytes_text
    from rankwise.recipes.rank_map import rank_map, text_history, text_map

    console = Console()
    table = Table(title=f"{result['kind']} adapter {result['adapter']}")
    several = "adapters" in result
    for heading in (*(("adapter",) if several else ()), "module", "rank", "effective rank", "norm"):
        table.add_column(heading, justify="left" if heading in ("adapter", "module") else "right")
    for module in result["modules"]:
        figures = f"{module['rank']}", f"{module['effective_rank']:.1f}", f"{module['norm']:.3f}"
        table.add_row(*((module["adapter"],) if several else ()), module["name"], *figures)
    console.print(table)
    for line in _gate_lines(result) if several else ():
        console.print(line, highlight=False, markup=False, soft_wrap=True)
    for line in [*text_map(rank_map(result["ranks"])), *text_history(result["history"])]:
        console.print(line, highlight=False, markup=False, soft_wrap=True)
    console.print(
        f"base {result['base']}; {result['trainable_parameters']:,} parameters, {bytes_text(result['file_bytes'])}",
        highlight=False,
    )
    if result["vllm_max_lora_rank"] is not None:
        console.print(f"vLLM serves it with --max-lora-rank {result['vllm_max_lora_rank']}", highlight=False)
    if result["picture"] is not None:
        console.print(f"picture: {result['picture']}", highlight=False, soft_wrap=True)


def _gate_lines(result: dict[str, Any]) -> list[str]:
    """What a gate says besides: its tasks, learned shares, vectors, classifier."""
    mode = f"{result['mode']} gate" if result["mode"] else "task embeddings"
    lines = [f"{mode} of {len(result['tasks'])} tasks: {', '.join(result['tasks'])}"]
    for group, shares in result["shares"].items():
        lines.append(f"shares, {group}: " + ", ".join(f"{task} {share:.2f}" for task, share in shares.items()))
    for task, vector in result["vectors"].items():
        lines.append(f"vector of {task}: mean {vector['mean']:.3f}, deviation {vector['deviation']:.3f}")
    if result["router"] is not None and "accuracy" in result["router"]:
        lines.append(f"classifier: {result['router']['accuracy']:.1%} of held-out rows to the right task")
    return lines
