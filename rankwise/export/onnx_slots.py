"""Adapters as inputs of a graph: what an attached model's adapter is as plain tensors, and a model that takes them.

A slot stands where an adapter layer stood: y = base(x) + (x A) B, with the scale folded into B. A and B are laid out as
ONNX's MatMul reads them, [n, r] and [r, o], so that no transpose is left in the graph. Tensors that the adapter
replaces whole (a classifier's head, biases) are inputs under their own names. With a rank of 0, and the base's own
tensors, the model is the base.

Legend: n inputs, o outputs, r rank (of an embedding: n the vocabulary, and x A picks rows of A).
"""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import final

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel

from rankwise.adapters.base import AdapterLayer
from rankwise.adapters.layers import ConvolutionKind, embedding_scale, layer_kind
from rankwise.adapters.tokens import TokenRows
from rankwise.attach.attachment import adapter_layers, need_attachment, replace_modules
from rankwise.errors import RequestError

A, B = "lora_A", "lora_B"
WAY_OUT = "export it with --merged, which folds the adapter into the graph"


@dataclass(frozen=True)
class AdapterTensors:
    """One adapter as plain fp32 tensors.

    `factors`: A [n, r] and B [r, o], scaled, by the layer's name. `whole`: tensors that replace the base's, by name.
    """

    factors: dict[str, tuple[Tensor, Tensor]]
    whole: dict[str, Tensor]

    @property
    def ranks(self) -> list[int]:
        """Of the layers."""
        return [B.shape[0] for _, B in self.factors.values()]

    def named(self) -> dict[str, Tensor]:
        """By the names of the graph's inputs."""
        found: dict[str, Tensor] = {}
        for name, (down, up) in self.factors.items():
            found |= {f"{name}.{A}": down, f"{name}.{B}": up}
        return {**found, **self.whole}


def read_adapter(model: PreTrainedModel, name: str) -> AdapterTensors:
    """The adapter that is attached to `model`; `name` is for messages.

    Raises: RequestError for an adapter that is more than low-rank factors and whole tensors, naming the way out.
    """
    attachment = need_attachment(model)
    factors: dict[str, tuple[Tensor, Tensor]] = {}
    for layer_name, layer in adapter_layers(model).items():
        factors[layer_name] = _factors(layer, f"'{layer_name}' of adapter '{name}'")
    if attachment.vocabulary_before is not None:
        raise RequestError(
            f"adapter '{name}' changes the vocabulary ({attachment.vocabulary_before} tokens before), which is not an "
            f"adapter's to switch; {WAY_OUT}"
        )
    whole = {
        key: attachment.current(model, key).detach().float().contiguous()
        for key, trained in attachment.exchanged.items()
        if trained
    }
    if untrained := [key for key, trained in attachment.exchanged.items() if not trained]:
        raise RequestError(f"adapter '{name}' brings its own '{untrained[0]}' (a whole embedding); {WAY_OUT}")
    return AdapterTensors(factors, whole)


def evened_out(names: Iterable[str], stack: str, size: int, adapters: Sequence[AdapterTensors]) -> AdapterTensors:
    """Factors of rank 0 wherever some of the `size` layers of `stack` are adapted and others not.

    So that all layers of the graph are built alike. `names`: of the model's modules.
    """
    there, factors = set(names), dict[str, tuple[Tensor, Tensor]]()
    adapted = {name: pair for adapter in adapters for name, pair in adapter.factors.items()}
    for name, (down, up) in adapted.items():
        number, _, rest = name.removeprefix(f"{stack}.").partition(".")
        if not name.startswith(f"{stack}.") or not number.isdigit():
            continue
        for other in (f"{stack}.{place}.{rest}" for place in range(size)):
            if other not in adapted and other in there:
                factors[other] = torch.zeros(down.shape[0], 0), torch.zeros(0, up.shape[1])
    return AdapterTensors(factors, {})


