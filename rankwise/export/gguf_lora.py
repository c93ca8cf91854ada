"""An adapter as a GGUF file that llama.cpp loads beside its base (`--lora`), and the same read back.

llama.cpp has one alpha for the whole file and computes W x + alpha / r B (A x) for each layer of rank r; a layer whose
scale is another has the ratio folded into its B. The rows of a query's and key's B are in the file's order of rotary
pairs, as those of its base's weights are.
"""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel

from rankwise.adapters.base import AdapterLayer, LowRank
from rankwise.attach.attachment import adapter_layers, need_attachment
from rankwise.attach.inject import disabled
from rankwise.errors import RequestError
from rankwise.export.gguf_file import add_value, file_tensor_name, tensor_names, turned
from rankwise.export.gguf_metadata import Architecture, architecture_of
from rankwise.models.gguf_weights import unpermute_rotary

TO = "gguf-lora"


@dataclass(frozen=True)
class LoraFile:
    """What was written: layers, and how many of them had their scale folded into B."""

    num_layers: int
    alpha: float
    num_folded: int


def low_rank_layers(model: PreTrainedModel) -> dict[str, LowRank]:
    """The change of each layer of an attached model as factors, by the layer's name.

    Raises: RequestError for what a LoRA file of llama.cpp can't hold.
    """
    if exchanged := list(need_attachment(model).exchanged):
        raise RequestError(f"{_cannot('trained biases and whole modules', exchanged[0])}")
    found: dict[str, LowRank] = {}
    for name, layer in adapter_layers(model).items():
        change = layer.low_rank()
        if change is None:
            raise RequestError(_cannot(f"a {type(layer).__name__.removesuffix('Layer')} layer", name))
        if not isinstance(layer.base, nn.Linear):
            raise RequestError(_cannot(f"an adapted {type(layer.base).__name__}", name))
        if name == "lm_head" and model.config.tie_word_embeddings:
            raise RequestError(_cannot("the head of tied embeddings, which has no weight of its own there", name))
        found[name] = change
    return found


def _cannot(what: str, name: str) -> str:
    return f"--to {TO} can't hold {what} ('{name}'); --to gguf folds it into the model"


def write_lora(model: PreTrainedModel, path: Path, name: str) -> LoraFile:
    """Writes the adapter of an attached model to `path`, in f32; `name` is what the file calls itself.

    Raises: RequestError, as `low_rank_layers`.
    """
    import gguf

    config = model.config
    architecture = architecture_of(config, TO)
    names = tensor_names(config, architecture)
    layers = low_rank_layers(model)
    [(alpha, _)] = Counter(change.scale * change.A.shape[0] for change in layers.values()).most_common(1)
    writer = gguf.GGUFWriter(path, architecture.name)
    writer.add_type(gguf.GGUFType.ADAPTER)
    writer.add_name(name)
    add_value(writer, gguf.Keys.Adapter.TYPE, "lora")
    add_value(writer, gguf.Keys.Adapter.LORA_ALPHA, float(alpha))
    num_folded = 0
    for own, change in layers.items():
        place = file_tensor_name(names, f"{own}.weight")
        ratio = change.scale * change.A.shape[0] / float(np.float32(alpha))
        B = change.B.detach().double().cpu() * ratio
        num_folded += abs(ratio - 1.0) > 1e-6
        writer.add_tensor(f"{place}.lora_a", _plain(change.A))
        writer.add_tensor(f"{place}.lora_b", np.ascontiguousarray(turned(_plain(B), place, config, architecture)))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return LoraFile(len(layers), float(alpha), num_folded)


def _plain(tensor: Tensor) -> np.ndarray:
    return np.ascontiguousarray(tensor.detach().float().cpu().numpy())


# --- reading back --------------------------------------------------------------------------------------------------


def read_lora(path: Path, config: PretrainedConfig, modules: Mapping[str, Any]) -> dict[str, LowRank]:
    """The factors in the file by the names of `modules`, as llama.cpp would use them; rows in transformers' order."""
    import gguf

    architecture = architecture_of(config, TO)
    names = tensor_names(config, architecture)
    reader = gguf.GGUFReader(path)
    alpha = float(reader.fields[gguf.Keys.Adapter.LORA_ALPHA].contents())
    tensors = {tensor.name: np.array(tensor.data) for tensor in reader.tensors}
    found: dict[str, LowRank] = {}
    for own in modules:
        place = file_tensor_name(names, f"{own}.weight")
        A = torch.from_numpy(tensors.pop(f"{place}.lora_a"))
        B = torch.from_numpy(_turned_back(tensors.pop(f"{place}.lora_b"), place, config, architecture))
        found[own] = LowRank(A, B, alpha / A.shape[0])
    assert not tensors, f"the file holds more than was written: {list(tensors)}"
    return found


def _turned_back(values: np.ndarray, name: str, config: PretrainedConfig, architecture: Architecture) -> np.ndarray:
    part = name.split(".")[2] if name.startswith("blk.") else ""
    heads = {"attn_q": config.num_attention_heads, "attn_k": config.num_key_value_heads or config.num_attention_heads}
    if not architecture.interleaves or part not in heads:
        return values
    return np.ascontiguousarray(unpermute_rotary(values, heads[part]))


def largest_weight_error(ours: Mapping[str, LowRank], theirs: Mapping[str, LowRank]) -> float:
    """The largest difference of the two changes of a weight, in float64, relative to the largest change of any."""
    largest, error = 0.0, 0.0
    for name, change in ours.items():
        own = _delta(change)
        largest = max(largest, float(own.abs().max()))
        error = max(error, float((own - _delta(theirs[name])).abs().max()))
    return error / largest if largest else error


def _delta(change: LowRank) -> Tensor:
    return change.scale * (change.B.detach().double().cpu() @ change.A.detach().double().cpu())


@contextlib.contextmanager
def using(model: PreTrainedModel, changes: Mapping[str, LowRank]) -> Iterator[None]:
    """Inside the block an attached model computes its base with `changes`, not with its own adapter."""
    layers: dict[str, AdapterLayer] = adapter_layers(model)
    with contextlib.ExitStack() as stack:
        stack.enter_context(disabled(model))
        for name, change in changes.items():
            handle = layers[name].base.register_forward_hook(partial(_add, change))
            stack.callback(handle.remove)
        yield


def _add(change: LowRank, module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
    A, B = change.A.to(output), change.B.to(output)
    return output + change.scale * ((inputs[0] @ A.T) @ B.T)
