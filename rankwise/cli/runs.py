"""`rankwise runs [FOLDER]`: the runs below a folder, with status, progress and losses."""

from __future__ import annotations

import argparse
from typing import Any

from rankwise.errors import counted

SORTS = ("when", "name", "status", "step", "best", "loss")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the command's arguments."""
    parser.add_argument("folder", metavar="FOLDER", nargs="?", default=".", help="where to look, and below")
    parser.add_argument("--sort", choices=SORTS, default="when", help="newest, furthest and best come first")


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Reads; see `recipes.runs`."""
    from rankwise.recipes.runs import list_runs

    return list_runs(args.folder, args.sort)


def show(result: dict[str, Any]) -> None:
    """One table row for each run."""
    from rich.console import Console
    from rich.table import Table

    console = Console()
    if not result["runs"]:
        console.print(f"no runs in '{result['folder']}' or below", highlight=False, markup=False)
        return
    table = Table(title=f"{counted(len(result['runs']), 'run')} in {result['folder']}")
    for heading in ("run", "status", "step", "best valid", "loss", "when"):
        justify = "left" if heading in ("run", "status", "when") else "right"
        table.add_column(heading, justify=justify, overflow="fold", no_wrap=heading != "run")
    for row in result["runs"]:
        losses = ["" if row[name] is None else f"{row[name]:.4f}" for name in ("best_valid_loss", "final_loss")]
        when = (row["when"] or "")[:16].replace("T", " ")
        table.add_row(row["name"], row["status"], f"{row['step']}/{row['steps'] or '?'}", *losses, when)
    console.print(table)
    for row in result["runs"]:
        if row["problem"] is not None:
            console.print(f"{row['name']}: {row['problem']}", highlight=False, markup=False, soft_wrap=True)
