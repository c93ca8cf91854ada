"""How many rows of each source an epoch of a mix draws.

Three ways, of which a run uses one:

- epochs: source i gives epochs_i times its rows (1 where it says nothing);
- weights: an epoch is as long as all sources together, and source i has weight_i / sum of weights of it;
- temperature T: the same with weights size_i ** (1 / T): 1 draws by size, higher ones lift small sources towards equal
  shares (Arivazhagan et al. 2019, arXiv 1907.05019; Conneau et al. 2019, arXiv 1911.02116, write it as alpha = 1 / T).
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np


def quotas(
    sizes: Sequence[int],
    weights: Sequence[float | None],
    epochs: Sequence[float | None],
    temperature: float | None,
) -> list[int]:
    """Rows of each source in an epoch of the mix; at least one of each that has any."""
    if temperature is not None:
        return _by_weight(sizes, [size ** (1 / temperature) for size in sizes])
    if any(weight is not None for weight in weights):
        return _by_weight(sizes, [1.0 if weight is None else weight for weight in weights])
    passes = [1.0 if epoch is None else epoch for epoch in epochs]
    return [max(min(size, 1), round(count * size)) for count, size in zip(passes, sizes, strict=True)]


def _by_weight(sizes: Sequence[int], weights: Sequence[float]) -> list[int]:
    """Shares of all rows, in whole rows: what rounding down leaves goes to the largest remainders."""
    total = sum(sizes)
    exact = np.array(weights, dtype=np.float64) / sum(weights) * total
    counts = np.floor(exact).astype(np.int64)
    for place in np.argsort(counts - exact, kind="stable")[: total - int(counts.sum())]:
        counts[place] += 1
    return [max(1, int(count)) for count in counts]
