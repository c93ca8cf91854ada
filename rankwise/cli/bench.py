"""`rankwise bench run SUITE [--only ...]`: what is missing of a suite, into the store."""

from __future__ import annotations

import argparse
from typing import Any

from rankwise.cli.arguments import positive
from rankwise.errors import counted


def add_suite(parser: argparse.ArgumentParser, name: str) -> None:
    """The argument that names a suite."""
    parser.add_argument("suite", metavar=name, help="a suite's file, or its name in benchmarks/quality/suites")


def add_only(parser: argparse.ArgumentParser) -> None:
    """The flag `--only`."""
    parser.add_argument(
        "--only", nargs="+", metavar="PATTERN", default=None,
        help="cells by method/task/seed or how that begins: lora-r4, 'lora-*/movies', '*/*/0'",
    )  # fmt: skip


def add_workers(parser: argparse.ArgumentParser) -> None:
    """The flag `--workers`."""
    parser.add_argument("--workers", type=positive, default=2, metavar="N", help="processes at a time, one thread each")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the command's arguments."""
    add_suite(parser, "SUITE")
    add_only(parser)
    add_workers(parser)
    parser.add_argument("--limit", type=positive, metavar="N", help="stop after so many cells")
    parser.add_argument("--retry-failed", action="store_true", help="also cells that failed before")


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Runs; see `recipes.bench_run`."""
    from rankwise.recipes.bench_run import bench_run

    return bench_run(args.suite, args.only or (), args.workers, args.retry_failed, args.limit)


def show(result: dict[str, Any]) -> None:
    """What was done, and what is left."""
    print(
        f"{counted(result['run'], 'cell')} run in {result['time_s']:.0f} s, {result['left']:,} left: {result['store']}"
    )
    if result["waiting"]:
        print(f"without a learning rate yet: {', '.join(result['waiting'])}")
    print(f"table: rankwise bench report {result['suite']}")
