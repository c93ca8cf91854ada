"""Arguments that several commands share."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from rankwise.errors import RequestError

if TYPE_CHECKING:
    from rankwise.recipes.session import Session

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


def add_onnx(parser: argparse.ArgumentParser) -> None:
    """`--adapter`, `--temperature`, `--top-p`, `--seed`: of an ONNX export."""
    parser.add_argument("--adapter", metavar="NAME", help="ONNX export: one of its adapters, or `base` for none")
    parser.add_argument("--temperature", type=float, metavar="T", help="ONNX export: above 0 draws tokens; 0 is greedy")
    parser.add_argument("--top-p", type=float, metavar="P", help="ONNX export: of the likeliest tokens with this share")
    parser.add_argument("--seed", type=int, metavar="N", help="ONNX export: of the draws")


def open_any(args: argparse.Namespace) -> Session:
    """The session of a command line with `add_target` and `add_onnx`.

    Raises: RequestError for a flag that has no effect on this kind of target, and for what can't be loaded.
    """
    from rankwise.export.onnx_folder import is_onnx_folder
    from rankwise.recipes.generate import open_export, open_session

    own = {"temperature": args.temperature, "top_p": args.top_p, "seed": args.seed}
    given = {name: value for name, value in own.items() if value is not None}
    if not is_onnx_folder(args.target):
        for name in (*given, *(() if args.adapter is None else ("adapter",))):
            raise RequestError(f"--{name.replace('_', '-')} has no effect: '{args.target}' is no ONNX export")
        return open_session(args.target, args.base, args.device, args.precision, args.chat_template, args.task)
    others = {"task": None, "base": None, "precision": "auto"}
    for name, default in others.items():
        if vars(args)[name] != default:
            raise RequestError(f"--{name} has no effect: '{args.target}' is an ONNX export, which is one base's")
    if args.device not in ("auto", "cpu"):
        raise RequestError(f"--device {args.device}: an ONNX export is run on the CPU here; leave it out")
    return open_export(args.target, args.adapter, args.chat_template, given)


def positive(text: str) -> int:
    """A whole number from 1, for argparse."""
    try:
        value = int(text)
    except ValueError:
        value = 0
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be a whole number from 1, not '{text}'")
    return value


def named_files(words: list[str]) -> dict[str, str]:
    """`NAME=FILE` words. Raises: RequestError for a word without a name or a file, and for a name that stands twice."""
    found: dict[str, str] = {}
    for word in words:
        name, _, file = word.partition("=")
        if not name or not file:
            raise RequestError(f"--tasks takes NAME=FILE, not '{word}'")
        if name in found:
            raise RequestError(f"--tasks names '{name}' twice; give each task its own name")
        found[name] = file
    return found
