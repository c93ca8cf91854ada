"""Growth while training: how much each layer wants to grow, and which layers do.

Two measures, both from 0 to 1 and taken layer by layer:

`effective-rank`  the effective rank of the update B A over its rank. The effective rank is exp of the entropy of the
                  normalised singular values (Roy and Vetterli 2007, "The effective rank: a measure of effective
                  dimensionality", EUSIPCO, section 2). At 1 all directions of the update are used alike.
`gradient`        the share of the gradient's energy that no update within the present factors follows to first order,
                  |(I - P_B) G (I - P_A)|^2 / |G|^2, where G is the loss's gradient by the layer's weight, P_B projects
                  on the columns of B and P_A on the rows of A: B reaches all of G P_A, A all of P_B G. It is taken from
                  a random sketch (`rankwise.ranks.sketch`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

from torch import nn

from rankwise.adapters.factored import effective_rank, singular_values
from rankwise.adapters.low_rank import LowRankLayer
from rankwise.attach.attachment import adapter_layers
from rankwise.ranks.config import ALL, DEFAULT_BY, SATURATED, RanksConfig

SATURATED_FROM = {"effective-rank": 0.6, "gradient": 0.5}
"""From which value of a measure a layer counts as saturated. Choices of ours, not of a paper."""


def ranked_layers(model: nn.Module) -> dict[str, LowRankLayer]:
    """The layers that have a rank, by name, in the model's order."""
    return {name: layer for name, layer in adapter_layers(model).items() if isinstance(layer, LowRankLayer)}


def fullness(model: nn.Module) -> dict[str, float]:
    """The measure `effective-rank` of every layer; 0 for an update that is zero."""
    return {
        name: effective_rank(singular_values(layer.lora_A.detach().flatten(1), layer.lora_B.detach().flatten(1)))
        / layer.rank
        for name, layer in ranked_layers(model).items()
    }


def grown(
    ranks: Mapping[str, int],
    most: Mapping[str, int],
    measured: Mapping[str, float],
    config: RanksConfig,
    fits: Callable[[Mapping[str, int]], bool],
) -> dict[str, int]:
    """The new ranks of the layers that grow.

    Layers take their turn by their measure, highest first. One that does not fit as it should takes what does.

    Args:
        ranks: of all layers; none of them is above `most`.
        most: the highest that each may have.
        measured: the measure of each layer.
        config: of the policy `grow`.
        fits: whether all ranks together are within the budget.
    """
    order = sorted((name for name in ranks if ranks[name] < most[name]), key=lambda name: -measured[name])
    where = config.where or SATURATED
    if config.top is not None:
        order = order[: config.top]
    elif where != ALL:
        order = [name for name in order if measured[name] >= SATURATED_FROM[config.measured]]
    now = dict(ranks)
    for name in order:
        wanted = min(ranks[name] + (config.by or DEFAULT_BY), most[name])
        for rank in range(wanted, ranks[name], -1):
            if fits({**now, name: rank}):
                now[name] = rank
                break
    return {name: rank for name, rank in now.items() if rank != ranks[name]}
