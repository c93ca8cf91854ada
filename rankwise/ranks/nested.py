"""Nested ranks: one run whose every prefix of the rank is an adapter that works.

DyLoRA (Valipour et al. 2022, arXiv 2210.07558, algorithm 1): each step draws a rank b, the same for all layers,
uniformly from the least to the highest, and trains the adapter that the first b rows of A and columns of B are, with
the scale of rank b. What matters most so comes to stand first, and a cut to b is the adapter that was trained. All of
the prefix is updated (the paper's variant without "frozen").
"""

from __future__ import annotations

import hashlib

from torch import nn

from rankwise.ranks.growth import ranked_layers


def prefix_at(seed: int, step: int, least: int, most: int) -> int:
    """The rank that `step` trains: a function of seed and step, so that a run can go on anywhere."""
    digest = hashlib.sha256(f"nested:{seed}:{step}".encode()).digest()
    return least + int.from_bytes(digest[:8], "big") % (most - least + 1)


def set_prefix(model: nn.Module, rank: int | None) -> None:
    """Every layer is its prefix of so many ranks (a layer of lower rank is all of itself); None: whole again."""
    for layer in ranked_layers(model).values():
        layer.prefix = None if rank is None or rank >= layer.rank else rank
