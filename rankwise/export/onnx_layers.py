"""A model of many equal layers as a graph from a trace of its first three: the third is copied for the rest.

Tracing costs seconds of processor time for each layer, so that a model of thirty takes minutes; copying costs nothing.
It is done only where every layer is built as the first one (same modules, settings and shapes, apart from its number)
and where the second and third are traced to the same operators; else the whole model is traced. Like every export the
graph is compared with torch before it is kept.

Names are those of the model: `model.layers.2.mlp.up_proj.base.weight` becomes `model.layers.17. ...`.
"""

from __future__ import annotations

import ast
import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from onnx import GraphProto, NodeProto, ValueInfoProto
from onnx.numpy_helper import from_array
from torch import Tensor, nn
from transformers import PreTrainedModel

TRACED = 3
"""Layers that are traced: the first may share what it computes with all others, the third follows the second as the
fourth follows the third."""
NUMBERS = ("layer_idx", "layer_id", "layer_index")
"""Attributes that count layers, and may differ."""
SCOPES = "pkg.torch.onnx.name_scopes"


@dataclass(frozen=True)
class Stack:
    """The list of a model's layers: its name, and how many they are."""

    name: str
    size: int


def equal_layers(model: PreTrainedModel) -> Stack | None:
    """The model's one list of layers, if there are more than TRACED and all are built alike; else None."""
    total = getattr(model.config.get_text_config(), "num_hidden_layers", 0)
    lists = [(n, m) for n, m in model.named_modules() if isinstance(m, nn.ModuleList) and len(m) == total > TRACED]
    if len(lists) != 1:
        return None
    name, layers = lists[0]
    kinds = getattr(model.config.get_text_config(), "layer_types", None)
    if kinds is not None and len(set(kinds)) > 1:
        return None
    first = _build(layers[0])
    return Stack(name, total) if all(_build(layer) == first for layer in layers) else None


def _build(layer: nn.Module) -> list[Any]:
    """How a layer is made, without its weights' values and its number."""
    found: list[Any] = []
    for name, module in layer.named_modules():
        plain = {
            key: value
            for key, value in vars(module).items()
            if isinstance(value, (int, float, str, bool, type(None))) and key not in NUMBERS
        }
        tensors = {**module._parameters, **module._buffers}
        shapes = {key: None if tensor is None else tuple(tensor.shape) for key, tensor in tensors.items()}
        found.append((name, type(module), plain, shapes))
    return found


@contextlib.contextmanager
def cut_to_traced(model: PreTrainedModel, stack: Stack) -> Iterator[None]:
    """Inside the block the model has its first TRACED layers only."""
    path, _, leaf = stack.name.rpartition(".")
    parent = model.get_submodule(path)
    whole = parent._modules[leaf]
    assert isinstance(whole, nn.ModuleList)
    parent._modules[leaf] = whole[:TRACED]
    try:
        yield
    finally:
        parent._modules[leaf] = whole


@dataclass(frozen=True)
class _Parts:
    """Nodes before, of each traced layer, and after."""

    before: list[NodeProto]
    layers: list[list[NodeProto]]
    after: list[NodeProto]


def _parts(graph: GraphProto, prefix: str) -> _Parts | None:
    """None where layers are not one behind the other."""
    parts = _Parts([], [[] for _ in range(TRACED)], [])
    last = -1
    for node in graph.node:
        number = _layer_of(node, prefix)
        if number is None:
            (parts.before if last < 0 else parts.after).append(node)
            continue
        if number < last or parts.after:
            return None
        last = number
        parts.layers[number].append(node)
    return parts


def _layer_of(node: NodeProto, prefix: str) -> int | None:
    scopes = next((entry.value for entry in node.metadata_props if entry.key == SCOPES), "[]")
    for scope in ast.literal_eval(scopes):
        if scope.startswith(prefix) and scope.removeprefix(prefix).isdigit():
            return int(scope.removeprefix(prefix))
    return None


