"""Components that stay when others are pruned: rows of A, columns of B, and the optimizer's state of just these.

Nothing is mixed (an SVD would): what stays keeps its numbers, its moments and its place in line. The scale changes with
the rank, so columns of B are rescaled and their moments with them, as in `rankwise.ranks.dynamic`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from rankwise.ranks.dynamic import MOMENT_POWERS, set_ranks
from rankwise.ranks.growth import ranked_layers


@torch.no_grad()
def select_components(
    model: nn.Module, kept: Mapping[str, Sequence[int]], optimizer: torch.optim.Optimizer | None = None
) -> None:
    """Prunes the named layers to the components `kept`, in that order, in place.

    Args:
        model: the attached model.
        kept: places of the components that stay, by layer; at least one each.
        optimizer: where it updates the layers, its state moves along.
    """
    layers = ranked_layers(model)
    for name, places in kept.items():
        layer = layers[name]
        assert places and max(places) < layer.rank, (name, places)
        chosen = torch.tensor(places, device=layer.lora_A.device)
        old_A, old_B, old_scale = layer.lora_A, layer.lora_B, layer.scale
        layer.select_(chosen)
        if optimizer is not None:
            _replace(optimizer, old_A, layer.lora_A, chosen, dim=0, gain=1.0)
            _replace(optimizer, old_B, layer.lora_B, chosen, dim=1, gain=layer.scale / old_scale)
    set_ranks(model, {name: len(places) for name, places in kept.items()})  # notes the ranks that there are now


def _replace(
    optimizer: torch.optim.Optimizer, old: nn.Parameter, new: nn.Parameter, chosen: Tensor, dim: int, gain: float
) -> None:
    """Puts `new` where the optimizer holds `old`, with the chosen part of its state, times `gain`."""
    for group in optimizer.param_groups:
        group["params"] = [new if parameter is old else parameter for parameter in group["params"]]
    state = optimizer.state.pop(old, None)
    if state is None:
        return
    for key, value in state.items():
        if isinstance(value, Tensor) and value.dim():
            assert value.shape == old.shape, f"{key}: state that is not of the parameter's shape"
            state[key] = value.index_select(dim, chosen) * gain ** MOMENT_POWERS[key]
    optimizer.state[new] = state
