"""Finds the layers of a model that read the same tensor, by watching what they are given.

The watched pass costs milliseconds, whatever the model's size: it runs two tokens through a copy of the model's
structure in which every linear layer writes down its input and gives zeros. Other parameters are the model's own, read
and never written; hooks stay behind. A model that can't be run so (its inputs are not token ids, say) shares nothing.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Mapping
from typing import cast, final

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from rankwise.adapters.base import AdapterLayer
from rankwise.adapters.low_rank import FUSED, HOOKS, LowRankLayer
from rankwise.adapters.sharing import Readers
from rankwise.quantized import is_quantized

log = logging.getLogger(__name__)


@final
class _Witness(nn.Module):
    """Stands for a linear layer."""

    def __init__(self, layer: nn.Module, num_outputs: int, seen: list[tuple[nn.Module, Tensor]]) -> None:
        super().__init__()
        self.weight = layer.weight  # T5 asks for its dtype
        self.num_outputs = num_outputs
        self._layer = [layer]  # in a list, it is no submodule
        self._seen = seen

    def forward(self, x: Tensor) -> Tensor:
        self._seen.append((self._layer[0], x))
        return x.new_zeros(*x.shape[:-1], self.num_outputs)


def join_readers(model: nn.Module, layers: Mapping[str, AdapterLayer]) -> None:
    """Tells those of `layers`, not in place yet, that read the same tensor about each other."""
    joinable = {
        layer.base: layer
        for layer in layers.values()
        if isinstance(layer, LowRankLayer)
        and (type(layer.base) in FUSED or is_quantized(layer.base))
        and layer.start_A is None
    }
    if len(joinable) < 2 or not isinstance(model, PreTrainedModel):
        return
    try:
        seen = _inputs(model)
    except Exception as error:  # noqa: BLE001 (somebody else's forward and copies: they may raise anything)
        log.info("layers of this %s share no x A^T: watching them failed (%r)", type(model).__name__, error)
        return
    groups: dict[int, list[LowRankLayer]] = {}
    for base, x in seen:
        readers = groups.setdefault(id(x), [])  # all of them are alive in `seen`
        if base in joinable and joinable[base] not in readers:
            readers.append(joinable[base])
    for group in groups.values():
        if len(group) > 1 and all(layer.readers is None for layer in group):
            readers_of_one = Readers(group)
            for layer in group:
                layer.readers = readers_of_one


def _inputs(model: PreTrainedModel) -> list[tuple[nn.Module, Tensor]]:
    """Linear layers of the model and what they were given, in the order of their calls."""
    seen: list[tuple[nn.Module, Tensor]] = []
    known: dict[int, object] = {id(parameter): parameter for parameter in model.parameters()}
    for module in model.modules():
        if isinstance(module, FUSED):
            num_outputs = module.out_features if isinstance(module, nn.Linear) else module.nf
            known[id(module)] = _Witness(module, num_outputs, seen)
    skeleton = cast(PreTrainedModel, copy.deepcopy(model, known)).eval()
    for module in skeleton.modules():
        for hooks in HOOKS:
            vars(module)[hooks].clear()
        vars(module).pop("forward", None)  # one that stands for the class's: offloading
    tokens = {name: torch.zeros_like(value[:1, :2]) for name, value in model.dummy_inputs.items()}
    device = next(model.parameters()).device
    with torch.no_grad():
        skeleton(**{name: value.to(device) for name, value in tokens.items()})
    return seen
