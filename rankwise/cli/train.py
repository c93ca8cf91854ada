"""`rankwise train RUN.yaml [key=value ...] [--resume]`: one run, into its output folder."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from rankwise.errors import counted
from rankwise.say import to_stderr


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the command's arguments."""
    parser.add_argument("run_file", metavar="RUN.yaml", help="the run file; paths in it are relative to it")
    parser.add_argument(
        "overrides", metavar="key=value", nargs="*",
        help="settings on top of the run file, as in train.lr=1e-3; paths are relative to the current folder",
    )  # fmt: skip
    parser.add_argument("--resume", action="store_true", help="go on from the output folder's last checkpoint")


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Trains; see `recipes.finetune`."""
    from rankwise.recipes.run import rank_hint, read_run

    config = read_run(args.run_file, args.overrides)
    from rankwise import distributed
    from rankwise.recipes.finetune import train
    from rankwise.recipes.resume import check_not_moved

    if args.resume and not any(override.startswith("output=") for override in args.overrides):
        check_not_moved(Path(args.run_file), config.output)
    hint = rank_hint(args.run_file, args.overrides)
    if hint is not None and not args.resume and distributed.launched_rank() == 0:
        to_stderr(hint)
    return train(config, resume=args.resume)


def show(result: dict[str, Any]) -> None:
    """The run in a few lines."""
    resumed = f" (resumed after step {result['resumed_from']})" if result["resumed_from"] is not None else ""
    print(f"trained {result['trainable_parameters']:,} parameters for {counted(result['steps'], 'step')}{resumed}")
    valid = result["best_valid_loss"]
    print(f"loss {result['final_loss']:.4f}" + (f", best validation loss {valid:.4f}" if valid is not None else ""))
    tasks = result.get("tasks") or {}
    if losses := tasks.get("losses"):
        each = ", ".join(f"{name} {loss:.4f}" for name, loss in losses.items())
        print(f"tasks: {each}; mean {tasks['mean']:.4f}, worst {tasks['worst']}")
    if new := tasks.get("extended"):
        print(
            f"new tasks {', '.join(new['tasks'])}: {new['parameters']:,} numbers, {new['share_of_adapter']:.2%} of the "
            f"adapter, in {new['train_s']:.1f} s"
        )
    if result["stopped_early"]:
        print("stopped early: the validation loss no longer fell")
    if result["adapter_step"] != result["steps"]:
        print(f"the adapter is that of step {result['adapter_step']}, with the best validation loss")
    print(f"{result['tokens_per_s']:,.0f} tokens/s, peak memory {result['peak_memory_bytes'] / 2**30:.2f} GiB")
    if result["vllm_max_lora_rank"] is not None:
        print(f"vLLM serves it with --max-lora-rank {result['vllm_max_lora_rank']}")
    files = "adapter/, metrics.jsonl, summary.json" + ("" if result["rank_map"] is None else ", ranks.png")
    print(f"output: {result['output']} ({files})")
