"""Finds the task of rows that come without one: a linear classifier on the base's pooled hidden state.

It runs before the model's own forward, on the base alone, once for each batch: while an answer is written token by
token (the cache holds what came before) the rows keep what was found for them. An encoder-decoder's encoder decides.

Legend: B rows, T positions, d width of the hidden state.
"""

from __future__ import annotations

import inspect
from functools import partial
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.cache_utils import Cache

from rankwise.adapters.mixture import Mixture
from rankwise.attach.attachment import adapter_layers
from rankwise.errors import RequestError


def infer_tasks_of(model: nn.Module, mixture: Mixture) -> None:
    """Makes the model find the tasks of its rows. Raises: RequestError for a model whose hidden states are unknown."""
    if not isinstance(model, PreTrainedModel):
        raise RequestError(
            f"an inferred gate needs a transformers model, whose hidden states it reads, not {type(model).__name__}; "
            "choose mode 'hard' and give tasks"
        )
    reader = reading_part(model)
    reader.register_forward_pre_hook(partial(_before, owner=model, mixture=mixture), with_kwargs=True)


def forget_inferring(model: nn.Module) -> None:
    """Takes away what `infer_tasks_of` put in."""
    for module in model.modules():
        for key in [key for key, hook in module._forward_pre_hooks.items() if _is_ours(hook)]:
            del module._forward_pre_hooks[key]
            module._forward_pre_hooks_with_kwargs.pop(key, None)


def reading_part(model: PreTrainedModel) -> nn.Module:
    """What reads the whole prompt: the encoder of an encoder-decoder, else the model itself."""
    return model.get_encoder() if model.config.is_encoder_decoder else model


def _is_ours(hook: Any) -> bool:
    return isinstance(hook, partial) and hook.func is _before


def _before(
    module: nn.Module, arguments: tuple[Any, ...], named: dict[str, Any], owner: nn.Module, mixture: Mixture
) -> None:
    """Forward pre-hook: the tasks of the rows that are about to be read."""
    routing = mixture.routing
    if (
        routing.given is not None
        or not mixture.infers
        or not any(layer.active for layer in adapter_layers(owner).values())
    ):
        return
    caches = [value for value in named.values() if isinstance(value, Cache)]  # releases differ in the argument's name
    if routing.inferred is not None and any(cache.get_seq_length() > 0 for cache in caches):
        return
    ids = arguments[0] if arguments else named.get("input_ids")
    if not isinstance(ids, Tensor):
        raise RequestError("the inferred gate reads input_ids, and there are none; give the task instead")
    _refuse_packed(named)
    assert isinstance(owner, PreTrainedModel)
    states = pooled_states(owner, ids, named.get("attention_mask"))
    assert mixture.router_weight is not None and mixture.router_bias is not None
    routing.inferred = (states @ mixture.router_weight.T + mixture.router_bias).argmax(-1)


def _refuse_packed(named: dict[str, Any]) -> None:
    """Raises: RequestError for a row that holds several samples: they may be of different tasks."""
    positions = named.get("position_ids")
    restarts = isinstance(positions, Tensor) and bool((positions[:, 1:] < positions[:, :-1]).any())
    if restarts or named.get("segment_lengths") is not None:
        raise RequestError("packed rows hold several samples, whose tasks are not inferred; give tasks of their tokens")


@torch.no_grad()
def pooled_states(
    model: PreTrainedModel, ids: Int[Tensor, "B T"], attention_mask: Int[Tensor, "B T"] | None = None
) -> Float[Tensor, "B d"]:
    """The mean of the base's last hidden states over each row's tokens, in fp32. The adapters are off, dropout too."""
    layers = [layer for layer in adapter_layers(model).values() if layer.active]
    part = model.get_encoder() if model.config.is_encoder_decoder else model.base_model
    training = [module for module in part.modules() if module.training]
    mask = torch.ones_like(ids) if attention_mask is None or attention_mask.dim() != 2 else attention_mask
    inputs: dict[str, Any] = {"input_ids": ids, "attention_mask": mask}
    if not bool(mask[:, 0].all()) and "position_ids" in inspect.signature(part.forward).parameters:
        inputs["position_ids"] = (mask.cumsum(-1) - 1).clamp_min(0)  # padded on the left: as without padding
    for layer in layers:
        layer.active = False
    part.eval()
    try:
        hidden = part(**inputs)[0].float()
    finally:
        for layer in layers:
            layer.active = True
        for module in training:
            module.training = True
    weights = mask.to(hidden.dtype).unsqueeze(-1)
    return (hidden * weights).sum(1) / weights.sum(1).clamp_min(1.0)
