"""`rankwise export ADAPTER --to FORMAT --out DIR`: what other programs run, with a report that it does the same."""

from __future__ import annotations

import argparse
from typing import Any

from rankwise.cli.arguments import positive
from rankwise.export.formats import FORMATS, settled

NUMBERS = {
    "max_abs_diff": ("max diff", "{:.1e}"),
    "mean_abs_diff": ("mean diff", "{:.1e}"),
    "kl": ("KL", "{:.1e}"),
    "top1_agreement": ("same first", "{:.1%}"),
    "speedup": ("speedup", "{:.2f}"),
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
    parser.add_argument("--task", metavar="NAME", help="of several adapters under a gate: the task to export")
    parser.add_argument("--dtype", metavar="D", help=f"of the weights. {_choices('dtype')}")
    parser.add_argument(
        "--merged", action="store_true", default=None, help="onnx, tensorrt: the adapter folded into the graph"
    )
    parser.add_argument(
        "--adapters", nargs="+", metavar="NAME=PATH", help="onnx: further adapters of the same base, for the same graph"
    )
    parser.add_argument(
        "--int8", nargs="?", const="weights", metavar="KIND",
        help="onnx: weights (which --int8 alone means): in 8 bits by blocks; full: int8 products, a scale for a token; "
        "tensorrt: int8 products, either word",
    )  # fmt: skip
    parser.add_argument("--int4", action="store_true", default=None, help="onnx: weights in 4 bits by blocks")
    parser.add_argument(
        "--max-kl", type=float, metavar="KL",
        help="onnx: the largest drift of a quantised graph, nats a token; not given: 0.02 for --int8, 0.1 for full, "
        "0.5 for --int4; tensorrt: of the graph, 1e-6 for fp32, 1e-3 for fp16, 2e-2 for bf16, 0.1 for --int8",
    )  # fmt: skip
    parser.add_argument("--max-rows", type=positive, metavar="N", help="tensorrt: of a batch; not given: 8")
    parser.add_argument(
        "--max-context",
        type=positive,
        metavar="N",
        help="tensorrt: of a prompt with its answer; not given: 2048, or less",
    )
    parser.add_argument("--max-rank", type=positive, metavar="R", help="tensorrt: of the adapter; not given: 64")
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

    return export(args.adapter, args.out, args.to, given, base=args.base, device=args.device, task=args.task)


def show(result: dict[str, Any]) -> None:
    """The folder, and a line for each artefact of its report."""
    from rankwise.cli.tables import bytes_text

    print(f"exported: {result['output']} ({result['format']}), compared with torch on {result['probes']}")
    shown = {name: text for name, text in NUMBERS.items() if any(row[name] is not None for row in result["report"])}
    lines = [["artifact", "size", "ran", *(heading for heading, _ in shown.values())]]
    for row in result["report"]:
        cells = ["" if row[name] is None else form.format(row[name]) for name, (_, form) in shown.items()]
        lines.append([row["artifact"], bytes_text(row["bytes"]), "yes" if row["ran"] else "not run", *cells])
    widths = [max(len(line[place]) for line in lines) for place in range(len(lines[0]))]
    for name, *cells in lines:
        print(
            "  ".join([name.ljust(widths[0]), *(c.rjust(w) for c, w in zip(cells, widths[1:], strict=True))]).rstrip()
        )
    for row in result["report"]:
        if row["note"]:
            print(f"{row['artifact']}: {row['note']}")
