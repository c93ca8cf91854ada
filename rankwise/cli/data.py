"""`rankwise data preview RUN.yaml [key=value ...] [--rows N] [--html PAGE] [--strict]`: what a run would train on."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from rankwise.cli.arguments import positive
from rankwise.errors import RequestError, counted

DEFAULT_ROWS = 3
_SHOWN_PROBLEMS = 50


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the command's arguments."""
    parser.add_argument("run_file", metavar="RUN.yaml", help="the run file; paths in it are relative to it")
    parser.add_argument(
        "overrides", metavar="key=value", nargs="*",
        help="settings on top of the run file, as in data.max_length=256; paths are relative to the current folder",
    )  # fmt: skip
    parser.add_argument("--rows", metavar="N", type=positive, default=DEFAULT_ROWS, help="examples to show")
    parser.add_argument(
        "--html", metavar="PAGE", help="also write a page with everything, and the lengths as a picture"
    )
    parser.add_argument("--strict", action="store_true", help="warnings fail too (exit code 1)")


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Reads the data; see `rankwise.data.preview`. Rows that can't be used end in exit code 2, after the document."""
    from rankwise.recipes.run import read_run

    config = read_run(args.run_file, args.overrides)
    page_file = _page_file(args.html)
    from rankwise.data.preview import preview
    from rankwise.files import write_text
    from rankwise.models.load import check_task, load_tokenizer
    from rankwise.recipes.preview_page import page

    needs = config.train.needs
    check_task(config.model, needs.task)
    batching = (config.train.batch_size, config.train.micro_rows, config.train.seed)
    document = preview(config.data, load_tokenizer(config.model), args.rows, needs.layout, batching)
    document["warnings"] += _refused_by_training(config.train.objective, document["splits"])
    if page_file is not None:
        write_text(page_file, page(document, f"Data of {Path(args.run_file).name}"))
        document["page"] = str(page_file)
    problems, warnings = len(document["problems"]), len(document["warnings"])
    if problems:
        rows = counted(problems, "row")
        document["error"] = {"code": 2, "message": f"{rows} can't be used; correct or remove what `problems` lists"}
    elif warnings and args.strict:
        document["error"] = {"code": 1, "message": "; ".join(document["warnings"])}
    return document


def _page_file(name: str | None) -> Path | None:
    """Where the page goes. Raises: RequestError when it can't be written there."""
    if name is None:
        return None
    from rankwise.files import file_obstacle

    path = Path(name).absolute()
    if (found := file_obstacle(path)) is not None:
        raise RequestError(f"the page '{path}' can't be written: {found}; choose another --html")
    return path


def _refused_by_training(objective: str, splits: dict[str, dict[str, Any]]) -> list[str]:
    """What training would say to these rows: it is a warning here, where their look is what was asked for."""
    from rankwise.recipes.finetune_data import check_objective

    try:
        for name in ("train", "valid"):
            if name in splits and splits[name]["rows"]:
                check_objective(objective, name, splits[name]["format"], splits[name]["why"])
    except RequestError as error:
        return [error.message]
    return []


def show(result: dict[str, Any]) -> None:
    """Counts by split, examples with their trained parts marked, then notes, warnings and problems."""
    from rich.console import Console

    console = Console(highlight=False, soft_wrap=True)  # long lines stay whole: they are searched and copied
    console.print(_counts_table(result["splits"]))
    for name, split in result["splits"].items():
        console.print(f"{name}: {split['why']}", markup=False)
    packing = result["packing"]
    console.print(
        f"micro batches are {'packed' if packing['packs'] else 'padded'}: {packing['efficiency']:.1%} of their "
        f"positions are tokens (padded: {packing['padded_efficiency']:.1%})"
    )
    if result["languages"]:
        console.print("languages, as guessed: " + ", ".join(f"{k} {v}" for k, v in result["languages"].items()))
    _show_lengths(console, result["splits"]["train"]["histogram"])
    if result["examples"]:
        marks = "in green" if console.is_terminal else "between ⟦ and ⟧"
        console.print(f"\nExamples, trained parts {marks}:")
    for example in result["examples"]:
        console.print(f"\n{example['file']}:{example['line']}", markup=False, style="dim")
        console.print(_marked(example["text"], example["trained_spans"], console.is_terminal))
    for kind in ("notes", "warnings"):
        for text in result[kind]:
            console.print(f"{kind[:-1]}: {text}", markup=False)
    problems = result["problems"]
    for problem in problems[:_SHOWN_PROBLEMS]:
        console.print(f"problem: {problem['file']}:{problem['line']}: {problem['reason']}", markup=False)
    if len(problems) > _SHOWN_PROBLEMS:
        console.print(f"... and {len(problems) - _SHOWN_PROBLEMS} more problems; --json lists all")
    if "page" in result:
        console.print(f"page: {result['page']}", markup=False)


def _show_lengths(console: Any, histogram: dict[str, list[int]]) -> None:
    """The training rows' lengths as bars, at most ten."""
    edges, counts = histogram["edges"], histogram["counts"]
    if not counts:
        return
    width = -(-len(counts) // 10)
    bars = [(edges[at], edges[min(at + width, len(counts))], sum(counts[at : at + width])) for at in
            range(0, len(counts), width)]  # fmt: skip
    most = max(count for _, _, count in bars)
    console.print("tokens a row (train):")
    for low, high, count in bars:
        console.print(f"{low:>7,} to {high - 1:>7,}  {'█' * round(40 * count / most):<40} {count:,}", markup=False)


def _counts_table(splits: dict[str, dict[str, Any]]) -> Any:
    from rich.table import Table

    from rankwise.recipes.preview_page import COUNTS

    table = Table()
    table.add_column("")
    for name in splits:
        table.add_column(name, justify="right")
    for field in COUNTS:
        values = [split.get(field) for split in splits.values()]
        table.add_row(field.replace("_", " "), *("" if value is None else f"{value:,}" for value in values))
    for name in ("min", "median", "p95", "max"):
        values = [split["lengths"].get(name) for split in splits.values()]
        table.add_row(f"tokens a row, {name}", *("" if value is None else f"{value:,}" for value in values))
    return table


def _marked(text: str, spans: list[list[int]], in_colour: bool) -> Any:
    from rich.text import Text

    if in_colour:
        shown = Text(text)
        for start, end in spans:
            shown.stylize("green", start, end)
        return shown
    for start, end in reversed(spans):
        text = f"{text[:start]}⟦{text[start:end]}⟧{text[end:]}"
    return Text(text)
