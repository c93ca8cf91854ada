"""Ranks that move: grow or shrink adapted layers in place, the optimiser's state with them.

Growth keeps the function: new rows of A are random or the gradient's leading directions outside of the present ones,
new columns of B are zero, and old columns of B are rescaled by the ratio of the scales (alpha/r changes with r). The
gradient of a rescaled column changes by the inverse ratio, so its first moment is multiplied with that and its second
moment with the square. Old entries keep their moments, new ones have none.

Shrinking keeps the best approximation of the change (see `LowRankLayer.resize_`). The new factors are linear in the old
ones, A' = M_A A and B' = B M_B, so their gradients are too: with the scales s and s', dA' = (s'/s) M_B^T dA and
dB' = (s'/s) dB M_A^T. First moments follow exactly, second ones as if the entries that are mixed had gradients
independent of each other. Where a factor is no such mix (the change had a frozen start), its moments start afresh.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from typing import TypeVar

import torch
from jaxtyping import Float
from torch import Tensor, nn

from rankwise import distributed
from rankwise.adapters.low_rank import LowRankLayer
from rankwise.adapters.svd import leading_svd
from rankwise.attach.attachment import adapter_layers, need_attachment
from rankwise.attach.inject import ranks as current_ranks
from rankwise.errors import RequestError, did_you_mean
from rankwise.quantized import weight_shape
from rankwise.ranks.config import ALPHAS

log = logging.getLogger(__name__)
Number = TypeVar("Number", int, int | float)

MOMENT_POWERS = {"exp_avg": 1, "exp_avg_sq": 2, "max_exp_avg_sq": 2, "momentum_buffer": 1}
"""Optimiser state with the parameter's shape, and the power of the gradient that it averages."""
LARGEST_RESIDUAL = 1e-4
"""Relative: a new factor further than this from every mix of the old one's rows does not take their moments."""


def set_ranks(
    model: nn.Module,
    ranks: Mapping[str, int],
    optimizer: torch.optim.Optimizer | None = None,
    generator: torch.Generator | None = None,
    gradients: Mapping[str, Tensor] | None = None,
    alpha: str = "keep",
) -> dict[str, float]:
    """Sets the ranks of the named layers, in place: LoRA and DoRA, on linear layers, convolutions and embeddings.

    A growth keeps the function up to rounding (1e-6 relative in fp32; with a bf16 base to the rounding of bf16, since
    the factors are fp32), dropout included. Of several processes each calls it with the same ranks; what is drawn for
    new rows is the first one's, and a checksum makes sure that all have the same.

    Args:
        model: an attached model.
        ranks: the new rank of each layer that changes, or stays.
        optimizer: over the adapter's parameters, which are replaced. Its groups (rates, weight decay) stay as they are.
        generator: draws new rows of A (torch's global one by default).
        gradients: of the loss by the weights of growing layers, in the weights' layout: their new rows are the leading
            right singular vectors of what of it lies outside of A's rows. Random ones where it has no more directions.
        alpha: `keep` (scales follow from the new ranks) or `scale` (alpha goes with the rank: the scale stays).

    Returns each layer's relative Frobenius error: 0 for a growth.

    Raises: RequestError, with nothing changed, for a name without an adapter, a rank below one, a gradient of a layer
        that does not grow or of another shape, or an optimiser whose state is not known or that is of other parameters.
    """
    attachment = need_attachment(model)
    layers = {name: layer for name, layer in adapter_layers(model).items() if isinstance(layer, LowRankLayer)}
    _check_request(layers, ranks, alpha)
    if optimizer is not None:
        _check_state(optimizer)
    changes = {name: rank for name, rank in ranks.items() if rank != layers[name].rank}
    if optimizer is not None:
        _check_held(optimizer, {name: layers[name] for name in changes})
    rows = _new_rows(layers, changes, gradients or {}, generator)
    before = {name: (layers[name].lora_A, layers[name].lora_B, layers[name].scale) for name in changes}
    errors: dict[str, float] = {}
    for name, rank in changes.items():
        layer = layers[name]
        new_alpha = layer.alpha if alpha == "keep" else alpha_for(layer, rank)
        errors[name] = layer.resize_(rank, generator, rows.get(name), new_alpha)
    _bring_in_step({name: layers[name] for name in changes})
    if optimizer is not None:
        _carry_states(optimizer, layers, before)
    explicit = {name: rank for name, rank in current_ranks(model).items() if name in ranks}
    alphas = {name: layers[name].alpha for name in changes} if alpha == "scale" else {}
    attachment.config = attachment.config.with_(
        rank_pattern=_ahead_of(attachment.config.rank_pattern, explicit),
        alpha_pattern=_ahead_of(attachment.config.alpha_pattern, alphas),
    )
    return {name: errors.get(name, 0.0) for name in ranks}


