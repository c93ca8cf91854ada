"""Adaptive ranks: the rank-one components of all layers compete for one budget while they train.

A component is a row of A with its column of B. Its importance is AdaLoRA's (Zhang et al. 2023, arXiv 2303.10512,
section 3.2): the sensitivity I = |w dL/dw| of each weight, smoothed over steps, I' <- beta I' + (1 - beta) I, times its
uncertainty, U' <- beta U' + (1 - beta) |I - I'|; the component's score adds the means over its weights up (without that
of a singular value, which plain B A does not have). One difference: the mean over a component's weights is taken before
smoothing, which is the same for I', and leaves two numbers a factor of a component instead of two a weight.

Moves: the weakest components leave, and as many parameters go to layers whose weakest component is worth most (what a
layer would get next is less than that, and not much less): until none is worth more than what would have to leave. How
many may move at once falls from a tenth of all to none along a cosine (as the connections of Evci et al. 2020, arXiv
1911.11134, section 3), so that the ranks come to rest.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from jaxtyping import Float
from torch import Tensor

from rankwise.adapters.low_rank import LowRankLayer

BETA = 0.85
"""Of both averages: AdaLoRA's own."""
LEAST_STEPS = 10
"""A component that has trained for fewer steps is not judged yet."""
FIRST_SHARE = 0.1
"""Of all components: as many may move at the first time."""

Scores = dict[str, list[float]]
"""Of each layer's components."""
Fits = Callable[[Mapping[str, int]], bool]
"""Whether all ranks together are within the budget."""


class Importance:
    """The averages of every component, one column each: of A and of B sensitivity and uncertainty, and steps seen.

    Args:
        layers: by name, in the model's order.
    """

    def __init__(self, layers: Mapping[str, LowRankLayer]) -> None:
        self._layers = layers
        self._sizes = [layer.rank for layer in layers.values()]
        self._averages = torch.zeros(4, sum(self._sizes), device=next(iter(layers.values())).lora_A.device)
        self._ages = torch.zeros(self._averages.shape[1], dtype=torch.int64)

    @torch.no_grad()
    def observe(self) -> None:
        """Takes the gradients of a step in, before the optimizer uses them."""
        now = torch.stack([torch.cat([_sensitivity(layer, of) for layer in self._layers.values()]) for of in (0, 1)])
        smoothed, uncertain = self._averages[:2], self._averages[2:]
        smoothed.lerp_(now, 1 - BETA)
        uncertain.lerp_((now - smoothed).abs_(), 1 - BETA)
        self._ages += 1

    def scores(self) -> Scores:
        """The importance of each component; infinite for one that is too young to be judged."""
        found = (self._averages[:2] * self._averages[2:]).sum(0).double().cpu()
        found[self._ages < LEAST_STEPS] = math.inf
        return {name: part.tolist() for name, part in zip(self._layers, self._parts(found), strict=True)}

    def move(self, kept: Mapping[str, Sequence[int]], ranks: Mapping[str, int]) -> None:
        """Follows layers whose components `kept` stayed, and that then grew to `ranks`; others stay."""
        averages, ages = list[Tensor](), list[Tensor]()
        parts = zip(self._layers, self._parts(self._averages), self._parts(self._ages), strict=True)
        for name, average, age in parts:
            places = torch.tensor(kept.get(name, range(average.shape[1])), dtype=torch.int64)
            new = ranks.get(name, len(places)) - len(places)
            averages.append(torch.cat([average[:, places.to(average.device)], average.new_zeros(4, new)], dim=1))
            ages.append(torch.cat([age[places], age.new_zeros(new)]))
        self._averages, self._ages = torch.cat(averages, dim=1), torch.cat(ages)
        self._sizes = [len(age) for age in ages]

    def to_lists(self) -> list[list[float]]:
        """Everything as numbers, for a checkpoint; exact."""
        return [*self._averages.tolist(), self._ages.tolist()]

    def load(self, saved: Sequence[Sequence[float]]) -> None:
        """Puts back what `to_lists` gave; the layers have the ranks that they had then."""
        *averages, ages = saved
        self._averages = torch.tensor(averages, dtype=torch.float32, device=self._averages.device)
        self._ages = torch.tensor(ages, dtype=torch.int64)
        self._sizes = [layer.rank for layer in self._layers.values()]

    def _parts(self, values: Tensor) -> Sequence[Tensor]:
        """Cut by layers along the last axis."""
        return values.split(self._sizes, dim=-1)


def _sensitivity(layer: LowRankLayer, of: int) -> Float[Tensor, " r"]:
    """The mean of |w dL/dw| over the weights of each row of A (0) or column of B (1); 0 without a gradient."""
    weight = (layer.lora_A, layer.lora_B)[of]
    if weight.grad is None:
        return weight.new_zeros(layer.rank, dtype=torch.float32)
    product = (weight.detach() * weight.grad).abs_().flatten(1)
    return product.mean(dim=1 - of).float()


@dataclass(frozen=True)
class Moves:
    """Components that stay, of the layers that lose some, and the new ranks of those that get more."""

    kept: dict[str, list[int]] = field(default_factory=dict)
    grown: dict[str, int] = field(default_factory=dict)


def most_moves(total: int, step: int, last: int) -> int:
    """How many components may leave after `step`, of `total`; `last` is the step after which none does any more."""
    return max(1, int(FIRST_SHARE * total * 0.5 * (1 + math.cos(math.pi * step / (last + 1)))))


def moves(scores: Scores, least: Mapping[str, int], most: Mapping[str, int], fits: Fits, count: int) -> Moves:
    """Who leaves and who gets more. A layer gets one rank more at a time.

    Args:
        scores: of every component, infinite for those not judged yet; they say the ranks too.
        least: the lowest rank of each layer.
        most: the highest.
        fits: whether ranks are within the budget; the present ones are.
        count: how many components may leave.
    """
    ranks = {name: len(of_layer) for name, of_layer in scores.items()}
    judged = {name: [score for score in of_layer if math.isfinite(score)] for name, of_layer in scores.items()}
    worth = {name: min(of_layer) for name, of_layer in judged.items() if of_layer}
    weakest = sorted(
        (s, n, place) for n, of_layer in scores.items() for place, s in enumerate(of_layer) if s < math.inf
    )
    gone: dict[str, set[int]] = {}
    grown: dict[str, int] = {}
    for taker in sorted(worth, key=lambda name: -worth[name]):
        if ranks[taker] >= most[taker] or taker in gone:
            continue
        now = {**ranks, taker: ranks[taker] + 1}
        leaving: list[tuple[str, int]] = []
        for score, name, place in weakest:
            if fits(now) or score >= worth[taker] or sum(map(len, gone.values())) + len(leaving) >= count:
                break
            if name == taker or name in grown or place in gone.get(name, ()) or now[name] <= least[name]:
                continue
            leaving.append((name, place))
            now[name] -= 1
        if fits(now):
            ranks = now
            grown[taker] = ranks[taker]
            for name, place in leaving:
                gone.setdefault(name, set()).add(place)
    kept = {name: [place for place in range(len(scores[name])) if place not in places] for name, places in gone.items()}
    return Moves(kept, grown)
