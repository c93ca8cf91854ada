"""`rankwise bench check SUITE [--only ...] [--workers N]`: stored cells run again, every loss compared."""

from __future__ import annotations

import argparse
from typing import Any

from rankwise.cli.bench import add_only, add_suite, add_workers
from rankwise.errors import counted


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the command's arguments."""
    add_suite(parser, "SUITE")
    add_only(parser)
    add_workers(parser)


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Runs again; see `recipes.bench_run`."""
    from rankwise.recipes.bench_check import bench_check

    return bench_check(args.suite, args.only or (), args.workers)


def show(result: dict[str, Any]) -> None:
    """How many came out the same."""
    exact = sum(entry["exact"] for entry in result["cells"])
    print(f"{exact} of {counted(len(result['cells']), 'cell')} the same to the last bit, code {result['code']}")
