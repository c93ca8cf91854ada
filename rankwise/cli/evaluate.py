"""`rankwise evaluate TARGET --data FILE`: loss and answers; an adapter is measured beside its base."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Any

from rankwise.cli.arguments import add_target, named_files, positive
from rankwise.errors import RequestError, counted

if TYPE_CHECKING:
    from rankwise.recipes.evaluate_config import EvaluateConfig


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the command's arguments."""
    add_target(parser)
    parser.add_argument("--data", metavar="FILE", help="the data file; a run has its own (test, else valid)")
    parser.add_argument(
        "--metrics", nargs="+", metavar="METRIC",
        help="loss perplexity accuracy reward_margin chrf bleu rouge_l exact_match; of classifiers loss accuracy f1; "
        "of embeddings loss recall_at_1 mrr; not given: all that apply",
    )  # fmt: skip
    parser.add_argument(
        "--tasks", nargs="*", metavar="NAME=FILE",
        help="of several adapters under a gate: each task's rows, all in one table; without files the run's own",
    )  # fmt: skip
    parser.add_argument("--joint", metavar="FOLDER", help="of --tasks: one adapter for all tasks, measured beside")
    parser.add_argument(
        "--reference", metavar="PATH",
        help="of --tasks: a run, or an earlier JSON document, whose losses forgetting is measured from",
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
    if args.tasks is not None:
        return _on_tasks(args, config)
    for flag in ("joint", "reference"):
        if getattr(args, flag) is not None:
            raise RequestError(f"--{flag} has no effect without --tasks")
    return evaluate(args.target, config, base=args.base, device=args.device, progress=True)


def _on_tasks(args: argparse.Namespace, config: EvaluateConfig) -> dict[str, Any]:
    from rankwise.recipes.evaluate_tasks import Beside, evaluate_tasks

    given = {"data": args.data, "task": args.task, "copy": args.copy or None}
    for flag, value in given.items():
        if value is not None:
            raise RequestError(f"--{flag} does not go with --tasks, which names every task's rows; leave one out")
    if args.sharding != "none":
        raise RequestError(f"--sharding {args.sharding} does not go with --tasks; measure each task by --task")
    beside = Beside(named_files(args.tasks), args.joint, args.reference)
    return evaluate_tasks(args.target, config, beside, args.base, args.device, progress=True)


def show(result: dict[str, Any]) -> None:
    """One table: base against adapter; of several tasks the loss on each."""
    from rich.console import Console

    from rankwise.cli.tables import gate_table, results_table

    if "tasks" in result:
        Console().print(gate_table(result))
        return

    Console().print(results_table(result["results"], title=f"{counted(result['rows'], 'row')} of {result['data']}"))
