"""How large an adapter is at given ranks, before it is there: trainable parameters, and bytes of PEFT's weights file.

An adapter of rank one is attached, measured and taken out again: so everything that is trained beside the factors
(DoRA's magnitudes, biases, whole modules, rows of tokens) counts as it will, to the byte.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import nn

from rankwise.adapters.config import LoraConfig, start_name
from rankwise.adapters.low_rank import LowRankLayer
from rankwise.adapters.starts import TAKEN_FROM_BASE
from rankwise.attach import peft_format
from rankwise.attach.attachment import adapter_layers
from rankwise.attach.checkpoint import peft_tensors
from rankwise.attach.inject import adapter_parameters, attach, detach
from rankwise.ranks.config import Budget

_DTYPE_NAMES = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.float64: "F64"}


@dataclass(frozen=True)
class AdapterSizes:
    """Sizes as functions of the ranks.

    Args:
        costs: trainable parameters of one rank, for each layer.
        most: the highest rank that the layer's weight can have.
        fixed: trainable parameters that no rank changes.
        entries: of the weights file: name, dtype, shape at rank one.
        rank_axes: for those that grow with a rank: whose, and along which axis.
        copies: ranks in the file for each rank of the layer (2 with a frozen start).
        shapes: outputs and inputs of each layer's matrix.
    """

    costs: dict[str, int]
    most: dict[str, int]
    fixed: int
    entries: dict[str, tuple[torch.dtype, tuple[int, ...]]]
    rank_axes: dict[str, tuple[str, int]]
    copies: int
    shapes: dict[str, tuple[int, int]]

    def parameters(self, ranks: Mapping[str, int]) -> int:
        """Trainable parameters at these ranks, every layer named."""
        return self.fixed + sum(self.costs[name] * rank for name, rank in ranks.items())

    def file_bytes(self, ranks: Mapping[str, int]) -> int:
        """Size of the weights file at these ranks: eight bytes, the header padded to a multiple of eight, the data."""
        shapes: list[tuple[torch.dtype, str, tuple[int, ...]]] = []
        for name, (dtype, shape) in self.entries.items():
            if name in self.rank_axes:
                layer, axis = self.rank_axes[name]
                shape = tuple(ranks[layer] * self.copies if i == axis else size for i, size in enumerate(shape))
            shapes.append((dtype, name, shape))
        shapes.sort(key=lambda entry: (-entry[0].itemsize, entry[1]))
        header: dict[str, object] = {"__metadata__": {"format": "pt"}}
        place = 0
        for dtype, name, shape in shapes:
            end = place + math.prod(shape) * dtype.itemsize
            header[name] = {"dtype": _DTYPE_NAMES[dtype], "shape": shape, "data_offsets": [place, end]}
            place = end
        length = len(json.dumps(header, separators=(",", ":")).encode())
        return 8 + -(-length // 8) * 8 + place

    def total(self, ranks: Mapping[str, int], budget: Budget) -> int:
        """The size in the budget's unit."""
        return self.file_bytes(ranks) if budget.in_bytes else self.parameters(ranks)


def measure_sizes(model: nn.Module, config: LoraConfig) -> AdapterSizes:
    """The sizes that `config` gives on a plain model, which is left as it was; torch's global generator too.

    Raises: RequestError as `attach`.
    """
    one = config.with_(r=1, rank_pattern={}, init_lora_weights=True, init_scale=1.0)
    attach(model, one, torch.Generator().manual_seed(0))
    try:
        return attached_sizes(model, copies=2 if start_name(config.init_lora_weights) in TAKEN_FROM_BASE else 1)
    finally:
        detach(model)


def attached_sizes(model: nn.Module, copies: int) -> AdapterSizes:
    """The sizes of the adapter that is attached, whatever its ranks are now; `copies` as in `AdapterSizes`."""
    layers = {name: layer for name, layer in adapter_layers(model).items() if isinstance(layer, LowRankLayer)}
    costs = {name: layer.lora_A[0].numel() + layer.lora_B[:, 0].numel() for name, layer in layers.items()}
    most = {name: min(layer.lora_A[0].numel(), layer.lora_B.shape[0]) for name, layer in layers.items()}
    shapes = {name: (layer.lora_B.shape[0], layer.lora_A[0].numel()) for name, layer in layers.items()}
    whole = sum(parameter.numel() for parameter in adapter_parameters(model).values())
    fixed = whole - sum(costs[name] * layer.rank for name, layer in layers.items())
    entries = {name: (t.dtype, tuple(t.shape)) for name, t in peft_format.to_file(peft_tensors(model)).items()}
    axes: dict[str, tuple[str, int]] = {}
    for name, layer in layers.items():
        axes[f"{peft_format.PREFIX}{name}.{layer.kind.a_key}"] = name, 0
        axes[f"{peft_format.PREFIX}{name}.{layer.kind.b_key}"] = name, 1
    return AdapterSizes(costs, most, fixed, entries, axes, copies, shapes)
