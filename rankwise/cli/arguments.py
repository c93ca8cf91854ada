"""Arguments that several commands share."""

from __future__ import annotations

import argparse

PRECISIONS = ("auto", "fp32", "bf16", "fp16")


def add_target(parser: argparse.ArgumentParser) -> None:
    """TARGET, `--task`, `--base`, `--device`, `--precision`, `--chat-template`."""
    parser.add_argument("target", metavar="TARGET", help="a run folder, adapter folder, model folder or model name")
    parser.add_argument("--task", metavar="NAME", help="of several adapters under a gate: the task that it is about")
    parser.add_argument("--base", metavar="MODEL", help="the adapter's base model, where it is not the one it names")
    parser.add_argument("--device", default="auto", help="cpu, cuda, mps or auto")
    parser.add_argument("--precision", choices=PRECISIONS, default="auto", help="of the model's weights and arithmetic")
    parser.add_argument(
        "--chat-template", metavar="T", help="auto, plain, completion or a .jinja file; not given: the run's, else auto"
    )


def positive(text: str) -> int:
    """A whole number from 1, for argparse."""
    try:
        value = int(text)
    except ValueError:
        value = 0
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be a whole number from 1, not '{text}'")
    return value
