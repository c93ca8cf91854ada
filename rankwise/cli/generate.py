"""`rankwise generate TARGET --prompt ...`: greedy answers to prompts."""

from __future__ import annotations

import argparse
from typing import Any

from rankwise.cli.arguments import add_onnx, add_target, open_any, positive


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the command's arguments."""
    add_target(parser)
    add_onnx(parser)
    parser.add_argument("--prompt", nargs="+", required=True, metavar="TEXT", help="one or more prompts, each quoted")
    parser.add_argument("--system", metavar="TEXT", help="a system message before each prompt")
    parser.add_argument("--max-new-tokens", type=positive, default=256, metavar="N", help="the longest answer")
    parser.add_argument("--batch-size", type=positive, default=8, metavar="N", help="prompts at a time")


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Answers; see `recipes.generate`."""
    session = open_any(args)
    answers = session.answer_all(args.prompt, args.system, args.max_new_tokens, args.batch_size)
    pairs = zip(args.prompt, answers, strict=True)
    return {"target": args.target, "results": [{"prompt": prompt, "answer": answer} for prompt, answer in pairs]}


def show(result: dict[str, Any]) -> None:
    """The answers; with several prompts, each under its prompt."""
    for place, pair in enumerate(result["results"]):
        if len(result["results"]) > 1:
            print(f"{'' if place == 0 else chr(10)}> {pair['prompt']}")
        print(pair["answer"])
