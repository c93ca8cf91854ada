"""The rank map of an adapter, layers down and kinds of modules across, and its history: as data, text and a picture."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rankwise.errors import RequestError, counted
from rankwise.files import file_obstacle, replacing

SHADES = " ░▒▓█"
PICTURES = (".png", ".svg")
VLLM_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
"""What vLLM's `max_lora_rank` can be (vllm.config.lora, 0.14): one number for all layers of all adapters."""


def vllm_max_lora_rank(highest: int) -> int | None:
    """The smallest value of vLLM's setting that takes an adapter of this highest rank; None where there is none."""
    return next((allowed for allowed in VLLM_RANKS if allowed >= highest), None)


@dataclass(frozen=True)
class RankMap:
    """Ranks by block (`model.layers.3`, in order of its number) and by what is in it (`self_attn.q_proj`)."""

    blocks: list[str]
    modules: list[str]
    ranks: dict[tuple[str, str], int]

    @property
    def highest(self) -> int:
        """The highest rank in it."""
        return max(self.ranks.values())


def rank_map(ranks: Mapping[str, int]) -> RankMap:
    """The map of ranks by name. A layer that is in no block stands in the block "", beside the others."""
    cells: dict[tuple[str, str], int] = {}
    for name, rank in ranks.items():
        match = re.match(r"(?P<block>.*?\b\d+)\.(?P<module>.+)", name)
        cells[(match["block"], match["module"]) if match else ("", name)] = rank
    blocks = sorted({block for block, _ in cells}, key=_by_number)
    return RankMap(blocks, sorted({module for _, module in cells}), cells)


def _by_number(name: str) -> list[tuple[bool, int, str]]:
    return [(part.isdigit(), int(part) if part.isdigit() else 0, part) for part in re.split(r"(\d+)", name)]


def text_map(found: RankMap) -> list[str]:
    """The map in lines: a number and a shade for each layer, a dot where there is none."""
    heads = [f"{chr(ord('a') + i % 26)}{i // 26 or ''}" for i in range(len(found.modules))]
    left = max(len(block) for block in found.blocks)
    width = max(len(str(found.highest)) + 2, *(len(head) + 1 for head in heads))
    lines = [f"{'':{left}} " + "".join(f"{head:>{width}}" for head in heads)]
    for block in found.blocks:
        cells = [_cell(found.ranks.get((block, module)), found.highest) for module in found.modules]
        lines.append(f"{block:{left}} " + "".join(f"{cell:>{width}}" for cell in cells))
    return [*lines, *(f"{head} {module}" for head, module in zip(heads, found.modules, strict=True))]


def _cell(rank: int | None, highest: int) -> str:
    if rank is None:
        return "·"
    return f"{rank}{SHADES[min(len(SHADES) - 1, rank * len(SHADES) // (highest + 1))]}"


def rank_history(run_folder: Path) -> list[dict[str, Any]]:
    """Ranks over time, of the lines of metrics.jsonl at which they changed: `{step, ranks}`. Empty where none did.

    Raises: RequestError for a file that is not what a run writes.
    """
    file = run_folder / "metrics.jsonl"
    if not file.is_file():
        return []
    history: list[dict[str, Any]] = []
    for number, text in enumerate(file.read_text(encoding="utf-8").splitlines(), 1):
        try:
            line = json.loads(text)
            if line.get("ranks"):
                history.append({"step": int(line["step"]), "ranks": {n: int(r) for n, r in line["ranks"].items()}})
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise RequestError(f"'{file}', line {number}, is not a line that a run writes: {error}") from None
    return history


def text_history(history: Sequence[Mapping[str, Any]]) -> list[str]:
    """A line for each change: the sum of ranks, the least, the highest, and how many layers changed."""
    lines: list[str] = []
    before: Mapping[str, int] = {}
    for entry in history:
        ranks: Mapping[str, int] = entry["ranks"]
        changed = sum(before.get(name) != rank for name, rank in ranks.items())
        span = f"from {min(ranks.values())} to {max(ranks.values())}"
        more = f"; {changed} changed" if before else ""
        total = f"{counted(sum(ranks.values()), 'rank')} in {counted(len(ranks), 'layer')}"
        lines.append(f"step {entry['step']:>6,}: {total}, {span}{more}")
        before = ranks
    return lines


def check_picture(path: Path) -> None:
    """Raises: RequestError for a picture that can't be drawn there."""
    if path.suffix.lower() not in PICTURES:
        raise RequestError(f"the picture '{path}' must end in {' or '.join(PICTURES)}")
    if (found := file_obstacle(path)) is not None:
        raise RequestError(f"the picture '{path}' can't be made: {found}; choose another")


def draw_map(found: RankMap, history: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Writes a PNG or SVG: the map, and beside it the mean rank of each kind of module over the steps, if it moved."""
    import numpy as np
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    values = np.full((len(found.blocks), len(found.modules)), np.nan)
    for (block, module), rank in found.ranks.items():
        values[found.blocks.index(block), found.modules.index(module)] = rank
    parts = 2 if history else 1
    width, height = max(5.0, 0.6 * len(found.modules) + 3) * parts, max(3.0, 0.25 * len(found.blocks) + 1.5)
    figure = Figure(figsize=(width, height), layout="constrained")
    axes = figure.subplots(1, parts, squeeze=False)[0]
    image = axes[0].imshow(values, aspect="auto", cmap="viridis", vmin=0, vmax=found.highest)
    axes[0].set_xticks(range(len(found.modules)), found.modules, rotation=60, ha="right")
    axes[0].set_yticks(range(len(found.blocks)), found.blocks)
    axes[0].set_title("rank")
    figure.colorbar(image, ax=axes[0])
    if history:
        _draw_history(axes[1], history)
    canvas = FigureCanvasAgg(figure)
    with replacing(path) as temporary:
        canvas.print_figure(temporary, dpi=120, format=path.suffix[1:].lower())


def _draw_history(axes: Any, history: Sequence[Mapping[str, Any]]) -> None:
    steps = [entry["step"] for entry in history]
    kinds: dict[str, list[float]] = {}
    for entry in history:
        of_kind: dict[str, list[int]] = {}
        for (_, module), rank in rank_map(entry["ranks"]).ranks.items():
            of_kind.setdefault(module, []).append(rank)
        for module, ranks in of_kind.items():
            kinds.setdefault(module, []).append(sum(ranks) / len(ranks))
    for module, means in kinds.items():
        axes.step(steps[-len(means) :], means, where="post", marker=".", label=module)
    axes.set(xlabel="step", ylabel="mean rank", title="history")
    axes.legend(fontsize="small")
    axes.grid(alpha=0.3)
