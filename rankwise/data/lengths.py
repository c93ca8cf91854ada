"""How long rows are, which are far longer than the others, and what packing saves."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from rankwise.data.packing import epoch_order

BINS = 30
FAR_OUT = 3.0
"""Outliers lie above the third quartile by more than so many interquartile ranges (Tukey 1977, "far out") ..."""
LEAST_FACTOR = 2.0
"""... and have at least so many times the median's tokens: rows of nearly one length have no outliers."""
SHOWN_OUTLIERS = 5


def histogram(lengths: np.ndarray) -> dict[str, list[int]]:
    """`edges` (one more than counts) in tokens, and how many rows lie between: at the lower edge or above it."""
    if not len(lengths):
        return {"edges": [], "counts": []}
    low, high = int(lengths.min()), int(lengths.max()) + 1
    edges = np.unique(np.linspace(low, high, min(BINS, high - low) + 1).round().astype(int))
    counts, _ = np.histogram(lengths, edges)
    return {"edges": edges.tolist(), "counts": counts.tolist()}


def outliers(lengths: np.ndarray) -> list[int]:
    """Rows that are far longer than the others, longest first."""
    if len(lengths) < 4:
        return []
    low, median, high = np.percentile(lengths, [25, 50, 75])
    far = np.flatnonzero(lengths > max(high + FAR_OUT * max(high - low, 1), LEAST_FACTOR * median))
    return far[np.argsort(-lengths[far], kind="stable")].tolist()


def padded_efficiency(lengths: np.ndarray, batch_size: int, micro_rows: int, seed: int) -> float:
    """Share of the positions of padded micro batches that hold tokens, over one epoch in the order of `seed`.

    As training pads: the rows of a step are sorted by length, then cut into micro batches. Packed micro batches hold
    nothing but tokens: their share is 1.
    """
    if not len(lengths):
        return 1.0
    ordered = lengths[np.asarray(epoch_order(len(lengths), seed, 0))]
    computed = 0
    for start in range(0, len(ordered), batch_size):
        step = np.sort(ordered[start : start + batch_size])[::-1]
        for place in range(0, len(step), micro_rows):
            part = step[place : place + micro_rows]
            computed += int(part[0]) * len(part)
    return float(lengths.sum() / computed)


def shares(values: Sequence[str], most: int = 20) -> dict[str, Any]:
    """How often each value comes, the commonest first; what is beyond `most` as `other`."""
    names, counts = np.unique(np.array(values, dtype=object).astype(str), return_counts=True)
    order = np.argsort(-counts, kind="stable")
    result: dict[str, Any] = {str(names[place]): int(counts[place]) for place in order[:most]}
    if len(order) > most:
        result["other"] = int(counts[order[most:]].sum())
    return result