def _check_request(layers: Mapping[str, LowRankLayer], ranks: Mapping[str, int], alpha: str) -> None:
    """Raises: RequestError for a name without an adapter, a rank below one, or an unknown rule for alpha."""
    for name, rank in ranks.items():
        if name not in layers:
            raise RequestError(f"no adapted layer '{name}'{did_you_mean(name, layers)}")
        if isinstance(rank, bool) or not isinstance(rank, int) or rank <= 0:
            raise RequestError(f"rank of '{name}' must be a positive whole number, not {rank!r}")
    if alpha not in ALPHAS:
        raise RequestError(f"alpha can't be {alpha!r}{did_you_mean(alpha, ALPHAS)}")


def _bring_in_step(changed: Mapping[str, LowRankLayer]) -> None:
    """Every process takes the first one's new factors, and a checksum makes sure of it."""
    tensors = {
        f"{name}.{key}": tensor
        for name, layer in changed.items()
        for key, tensor in layer.state_dict(keep_vars=True).items()
        if not key.startswith("base.")
    }
    distributed.broadcast_from(0, list(tensors.values()))
    distributed.check_in_step(tensors, "after ranks have changed")


def _carry_states(
    optimizer: torch.optim.Optimizer,
    layers: Mapping[str, LowRankLayer],
    before: Mapping[str, tuple[nn.Parameter, nn.Parameter, float]],
) -> None:
    """`_carry_state` of each layer; `before`: its A, B and scale."""
    afresh = [name for name in before if not _carry_state(optimizer, layers[name], *before[name])]
    if afresh:
        log.warning("optimiser moments start afresh in %d of %d layers: %s, ...", len(afresh), len(before), afresh[0])


def _ahead_of(patterns: Mapping[str, Number], explicit: Mapping[str, Number]) -> dict[str, Number]:
    """The patterns with full names before them: the first one that fits decides."""
    return {**explicit, **{name: value for name, value in patterns.items() if name not in explicit}}


def alpha_for(layer: LowRankLayer, rank: int) -> float:
    """The alpha with which the layer has its present scale at another rank."""
    growth = rank / layer.rank
    return layer.alpha * (growth**0.5 if layer.use_rslora else growth)


def _new_rows(
    layers: Mapping[str, LowRankLayer],
    changes: Mapping[str, int],
    gradients: Mapping[str, Tensor],
    generator: torch.Generator | None,
) -> dict[str, Tensor]:
    """Rows of A from the gradients. Raises: RequestError for a gradient that no layer can use."""
    for name, gradient in gradients.items():
        if name not in changes or changes[name] < layers[name].rank:
            raise RequestError(f"gradients['{name}'] has no effect: the rank of no such layer grows; leave it out")
        if gradient.shape != (shape := weight_shape(layers[name].base)):
            raise RequestError(
                f"gradients['{name}'] has the shape {list(gradient.shape)}, not {list(shape)} of the weight"
            )
    return {
        name: outside_rows(layers[name], gradient, changes[name] - layers[name].rank, generator)
        for name, gradient in gradients.items()
    }


@torch.no_grad()
def outside_rows(
    layer: LowRankLayer, gradient: Tensor, count: int, generator: torch.Generator | None = None
) -> Float[Tensor, "k n"]:
    """At most `count` rows for A: the leading right singular vectors of the gradient outside of A's rows.

    `gradient` is the loss's by the weight, in its layout. Fewer rows where the rest of it has fewer directions: what is
    below 1e-6 of the gradient's norm is rounding. They have the mean norm of A's rows.
    """
    G = layer.kind.matrix(gradient).float()
    A = layer.lora_A.flatten(1).float()
    Q, _ = torch.linalg.qr(A.T)
    outside = G - (G @ Q) @ Q.T
    _, S, Vh = leading_svd(outside, count, generator)
    found = Vh[1e-6 * torch.linalg.norm(G) < S]
    return found * (torch.linalg.norm(A) / A.shape[0] ** 0.5)