def copy_layers(graph: GraphProto, stack: Stack, tensors: dict[str, Tensor], root: str) -> bool:
    """Completes a graph of the first TRACED layers, in place. False, with the graph as it was, where that can't be.

    `tensors`: the whole model's parameters and buffers. `root`: what the tracer put before the model's names.
    """
    parts = _parts(graph, f"{root}{stack.name}.")
    if parts is None or not parts.layers[-1] or not _follow_alike(parts, stack.name):
        return False
    last = TRACED - 1
    second, third = parts.layers[last - 1], parts.layers[last]
    made_third = {name for node in third for name in node.output}
    followers = dict(zip(_made(second), _made(third), strict=True))
    copies: list[NodeProto] = []
    for number in range(TRACED, stack.size):
        renamed: dict[str, str] = {}
        for name in made_third:
            renamed[name] = _own_name(name, number, stack.name)
        for name, follower in followers.items():
            renamed[name] = follower if number == TRACED else _own_name(follower, number - 1, stack.name)
        for node in third:
            copy = NodeProto.FromString(node.SerializeToString())
            copy.name = f"{node.name}.layer{number}"
            for names in (copy.input, copy.output):
                names[:] = [renamed.get(name) or _numbered(name, number, stack.name) for name in names]
            copies.append(copy)
    outputs = {value.name for value in graph.output}
    for node in parts.after:
        node.input[:] = [
            _own_name(name, stack.size - 1, stack.name) if name in made_third and name not in outputs else name
            for name in node.input
        ]
    _add_tensors(graph, stack, tensors, root)
    _spread(graph.input, stack)
    _spread(graph.output, stack)
    nodes = [NodeProto.FromString(node.SerializeToString()) for node in parts.after]
    kept = len(graph.node) - len(parts.after)
    del graph.node[kept:]
    graph.node.extend([*copies, *nodes])
    del graph.value_info[:]
    return True


def _made(nodes: list[NodeProto]) -> list[str]:
    return [name for node in nodes for name in node.output]


def _follow_alike(parts: _Parts, stack: str) -> bool:
    """Whether the third layer does behind the second what the second does behind the first, node by node.

    What follows the layers may read the first one's values (constants that all share) and the third one's.
    """
    first, second, third = (set(_made(layer)) for layer in parts.layers)
    if len(parts.layers[1]) != len(parts.layers[2]):
        return False
    followers = dict(zip(_made(parts.layers[1]), _made(parts.layers[2]), strict=False))
    for one, other in zip(parts.layers[1], parts.layers[2], strict=True):
        if one.op_type != other.op_type or len(one.input) != len(other.input) or len(one.output) != len(other.output):
            return False
        if [entry.SerializeToString() for entry in one.attribute] != [
            entry.SerializeToString() for entry in other.attribute
        ]:
            return False
        for name, follower in zip(one.input, other.input, strict=True):
            shared = name == follower and name not in second
            own = name in second and followers.get(name) == follower
            link = name in first and follower in second
            numbered = follower not in first | second | third and _numbered(follower, 1, stack) == name
            if not (shared or own or link or numbered):
                return False
    return not any(name in second for node in parts.after for name in node.input)


def _own_name(name: str, number: int, stack: str) -> str:
    """What layer `number` calls the value that the traced third layer calls `name`."""
    numbered = _numbered(name, number, stack)
    return numbered if numbered != name else f"{name}.layer{number}"


def _numbered(name: str, number: int, stack: str) -> str:
    """`name` of the third layer as that of another; names without a layer stay."""
    last = TRACED - 1
    for before in (f"{stack}.", "past_key_values.", "present."):
        place = name.find(f"{before}{last}.")
        if place == 0 or (place > 0 and name[place - 1] == "."):
            return f"{name[:place]}{before}{number}.{name[place + len(before) + len(str(last)) + 1 :]}"
    return name


def _add_tensors(graph: GraphProto, stack: Stack, tensors: dict[str, Tensor], root: str) -> None:
    """The weights of the layers that were not traced."""
    own = [tensor.name for tensor in graph.initializer if _numbered(tensor.name, TRACED, stack.name) != tensor.name]
    for number in range(TRACED, stack.size):
        for name in own:
            numbered = _numbered(name, number, stack.name)
            values = tensors[numbered.removeprefix(root)].detach().cpu().contiguous().numpy()
            graph.initializer.append(from_array(values, numbered))


def _spread(values: Any, stack: Stack) -> None:
    """Inputs or outputs of the third layer, for those behind it too, in the order of layers."""
    own = [value for value in values if _numbered(value.name, TRACED, stack.name) != value.name]
    groups: dict[bool, list[ValueInfoProto]] = {}
    for value in own:
        groups.setdefault(value.name.startswith(stack.name), []).append(value)
    ordered: list[ValueInfoProto] = []
    for value in values:
        ordered.append(ValueInfoProto.FromString(value.SerializeToString()))
        for group in groups.values():
            if value is not group[-1] and value.name != group[-1].name:
                continue
            for number in range(TRACED, stack.size):
                for member in group:
                    copy = ValueInfoProto.FromString(member.SerializeToString())
                    copy.name = _numbered(member.name, number, stack.name)
                    ordered.append(copy)
    del values[:]
    values.extend(ordered)
