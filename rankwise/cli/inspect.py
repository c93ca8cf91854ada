"""`rankwise inspect ADAPTER`: what an adapter folder holds, read from the folder alone."""

from __future__ import annotations

import argparse
from typing import Any


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the command's arguments."""
    parser.add_argument("adapter", metavar="ADAPTER", help="an adapter folder, or a run folder")


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Reads; see `recipes.inspect`."""
    from rankwise.recipes.inspect import inspect_adapter

    return inspect_adapter(args.adapter)


def show(result: dict[str, Any]) -> None:
    """A summary, and one table row for each module."""
    from rich.console import Console
    from rich.table import Table

    from rankwise.cli.tables import bytes_text

    table = Table(title=f"{result['kind']} adapter {result['adapter']}")
    for heading in ("module", "rank", "effective rank", "norm"):
        table.add_column(heading, justify="left" if heading == "module" else "right")
    for module in result["modules"]:
        figures = f"{module['rank']}", f"{module['effective_rank']:.1f}", f"{module['norm']:.3f}"
        table.add_row(module["name"], *figures)
    console = Console()
    console.print(table)
    console.print(
        f"base {result['base']}; {result['trainable_parameters']:,} parameters, {bytes_text(result['file_bytes'])}",
        highlight=False,
    )
