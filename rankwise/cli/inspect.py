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
    """Reads; see `recipes.inspect`."""
    from rankwise.recipes.inspect import inspect_adapter

    return inspect_adapter(args.adapter, None if args.picture is None else Path(args.picture).expanduser().absolute())


def show(result: dict[str, Any]) -> None:
    """A table row for each module, the rank map and its history, a summary."""
    from rich.console import Console
    from rich.table import Table

    from rankwise.cli.tables import bytes_text
    from rankwise.recipes.rank_map import rank_map, text_history, text_map

    table = Table(title=f"{result['kind']} adapter {result['adapter']}")
    for heading in ("module", "rank", "effective rank", "norm"):
        table.add_column(heading, justify="left" if heading == "module" else "right")
    for module in result["modules"]:
        figures = f"{module['rank']}", f"{module['effective_rank']:.1f}", f"{module['norm']:.3f}"
        table.add_row(module["name"], *figures)
    console = Console()
    console.print(table)
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