def _check_state(optimizer: torch.optim.Optimizer) -> None:
    """Raises: RequestError for state beside single numbers whose meaning is not known (Adafactor's rows)."""
    for parameter, state in optimizer.state.items():
        for key, value in state.items():
            if not isinstance(value, Tensor) or not value.dim():
                continue
            if key not in MOMENT_POWERS or value.shape != parameter.shape:
                why = "; it has one scale for each 256 entries in a row" if key in ("state1", "state2") else ""
                raise RequestError(
                    f"{type(optimizer).__name__} keeps '{key}', which can't be resized "
                    f"(known: {', '.join(MOMENT_POWERS)}){why}; use AdamW or SGD, or build the optimiser anew"
                )


def _check_held(optimizer: torch.optim.Optimizer, changed: Mapping[str, LowRankLayer]) -> None:
    """Raises: RequestError where the optimiser does not hold a trained factor: its replacement would never move."""
    held = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    for name, layer in changed.items():
        for factor, parameter in (("lora_A", layer.lora_A), ("lora_B", layer.lora_B)):
            if parameter.requires_grad and id(parameter) not in held:
                raise RequestError(
                    f"the optimizer does not hold {factor} of '{name}': it was made for another model, or before the "
                    "adapter was attached; give the one that trains it, or none where none does yet"
                )


def _carry_state(
    optimizer: torch.optim.Optimizer, layer: LowRankLayer, old_A: nn.Parameter, old_B: nn.Parameter, old_scale: float
) -> bool:
    """Puts the layer's new factors where the optimiser holds the old ones. False: some moments start afresh."""
    gain = layer.scale / old_scale
    if layer.rank > old_A.shape[0]:
        _replace(optimizer, old_A, layer.lora_A, lambda moment, _: _padded(moment, layer.lora_A, 0))
        _replace(optimizer, old_B, layer.lora_B, lambda moment, power: _padded(moment * gain**power, layer.lora_B, 1))
        return True
    of_A = _mix(old_A.flatten(1).T, layer.lora_A.flatten(1).T)  # A'^T = A^T M_A^T
    of_B = _mix(old_B.flatten(1), layer.lora_B.flatten(1))
    has_state = old_A in optimizer.state or old_B in optimizer.state
    if of_A is None or of_B is None:
        _replace(optimizer, old_A, layer.lora_A, None)
        _replace(optimizer, old_B, layer.lora_B, None)
        return not has_state

    def mixed_rows(moment: Tensor, power: int) -> Tensor:
        return ((gain * of_B) ** power).T.to(moment) @ moment.flatten(1)

    def mixed_columns(moment: Tensor, power: int) -> Tensor:
        return moment.flatten(1) @ ((gain * of_A) ** power).to(moment)

    _replace(optimizer, old_A, layer.lora_A, mixed_rows)
    _replace(optimizer, old_B, layer.lora_B, mixed_columns)
    return True


@torch.no_grad()
def _mix(old: Float[Tensor, "m r"], new: Float[Tensor, "m k"]) -> Tensor | None:
    """M with new = old M, in fp64; None where there is none."""
    Q, R = torch.linalg.qr(old.double())
    M = torch.linalg.pinv(R) @ (Q.T @ new.double())
    residual = torch.linalg.norm(old.double() @ M - new.double())
    return M if residual <= LARGEST_RESIDUAL * torch.linalg.norm(new.double()) else None


def _padded(moment: Tensor, new: Tensor, dim: int) -> Tensor:
    grown = torch.zeros_like(new, dtype=moment.dtype)
    grown.narrow(dim, 0, moment.shape[dim]).copy_(moment)
    return grown


def _replace(
    optimizer: torch.optim.Optimizer,
    old: nn.Parameter,
    new: nn.Parameter,
    change: Callable[[Tensor, int], Tensor] | None,
) -> None:
    """Puts `new` where the optimiser holds `old`, with each moment (and its power) changed; None: without state."""
    for group in optimizer.param_groups:
        group["params"] = [new if parameter is old else parameter for parameter in group["params"]]
    state = optimizer.state.pop(old, None)
    if state is None or change is None:
        return
    for key, value in state.items():
        if isinstance(value, Tensor) and value.shape == old.shape and value.dim():
            state[key] = change(value, MOMENT_POWERS[key]).reshape(new.shape)
    optimizer.state[new] = state
