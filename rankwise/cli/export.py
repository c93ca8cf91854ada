"""`rankwise export ADAPTER --to FORMAT --out DIR`: what other programs run, with a report that it does the same."""

from __future__ import annotations

import argparse
from typing import Any

from rankwise.export.formats import FORMATS, settled

NUMBERS = {
    "max_abs_diff": ("max diff", "{:.1e}"),
    "mean_abs_diff": ("mean diff", "{:.1e}"),
    "kl": ("KL", "{:.1e}"),
    "top1_agreement": ("same first", "{:.1%}"),
    "speedup": ("times torch's speed", "{:.2f}"),
}
"""Field of a row: its heading, and how its value is written."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the command's arguments."""
    parser.add_argument("adapter", metavar="ADAPTER", help="a run folder or an adapter folder")
    parser.add_argument(
        "--to",
        required=True,
        metavar="FORMAT",
        help="; ".join(f"{name}: {format.summary}" for name, format in FORMATS.items()),
    )
    parser.add_argument("--out", required=True, metavar="DIR", help="the folder to write; must not exist")
    parser.add_argument("--base", metavar="MODEL", help="the adapter's base model, where it is not the one it names")
    parser.add_argument("--device", default="auto", help="where the model in torch runs: cpu, cuda, mps or auto")
    parser.add_argument("--dtype", metavar="D", help=f"of the weights. {_choices('dtype')}")
    parser.add_argument("--max-shard-size", metavar="SIZE", help="of one weights file, as in 500MB; merged only: 5GB")


def _choices(setting: str) -> str:
    """What each format that has the setting takes."""
    having = {name: format for name, format in FORMATS.items() if setting in format.settings}
    return "; ".join(f"{name}: {', '.join(format.choices.get(setting, ()))}" for name, format in having.items())


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Exports; see `recipes.export`."""
    names = dict.fromkeys(setting for format in FORMATS.values() for setting in format.settings)
    given = {name: vars(args)[name] for name in names if vars(args)[name] is not None}
    settled(args.to, given)  # before torch is imported

    from rankwise.recipes.export import export

    return export(args.adapter, args.out, args.to, given, base=args.base, device=args.device)


def show(result: dict[str, Any]) -> None:
    """The folder, and a line for each artefact of its report."""
    from rich.console import Console
    from rich.table import Table

    from rankwise.cli.tables import bytes_text

    print(f"exported: {result['output']} ({result['format']}), compared with torch on {result['probes']}")
    table = Table()
    for heading in ("artifact", "size", "ran", *(heading for heading, _ in NUMBERS.values())):
        table.add_column(heading, justify="left" if heading == "artifact" else "right")
    for row in result["report"]:
        cells = ["" if row[name] is None else form.format(row[name]) for name, (_, form) in NUMBERS.items()]
        table.add_row(row["artifact"], bytes_text(row["bytes"]), "yes" if row["ran"] else "not run", *cells)
    Console().print(table)
    for row in result["report"]:
        if row["note"]:
            print(f"{row['artifact']}: {row['note']}")
