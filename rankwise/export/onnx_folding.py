"""Small constants of a graph, computed once: parsers that don't fold want axes and shapes to be constants.

Weights stay as they are: only what is smaller than LARGEST numbers is touched, and never a graph's input.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from onnx import ModelProto, NodeProto, TensorProto
from onnx.helper import get_attribute_value
from onnx.numpy_helper import from_array, to_array
from onnx.reference import ReferenceEvaluator

LARGEST = 4096
FOLDED = (
    "Cast", "CastLike", "Concat", "Reshape", "Unsqueeze", "Squeeze", "Identity", "Neg", "Add", "Sub", "Mul", "Slice",
    "Gather", "Transpose", "Expand", "Range", "ConstantOfShape",
)  # fmt: skip
"""Operators that are computed: what shapes and axes are made of."""


def fold_constants(model: ModelProto) -> int:
    """Replaces nodes that only read small constants by their values, in place. Returns how many went."""
    graph = model.graph
    inputs = {value.name for value in graph.input}
    known = {
        tensor.name: to_array(tensor)
        for tensor in graph.initializer
        if tensor.name not in inputs and _size(tensor) <= LARGEST and not tensor.external_data
    }
    versions = {entry.domain: entry.version for entry in model.opset_import}
    outputs = {value.name for value in graph.output}
    kept: list[NodeProto] = []
    made: dict[str, np.ndarray] = {}
    for node in graph.node:
        values = _value(node, known, versions)
        if values is None or outputs.intersection(node.output):
            kept.append(node)
        else:
            known[node.output[0]] = made[node.output[0]] = values
    read = {name for node in kept for name in node.input}
    removed = len(graph.node) - len(kept)
    copies = [NodeProto.FromString(node.SerializeToString()) for node in kept]
    del graph.node[:]
    graph.node.extend(copies)
    graph.initializer.extend(from_array(values, name) for name, values in made.items() if name in read)
    return removed


def _size(tensor: TensorProto) -> int:
    return int(np.prod(tensor.dims, dtype=np.int64))


def _value(node: NodeProto, known: dict[str, np.ndarray], versions: dict[str, int]) -> np.ndarray | None:
    """What the node gives, where that can be known now and is small."""
    if node.op_type == "Constant":
        [attribute] = node.attribute
        given = get_attribute_value(attribute)
        if attribute.name == "value":
            return to_array(given) if _size(given) <= LARGEST else None
        kinds = {"value_int": np.int64, "value_ints": np.int64, "value_float": np.float32, "value_floats": np.float32}
        return np.array(given, kinds[attribute.name]) if attribute.name in kinds else None
    if node.op_type not in FOLDED or len(node.output) != 1 or not all(name in known or not name for name in node.input):
        return None
    feeds = {name: known[name] for name in node.input if name}
    results: Any = ReferenceEvaluator(node, opsets=versions).run(None, feeds)
    result = np.asarray(results[0])
    return result if result.size <= LARGEST else None
