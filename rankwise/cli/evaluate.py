"""`rankwise evaluate TARGET --data FILE`: loss and answers; an adapter is measured beside its base."""

from __future__ import annotations

import argparse
from typing import Any

from rankwise.cli.arguments import add_target, positive
from rankwise.errors import counted


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the command's arguments."""
    add_target(parser)
    parser.add_argument("--data", metavar="FILE", help="the data file; a run has its own (test, else valid)")
    parser.add_argument(
        "--metrics", nargs="+", metavar="METRIC",
        help="loss perplexity accuracy reward_margin chrf bleu rouge_l exact_match; of classifiers loss accuracy f1; "
        "of embeddings loss recall_at_1 mrr; not given: all that apply",
    )  # fmt: skip
    parser.add_argument("--rows", type=positive, metavar="N", help="the first N rows only")
    parser.add_argument("--batch-size", type=positive, default=16, metavar="N", help="rows at a time")
    parser.add_argument(
        "--max-length", type=positive, metavar="N", help="tokens a row may have; not given: the run's, or 512"
    )
    parser.add_argument("--max-new-tokens", type=positive, metavar="N", help="the longest answer; not given: 128")
    parser.add_argument("--copy", action="store_true", help="also score the prompt itself as the answer")
    parser.add_argument(
        "--sharding", default="none", metavar="none|node|full",
        help="under torchrun: full leaves each process its share of the model only",
    )  # fmt: skip


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Measures; see `recipes.evaluate`."""
    from rankwise.recipes.evaluate import EvaluateConfig, evaluate

    metrics = [name for word in args.metrics for name in word.split(",") if name] if args.metrics else None
    config = EvaluateConfig(
        data=args.data, metrics=None if metrics is None else tuple(metrics), rows=args.rows,
        batch_size=args.batch_size, max_new_tokens=args.max_new_tokens, precision=args.precision,
        max_length=args.max_length, chat_template=args.chat_template, copy=args.copy,
        sharding=args.sharding, task=args.task,
    )  # fmt: skip
    return evaluate(args.target, config, base=args.base, device=args.device, progress=True)


def show(result: dict[str, Any]) -> None:
    """One table: base against adapter."""
    from rich.console import Console

    from rankwise.cli.tables import results_table

    Console().print(results_table(result["results"], title=f"{counted(result['rows'], 'row')} of {result['data']}"))