def _factors(layer: AdapterLayer, where: str) -> tuple[Tensor, Tensor]:
    """Raises: RequestError for a layer whose change is not B A with a scale."""
    low_rank = None if isinstance(layer, TokenRows) else layer.low_rank()
    kind = layer_kind(layer.base)
    if low_rank is None or isinstance(kind, ConvolutionKind):
        what = {"DoraLayer": "DoRA", "TokenRows": "trained token rows"}.get(type(layer).__name__, type(layer).__name__)
        what = "a convolution" if low_rank is not None else what
        raise RequestError(
            f"{where} is {what}: adapters that can be switched are low-rank (LoRA) on linear layers and embeddings; "
            f"{WAY_OUT}"
        )
    scale = low_rank.scale * (embedding_scale(layer.base) if isinstance(layer.base, nn.Embedding) else 1.0)
    with torch.no_grad():
        first, second = low_rank.A.float().T, (low_rank.B.float() * scale).T
    return first.detach().contiguous(), second.detach().contiguous()


@final
class Slot(nn.Module):
    """y = base(x) + (x A) B; A and B are parameters so that `torch.func.functional_call` can put inputs there."""

    def __init__(self, base: nn.Module, num_inputs: int, num_outputs: int, rank: int) -> None:
        super().__init__()
        self.base = base
        self.lora_A = nn.Parameter(torch.zeros(num_inputs, rank), requires_grad=False)
        self.lora_B = nn.Parameter(torch.zeros(rank, num_outputs), requires_grad=False)

    @property
    def weight(self) -> Tensor:
        """The base's: T5 looks at its dtype."""
        weight = self.base.weight
        assert isinstance(weight, Tensor)
        return weight

    def forward(self, x: Tensor) -> Tensor:
        """The base with the change."""
        inner = F.embedding(x, self.lora_A) if isinstance(self.base, nn.Embedding) else x @ self.lora_A
        return self.base(x) + inner @ self.lora_B


@contextlib.contextmanager
def slotted(model: PreTrainedModel, adapters: Sequence[AdapterTensors], rank: int) -> Iterator[list[str]]:
    """Inside the block the plain `model` has a slot at each layer that any of the adapters changes.

    Yields the names of the inputs: A and B of each slot, then the tensors that are replaced whole. Afterwards the model
    is as it was.
    """
    shapes: dict[str, tuple[int, int]] = {}
    whole: dict[str, None] = {}
    for adapter in adapters:
        shapes.update({name: (A.shape[0], B.shape[1]) for name, (A, B) in adapter.factors.items()})
        whole.update(dict.fromkeys(adapter.whole))
    order = {name: place for place, (name, _) in enumerate(model.named_modules())}
    names = sorted(shapes, key=lambda name: order[name])
    slots = {name: Slot(model.get_submodule(name), *shapes[name], rank).eval() for name in names}
    replace_modules(model, {slot.base: slot for slot in slots.values()})
    try:
        yield [f"{name}.{which}" for name in names for which in (A, B)] + list(whole)
    finally:
        replace_modules(model, {slot: slot.base for slot in slots.values()})


def default_tensors(model: nn.Module, names: Sequence[str], adapters: Iterable[AdapterTensors]) -> dict[str, Tensor]:
    """What the inputs `names` hold where no adapter is active: rank 0, or the plain `model`'s own tensor."""
    found: dict[str, Tensor] = {}
    for adapter in adapters:
        for name, (down, up) in adapter.factors.items():
            found[f"{name}.{A}"] = torch.zeros(down.shape[0], 0)
            found[f"{name}.{B}"] = torch.zeros(0, up.shape[1])
        for name in adapter.whole:
            path, _, leaf = name.rpartition(".")
            found[name] = getattr(model.get_submodule(path), leaf).detach().clone()
    return {name: found[name] for name in names}


def base_sha256(tensors: Mapping[str, Tensor]) -> str:
    """One hash over names, dtypes, shapes and bytes of a plain model's parameters."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu().contiguous()
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().tobytes() if tensor.numel() else b"")
    return digest.hexdigest()
