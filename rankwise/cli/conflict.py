"""`rankwise conflict RUN`: in which layers the tasks of a run pull apart, by the cosine of their gradients."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the command's arguments."""
    parser.add_argument("run", metavar="RUN", help="the folder of a run on several tasks that has measured it")
    parser.add_argument(
        "--below", type=float, default=0.0, metavar="COSINE",
        help="layers with a pair of tasks below it should have an adapter for each task",
    )  # fmt: skip
    parser.add_argument(
        "--picture", metavar="FILE", help="draw the heat map, and the pairs over time, into this PNG or SVG"
    )


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Reads; see `recipes.conflict_report`."""
    from rankwise.recipes.conflict_report import conflict_report

    picture = None if args.picture is None else Path(args.picture).expanduser().absolute()
    return conflict_report(args.run, args.below, picture)


def show(result: dict[str, Any]) -> None:
    """A line for each layer, what to isolate, the pairs over time."""
    from rankwise.recipes.conflict_report import text_report

    print(
        f"cosines of the gradients of {', '.join(result['tasks'])}; in each layer the pair that is furthest apart, and"
    )
    print("of each of the two its own: the cosine of two batches of that task, which noise brings down to 0")
    for line in text_report(result):
        print(line)
    if result["picture"] is not None:
        print(f"picture: {result['picture']}")
