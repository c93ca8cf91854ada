"""`rankwise bench report TABLE`: a suite's table from the store."""

from __future__ import annotations

import argparse
from typing import Any

from rankwise.cli.bench import add_suite
from rankwise.errors import counted


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the command's arguments."""
    add_suite(parser, "TABLE")


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Reads and writes; see `recipes.bench_report`."""
    from rankwise.recipes.bench_report import bench_report

    return bench_report(args.suite)


def show(result: dict[str, Any]) -> None:
    """The sentences, and where the table is."""
    for text in result["sentences"]:
        print(text)
    print(f"{counted(result['cells'], 'cell')}, {result['stale']:,} of them stale, {result['missing']:,} missing")
    print(f"table: {result['table']}" + (f", picture: {result['picture']}" if result["picture"] else ""))
