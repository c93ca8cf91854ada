"""`rankwise demo [--quick]`: the main job, from data to a certified merged model, on this machine."""

from __future__ import annotations

import argparse
from typing import Any

LONGEST_SHOWN = 320
"""Characters of a sample that are shown: the base goes on and on."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the command's arguments."""
    parser.add_argument("--quick", action="store_true", help="a few minutes: fewer steps, fewer test rows")
    parser.add_argument("--output", metavar="DIR", help="must not exist; not given: runs/demo, or runs/demo-2, ...")
    parser.add_argument("--model", default="demo", help="another causal model to adapt: a folder or a Hub id")
    parser.add_argument("--device", default="auto", help="cpu, cuda, mps or auto")


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Trains, measures, merges; see `recipes.demo`."""
    from rankwise.recipes.demo import PLANS, demo

    return demo(PLANS["quick" if args.quick else "default"], args.output, args.model, args.device)


def show(result: dict[str, Any]) -> None:
    """The table, six samples side by side, and where the time went."""
    from rich.console import Console

    from rankwise.cli.tables import results_table, times_table

    console = Console()
    console.print(samples_table(result["samples"], console.width))
    console.print(results_table(result["results"], title=f"{result['rows']} verses of books not trained on"))
    console.print(verdict(result["results"]), highlight=False)
    found = result["certificate"]
    console.print(
        f"merged model ({found['dtype']}): KL {found['kl']:.1e} nats a token from the adapter model, bound "
        f"{found['bound']:.0e}: {found['verdict']}",
        highlight=False,
    )
    console.print(times_table(result["time_s"]))
    for line in (
        f"adapter: {result['output']}/adapter, loss curve: {result['picture']}",
        f'try it: rankwise generate {result["output"]} --prompt "..."',
    ):
        console.print(line, highlight=False, soft_wrap=True)


def samples_table(samples: list[dict[str, str]], width: int) -> Any:
    """Input, reference, base and adapter beside each other."""
    from rich.table import Table

    table = Table(title="samples", show_lines=True, width=min(width, 180))
    for heading in ("archaic input", "reference", "base", "adapter"):
        table.add_column(heading, ratio=1, overflow="fold")
    for sample in samples:
        cells = [sample[key] for key in ("input", "reference", "base", "adapter")]
        table.add_row(*(_plain(_shortened(cell)) for cell in cells))
    return table


def _shortened(text: str) -> str:
    return text if len(text) <= LONGEST_SHOWN else text[:LONGEST_SHOWN].rstrip() + " ..."


def _plain(text: str) -> Any:
    """A model may write [brackets], which are not ours to read as style."""
    from rich.text import Text

    return Text(text)


def verdict(results: list[dict[str, Any]]) -> str:
    """What the table says, in a sentence."""
    rows = {result["target"]: result for result in results}
    copy, base, adapter = rows["copy"], rows["base"], rows["adapter"]
    return (
        f"The adapter's loss is {1 - adapter['loss'] / base['loss']:.0%} below the base's. Against copying the input: "
        f"BLEU {adapter['bleu'] - copy['bleu']:+.1f}, chrF {adapter['chrf'] - copy['chrf']:+.1f}; "
        f"against the base: BLEU {adapter['bleu'] - base['bleu']:+.1f}, chrF {adapter['chrf'] - base['chrf']:+.1f}."
    )
