"""Ranks that move: grow or shrink adapted layers in place, the optimiser's state with them.

Growth keeps the function: new rows of A are random, new columns of B zero, and old columns of B are rescaled by the
ratio of the scales (alpha/r changes with r). The gradient of a rescaled column changes by the inverse ratio, so its
first moment is multiplied with that and its second moment with the square. Old entries keep their moments, new ones
have none.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from rankwise import distributed
from rankwise.adapters.low_rank import LowRankLayer
from rankwise.attach.attachment import adapter_layers, need_attachment
from rankwise.attach.inject import ranks as current_ranks
from rankwise.errors import RequestError, did_you_mean

log = logging.getLogger(__name__)

MOMENT_POWERS = {"exp_avg": 1, "exp_avg_sq": 2, "max_exp_avg_sq": 2, "momentum_buffer": 1}
"""Optimiser state with the parameter's shape, and the power of the gradient that it averages."""


def set_ranks(
    model: nn.Module,
    ranks: Mapping[str, int],
    optimizer: torch.optim.Optimizer | None = None,
    generator: torch.Generator | None = None,
) -> dict[str, float]:
    """Sets the ranks of the named layers, in place. Returns each layer's relative Frobenius error: 0 for a growth.

    Of several processes each calls it with the same ranks; what is drawn for new rows is the first one's.

    Parameters are replaced, so an optimiser over them must be given. Growth carries its state over; a layer that
    shrinks starts with fresh moments, and a log message says so.

    Raises: RequestError, with nothing changed, for a name without an adapter, a rank below one, or an optimiser whose
        state is not known.
    """
    attachment = need_attachment(model)
    layers = {name: layer for name, layer in adapter_layers(model).items() if isinstance(layer, LowRankLayer)}
    for name, rank in ranks.items():
        if name not in layers:
            raise RequestError(f"no adapted layer '{name}'{did_you_mean(name, layers)}")
        if isinstance(rank, bool) or not isinstance(rank, int) or rank <= 0:
            raise RequestError(f"rank of '{name}' must be a positive whole number, not {rank!r}")
    if optimizer is not None:
        _check_state(optimizer)
    changes = {name: rank for name, rank in ranks.items() if rank != layers[name].rank}
    errors = {name: _resize(layers[name], name, rank, optimizer, generator) for name, rank in changes.items()}
    distributed.broadcast_from(0, [p for name in changes for p in layers[name].parameters(recurse=False)])
    config = attachment.config
    explicit = {name: rank for name, rank in current_ranks(model).items() if name in ranks}
    attachment.config = config.with_(
        rank_pattern={**explicit, **{k: v for k, v in config.rank_pattern.items() if k not in explicit}}
    )
    return {name: errors.get(name, 0.0) for name in ranks}


def _resize(
    layer: LowRankLayer,
    name: str,
    rank: int,
    optimizer: torch.optim.Optimizer | None,
    generator: torch.Generator | None,
) -> float:
    old_A, old_B, old_rank, old_scale = layer.lora_A, layer.lora_B, layer.rank, layer.scale
    error = layer.resize_(rank, generator)
    new_A, new_B, new_scale = layer.lora_A, layer.lora_B, layer.scale
    if optimizer is None:
        return error
    if rank < old_rank and (old_A in optimizer.state or old_B in optimizer.state):
        log.warning("rank of '%s' fell from %d to %d: its optimiser moments start afresh", name, old_rank, rank)
    keep = rank > old_rank
    _replace(optimizer, old_A, new_A, dim=0, gain=1.0, keep=keep)
    _replace(optimizer, old_B, new_B, dim=1, gain=new_scale / old_scale, keep=keep)
    return error


def _check_state(optimizer: torch.optim.Optimizer) -> None:
    """Raises: RequestError for state beside single numbers whose meaning is not known (Adafactor's rows)."""
    for parameter, state in optimizer.state.items():
        for key, value in state.items():
            if not isinstance(value, Tensor) or not value.dim():
                continue
            if key not in MOMENT_POWERS or value.shape != parameter.shape:
                raise RequestError(
                    f"{type(optimizer).__name__} keeps '{key}', which can't be resized "
                    f"(known: {', '.join(MOMENT_POWERS)}); use AdamW or SGD, or build the optimiser anew"
                )


def _replace(
    optimizer: torch.optim.Optimizer, old: nn.Parameter, new: nn.Parameter, dim: int, gain: float, keep: bool
) -> None:
    """Puts `new` where the optimiser holds `old`; with `keep`, its state grows along `dim`, times `gain`."""
    if old is new:
        return
    for group in optimizer.param_groups:
        group["params"] = [new if parameter is old else parameter for parameter in group["params"]]
    state = optimizer.state.pop(old, None)
    if state is None or not keep:
        return
    for key, value in state.items():
        if isinstance(value, Tensor) and value.shape == old.shape and value.dim():
            grown = torch.zeros_like(new, dtype=value.dtype)
            grown.narrow(dim, 0, old.shape[dim]).copy_(value * gain ** MOMENT_POWERS[key])
            state[key] = grown
    optimizer.state[new] = state
