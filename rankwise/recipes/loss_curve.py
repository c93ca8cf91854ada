"""The loss curve of a run as a picture."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rankwise.files import replacing

SMOOTHING = 0.9
"""Weight of the past in the smoothed curve (exponential moving average, corrected for its start)."""


def smoothed(values: Sequence[float]) -> list[float]:
    """The exponential moving average; its first values are not pulled to zero."""
    average, result = 0.0, []
    for place, value in enumerate(values, start=1):
        average = SMOOTHING * average + (1 - SMOOTHING) * value
        result.append(average / (1 - SMOOTHING**place))
    return result


def draw_loss_curve(metrics: Sequence[Mapping[str, Any]], path: Path, title: str, levels: Mapping[str, float]) -> None:
    """Writes a PNG: loss of each logged step, smoothed, on validation rows; `levels` as dashed lines.

    `metrics`: lines of metrics.jsonl, with `step`, `loss` and perhaps `valid_loss`.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    steps, losses = [line["step"] for line in metrics], [line["loss"] for line in metrics]
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.add_subplot()
    axes.plot(steps, losses, color="tab:blue", alpha=0.3, linewidth=1, label="each step")
    axes.plot(steps, smoothed(losses), color="tab:blue", linewidth=2, label="smoothed")
    valid = [(line["step"], line["valid_loss"]) for line in metrics if "valid_loss" in line]
    if valid:
        axes.plot([s for s, _ in valid], [v for _, v in valid], "o-", color="tab:orange", label="validation rows")
    for place, (name, level) in enumerate(levels.items()):
        axes.axhline(level, color=f"C{place + 2}", linestyle="--", linewidth=1, label=f"{name}: {level:.3f}")
    axes.set(xlabel="step", ylabel="loss, nats per trained token", title=title)
    axes.grid(alpha=0.3)
    axes.legend()
    canvas = FigureCanvasAgg(figure)
    with replacing(path) as temporary:
        canvas.print_figure(temporary, dpi=120, format="png")
