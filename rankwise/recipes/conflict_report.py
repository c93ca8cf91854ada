"""The conflict of a run's tasks, seen afterwards: by layer and over time, as data, text and a picture."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rankwise.errors import RequestError
from rankwise.files import replacing
from rankwise.recipes.names import CONFLICT_FILE, RUN_FILE
from rankwise.recipes.rank_map import check_picture, rank_map
from rankwise.tasks.conflict import Apart, Conflict, furthest, isolated

MOST_CURVES = 10
"""Pairs of tasks with a curve of their own in the picture: those that are furthest apart."""


def conflict_report(run: str, below: float = 0.0, picture: Path | None = None) -> dict[str, Any]:
    """The document of `rankwise conflict` for a run's folder.

    Args:
        run: the folder.
        below: the cosine below which a layer should have an adapter for each task.
        picture: a PNG or SVG to draw into.

    Raises: RequestError for a folder that is no run's, or in which no conflict was measured.
    """
    if not -1 < below <= 1:
        raise RequestError(f"--below is a cosine, above -1 and at most 1, not {below:g}")
    if picture is not None:
        check_picture(picture)
    measured = read_conflict(Path(run).expanduser())
    every = [found for _, found in measured]
    apart = furthest(every)
    if picture is not None:
        draw_conflict(apart, measured, picture)
    return {
        "run": run,
        "tasks": list(measured[0][1].tasks),
        "modules": [
            {
                "name": one.module,
                "cosine": one.cosine,
                "tasks": list(one.tasks),
                "own": list(one.own),
                "clear": one.is_clear(below),
            }
            for one in apart
        ],
        "below": below,
        "isolate": isolated(every, below),
        "over_time": [
            {"step": found.step, "stage": stage, "pairs": {f"{a}, {b}": mean for (a, b), mean in _means(found).items()}}
            for stage, found in measured
        ],
        "picture": None if picture is None else str(picture),
    }


def read_conflict(folder: Path) -> list[tuple[str, Conflict]]:
    """The measurements of a run, each with its stage.

    Raises: RequestError where there are none, or the file is not what a run writes.
    """
    if not (folder / RUN_FILE).is_file():
        raise RequestError(f"'{folder}' is no run's folder: it has no {RUN_FILE}; give the output of `rankwise train`")
    path = folder / CONFLICT_FILE
    text = path.read_text(encoding="utf-8") if path.is_file() else ""
    found: list[tuple[str, Conflict]] = []
    for number, line in enumerate(text.split("\n")[:-1], 1):  # what follows the last line feed was never finished
        try:
            content = json.loads(line)
            found.append((str(content["stage"]), Conflict.from_dict(content)))
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise RequestError(f"'{path}', line {number}, is not a line that a run writes: {error}") from None
    if not found:
        raise RequestError(
            f"the run '{folder}' has measured no conflict of tasks; train with tasks.conflict_every, or isolate: auto"
        )
    return found


def _means(found: Conflict) -> dict[tuple[str, str], float]:
    """The mean cosine of each pair of tasks over all layers in which it could be measured."""
    means: dict[tuple[str, str], float] = {}
    for place, pair in enumerate(found.pairs):
        values = [cosine for own in found.modules.values() if (cosine := own.between[place]) is not None]
        if values:
            means[pair] = sum(values) / len(values)
    return means


def draw_conflict(apart: Sequence[Apart], measured: Sequence[tuple[str, Conflict]], path: Path) -> None:
    """Writes a PNG or SVG: the cosine of the pair furthest apart in each layer, and the pairs over the steps."""
    import numpy as np
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    places = rank_map({one.module: number for number, one in enumerate(apart)})
    values = np.full((len(places.blocks), len(places.modules)), np.nan)
    for (block, module), number in places.ranks.items():
        values[places.blocks.index(block), places.modules.index(module)] = apart[number].cosine
    width, height = max(5.0, 0.6 * len(places.modules) + 3) * 2, max(4.0, 0.25 * len(places.blocks) + 1.5)
    figure = Figure(figsize=(width, height), layout="constrained")
    axes = figure.subplots(1, 2, squeeze=False)[0]
    image = axes[0].imshow(values, aspect="auto", cmap="RdBu", vmin=-1, vmax=1)
    axes[0].set_xticks(range(len(places.modules)), places.modules, rotation=60, ha="right")
    axes[0].set_yticks(range(len(places.blocks)), places.blocks)
    axes[0].set_title("cosine of the two tasks furthest apart")
    figure.colorbar(image, ax=axes[0])
    _draw_over_time(axes[1], [found for _, found in measured])
    canvas = FigureCanvasAgg(figure)
    with replacing(path) as temporary:
        canvas.print_figure(temporary, dpi=120, format=path.suffix[1:].lower())


def _draw_over_time(axes: Any, measured: Sequence[Conflict]) -> None:
    curves: dict[tuple[str, str], list[tuple[int, float]]] = {}
    for found in measured:
        for pair, mean in _means(found).items():
            curves.setdefault(pair, []).append((found.step, mean))
    chosen = sorted(curves, key=lambda pair: sum(mean for _, mean in curves[pair]) / len(curves[pair]))[:MOST_CURVES]
    for pair in chosen:
        axes.plot(*zip(*curves[pair], strict=True), marker="o", markersize=3, label=f"{pair[0]}, {pair[1]}")
    axes.axhline(0, color="gray", linewidth=0.8)
    axes.set(xlabel="step", ylabel="cosine", title="mean over layers, over time", ylim=(-1, 1))
    if chosen:
        axes.legend(fontsize="small")
    axes.grid(alpha=0.3)


def text_report(report: dict[str, Any], most: int = 30) -> list[str]:
    """The report in lines: the layers from the furthest apart on, what to isolate, and the pairs over time."""
    modules = report["modules"]
    width = max((len(module["name"]) for module in modules[:most]), default=0)
    lines = [_layer_line(module, width, report["below"]) for module in modules[:most]]
    if len(modules) > most:
        lines.append(f"and {len(modules) - most} more, closer together")
    chosen = report["isolate"]
    bound = f"a cosine clearly below {report['below']:g}"
    if chosen:
        share = f"{len(chosen)} of {len(modules)} layers have {bound}"
        lines.append(f"{share}: give each task an adapter there (tasks.isolate: auto, or their names)")
    else:
        lines.append(f"no layer has {bound}: one adapter for all tasks will do")
    for entry in report["over_time"]:
        pairs = "; ".join(f"{pair} {mean:+.2f}" for pair, mean in list(entry["pairs"].items())[:6])
        lines.append(f"step {entry['step']:>6,} ({entry['stage']}): {pairs}")
    return lines


def _layer_line(module: dict[str, Any], width: int, below: float) -> str:
    """A layer, its cosine, and each task's own beside its name; below the bound but not clearly: said to be noise."""
    own = (
        f"{task} {'none' if value is None else f'{value:+.3f}'}"
        for task, value in zip(module["tasks"], module["own"], strict=True)
    )
    noise = "  not clear of noise" if module["cosine"] < below and not module["clear"] else ""
    return f"{module['name']:{width}} {module['cosine']:+.3f}  own: {', '.join(own)}{noise}"
