"""Quality against parameters, with the frontier: the methods that no other one beats in both."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from rankwise.files import replacing

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.text import Annotation


@dataclass(frozen=True)
class Point:
    """A method: trainable parameters, mean test loss, and half of the interval of its difference (0: none)."""

    name: str
    parameters: int
    loss: float
    half: float = 0.0


def frontier(points: Sequence[Point]) -> list[Point]:
    """Those that have no other with at most their parameters and a lower loss, by parameters."""
    best: list[Point] = []
    for point in sorted(points, key=lambda point: (point.parameters, point.loss)):
        if not best or point.loss < best[-1].loss:
            best.append(point)
    return best


def place_names(points: Sequence[Point], axes: Axes) -> list[Annotation]:
    """Names beside the points of a laid out figure: above, or else at the next height where no earlier name stands."""
    labels: list[Annotation] = []
    for point in points:
        place = (point.parameters, point.loss)
        for height in (5, -12, 16, -23, 27, -34):
            label = axes.annotate(point.name, place, xytext=(5, height), textcoords="offset points", fontsize=8)
            extent = label.get_window_extent()
            if not any(extent.overlaps(earlier.get_window_extent()) for earlier in labels):
                break
            label.remove()
        else:
            label = axes.annotate(point.name, place, xytext=(5, 5), textcoords="offset points", fontsize=8)
        labels.append(label)
    return labels


def draw(points: Sequence[Point], title: str, path: Path) -> None:
    """Writes a PNG. Methods without trainable parameters are a line across."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 5), layout="constrained")
    axes = figure.add_subplot()
    for point in points:
        if not point.parameters:
            axes.axhline(point.loss, color="tab:grey", linestyle=":", label=f"{point.name} (nothing trained)")
    trained = [point for point in points if point.parameters]
    if trained:
        axes.errorbar(
            [point.parameters for point in trained], [point.loss for point in trained],
            yerr=[point.half for point in trained], fmt="o", capsize=3, label="mean; 95 % interval of the difference",
        )  # fmt: skip
        best = frontier(trained)
        axes.step([p.parameters for p in best], [p.loss for p in best], where="post", alpha=0.6, label="frontier")
    axes.set(
        xscale="log" if trained else "linear", xlabel="trainable parameters", ylabel="test loss, nats", title=title
    )
    axes.grid(alpha=0.3)
    axes.legend()
    canvas = FigureCanvasAgg(figure)
    figure.draw_without_rendering()  # lays it out: places in pixels are known then
    place_names(trained, axes)
    with replacing(path) as temporary:
        canvas.print_figure(temporary, dpi=120, format="png", metadata={"Software": None})
