"""`rankwise find-lr RUN.yaml [key=value ...] [--apply]`: the learning-rate range test, with its curve."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from rankwise.cli.arguments import positive
from rankwise.errors import RequestError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the command's arguments."""
    parser.add_argument("run_file", metavar="RUN.yaml", help="the run file; nothing is written into its output folder")
    parser.add_argument("overrides", metavar="key=value", nargs="*", help="settings on top of the run file")
    parser.add_argument("--apply", action="store_true", help="write the rate into the run file, as train.lr")
    parser.add_argument("--lowest", type=float, default=1e-5, metavar="LR", help="the first rate (1e-5)")
    parser.add_argument("--highest", type=float, default=1.0, metavar="LR", help="the last rate (1)")
    parser.add_argument(
        "--steps", type=positive, metavar="N", help="steps from one to the other; not given: the run's, from 40 to 100"
    )
    parser.add_argument("--restarts", type=positive, default=3, metavar="N", help="passes that are averaged (3)")
    parser.add_argument(
        "--out", metavar="PNG", help="the picture of the curve; not given: RUN.find-lr.png beside the run file"
    )


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Tests; see `recipes.find_lr`."""
    from rankwise.recipes.run import read_run

    config = read_run(args.run_file, args.overrides)
    if args.apply and any(override.startswith("train.lr=") for override in args.overrides):
        raise RequestError("--apply writes train.lr, and an override sets it too; leave one of them out")
    from rankwise.recipes.find_lr import apply_rate, check_apply, find_lr, steps_for
    from rankwise.train.range_test import RangeTest

    test = RangeTest(args.lowest, args.highest, args.steps or steps_for(config), args.restarts)
    file = Path(args.run_file).absolute()
    if args.apply:
        check_apply(file)
    picture = Path(args.out).absolute() if args.out else file.with_name(f"{file.stem}.find-lr.png")
    result = find_lr(config, test, picture)
    if args.apply:
        apply_rate(file, result["lr"])
    return {**result, "applied": args.apply}


def show(result: dict[str, Any]) -> None:
    """The pick, and how to use it."""
    print(f"learning rate {result['lr']:g} (the loss is lowest at {result['lowest_at']:.2g}; the run file has "
          f"{result['current']:g})")  # fmt: skip
    print(f"curve: {result['picture']}")
    print("written into the run file" if result["applied"] else f"use it with train.lr={result['lr']:g}, or --apply")
