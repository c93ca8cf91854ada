"""Tables that several commands print."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rich.table import Table

COLUMNS = {
    "loss": ("loss", "{:.3f}"),
    "perplexity": ("perplexity", "{:.2f}"),
    "chrf": ("chrF", "{:.1f}"),
    "bleu": ("BLEU", "{:.1f}"),
    "rouge_l": ("ROUGE-L", "{:.1f}"),
    "exact_match": ("exact match", "{:.1%}"),
    "accuracy": ("accuracy", "{:.1%}"),
    "reward_margin": ("reward margin", "{:.3f}"),
    "f1": ("F1", "{:.1%}"),
    "recall_at_1": ("recall@1", "{:.1%}"),
    "mrr": ("MRR", "{:.3f}"),
}
"""Field of a result: its heading, and how its value is written."""


def results_table(results: Sequence[Mapping[str, Any]], title: str | None = None) -> Table:
    """One row for each result, one column for each metric that any of them has."""
    table = Table(title=title)
    fields = [field for field in COLUMNS if any(field in result for result in results)]
    table.add_column("target")
    for field in fields:
        table.add_column(COLUMNS[field][0], justify="right")
    for result in results:
        cells = [COLUMNS[field][1].format(result[field]) if field in result else "" for field in fields]
        table.add_row(str(result["target"]), *cells)
    return table


def task_table(tasks: Sequence[Mapping[str, Any]], adapters: Sequence[str]) -> Table:
    """The loss on each task of the base, of each adapter and of what they were combined to; and what that loses."""
    table = Table(title="loss on each task")
    for heading in ("task", "base", *adapters, "combined", "lost"):
        table.add_column(heading, justify="left" if heading == "task" else "right")
    for task in tasks:
        losses = (task["base"], *task["adapters"], task["combined"])
        table.add_row(task["task"], *(f"{loss:.3f}" for loss in losses), f"{task['lost']:+.3f}")
    return table


def gate_table(document: Mapping[str, Any]) -> Table:
    """Of `rankwise evaluate --tasks`: each target's loss on each task, their mean and the worst; what was forgotten."""
    tasks = [entry["task"] for entry in document["tasks"]]
    losses = {e["task"]: {one["target"]: one["loss"] for one in e["results"]} for e in document["tasks"]}
    table = Table(title="loss on each task")
    for heading in ("target", *tasks, "mean", "worst"):
        table.add_column(heading, justify="left" if heading == "target" else "right")
    for one in document["results"]:
        name = one["target"]
        own = [losses[task][f"task:{task}" if name == "single" else name] for task in tasks]
        table.add_row(name, *(f"{loss:.3f}" for loss in (*own, one["loss"], one["worst"])))
    if (forgotten := document["forgotten"]) is not None:
        cells = [f"{forgotten[task]:+.3f}" if task in forgotten else "" for task in tasks]
        mean, worst = sum(forgotten.values()) / len(forgotten), max(forgotten.values())
        table.add_row("adapter, less reference", *cells, f"{mean:+.3f}", f"{worst:+.3f}")
    return table


def times_table(times: Mapping[str, float]) -> Table:
    """Where the time went: stage, seconds, share."""
    table = Table(title="where the time went")
    for heading in ("stage", "seconds", "share"):
        table.add_column(heading, justify="left" if heading == "stage" else "right")
    total = sum(times.values())
    for stage, seconds in times.items():
        table.add_row(stage, f"{seconds:.1f}", f"{seconds / total:.0%}" if total else "")
    table.add_row("all", f"{total:.1f}", "", style="bold")
    return table


def bytes_text(count: int) -> str:
    """A file size for people: 1,2 or 3 digits before the unit."""
    size = float(count)
    for unit in ("B", "KiB", "MiB"):
        if size < 1024:
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1024
    return f"{size:.1f} GiB"
