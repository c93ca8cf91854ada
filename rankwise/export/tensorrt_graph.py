"""A graph in the precision that TensorRT is to compute in: networks are strongly typed, so the graph has to say it.

`fp16`, `bf16`: products with constant weights are computed in that type, between two casts; everything else (norms,
softmax, attention, the adapter's products, the cache) stays fp32. `int8`: both sides of such a product pass through
QuantizeLinear and DequantizeLinear (explicit Q/DQ), which TensorRT fuses into an INT8 product: weights with a scale for
each output, activations with one scale, calibrated as the largest absolute value on given rows (Wu et al. 2020,
"Integer quantization for deep learning inference", arXiv 2004.09602, section 4). One scale for all activations loses a
model whose channels differ much (see `onnx_quantise`), so kinds of layers can be left out, and those are fp16.

Legend: o outputs of a layer, n inputs.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import ModelProto, NodeProto, TensorProto
from onnx.helper import make_tensor, make_tensor_value_info

from rankwise.export.onnx_quantise import DOMAIN, Graph, Linear, find_linears
from rankwise.export.tensorrt_engine import Shapes

TYPES = {"fp16": TensorProto.FLOAT16, "bf16": TensorProto.BFLOAT16}
STEPS = 127
Feed = Mapping[str, np.ndarray]
"""A graph's inputs by name."""


@dataclass(frozen=True)
class Limits:
    """The most that an engine is to take: rows in a batch, tokens of prompt and answer, the adapter's rank."""

    rows: int
    context: int
    rank: int


def input_shapes(model: ModelProto, limits: Limits) -> dict[str, Shapes]:
    """The least, the usual and the largest shape of each input of a causal graph (`onnx_graph`) with an open axis.

    A cache may be empty, an adapter's rank 0. Usual is a row of 64 new tokens behind 256.
    """
    context, rank = limits.context, limits.rank
    half = max(1, context // 2)
    new, past = (1, min(64, half), context), (0, min(256, half), context)
    rows, ranks = (1, 1, limits.rows), (0, min(16, rank), rank)
    total = tuple(a + b for a, b in zip(new, past, strict=True))  # TensorRT holds the three ends against the graph
    found: dict[str, Shapes] = {}
    for value in model.graph.input:
        sizes = [dim.dim_value or None for dim in value.type.tensor_type.shape.dim]
        if None not in sizes:
            continue
        axes = {"input_ids": [rows, new], "attention_mask": [rows, total], "logit_positions": [new]}.get(value.name)
        if axes is None:
            axes = [rows, rows, past, past] if len(sizes) == 4 else [ranks, ranks]
        ends = [
            [axis[end] if size is None else size for size, axis in zip(sizes, axes, strict=True)] for end in range(3)
        ]
        found[value.name] = (ends[0], ends[1], ends[2])
    return found


def in_precision(
    model: ModelProto,
    folder: Path,
    dtype: str,
    skip: Sequence[str],
    largest: Mapping[str, float],
    emulated: bool = False,
) -> int:
    """Rewrites the graph's products with constant weights, in place.

    Args:
        model: the graph.
        folder: where its weights lie.
        dtype: `fp16` or `bf16`, of the products that are not in int8.
        skip: adapter inputs.
        largest: the largest absolute input, by the weight's name, of the products that are to be in int8.
        emulated: whether inputs and weights are rounded to `dtype` and multiplied in fp32, which any runtime can do.

    Returns how many products were rewritten.
    """
    graph = Graph(model, folder)
    linears = find_linears(graph, skip)
    for linear in linears:
        if linear.weight in largest:
            graph.replace(linear.node, _quantised(graph, linear, largest[linear.weight]))
        else:
            graph.replace(linear.node, _typed(graph, linear, dtype, emulated))
    graph.settle()
    foreign = [entry for entry in model.opset_import if entry.domain == DOMAIN]
    for entry in foreign:  # which Graph announces, and TensorRT does not have
        model.opset_import.remove(entry)
    return len(linears)


def _matrix(graph: Graph, linear: Linear) -> np.ndarray:
    """The weight as [n, o]."""
    values = graph.array(linear.weight)
    return values.T if linear.is_transposed else values


def _ended(graph: Graph, linear: Linear, nodes: list[NodeProto]) -> list[NodeProto]:
    """The nodes with the bias where there is one, the last of them giving what the product gave."""
    if len(linear.node.input) > 2:
        nodes.append(graph.node("Add", [nodes[-1].output[0], linear.node.input[2]]))
    nodes[-1].output[0] = linear.node.output[0]
    return nodes


def _typed(graph: Graph, linear: Linear, dtype: str, emulated: bool) -> list[NodeProto]:
    name = f"{linear.weight}.{dtype}"
    if name not in graph.constants:
        matrix = _rounded(np.ascontiguousarray(_matrix(graph, linear)), dtype)
        kind = TensorProto.FLOAT if emulated else TYPES[dtype]
        values = matrix.astype(np.float32) if emulated else matrix
        graph.constants[name] = make_tensor(name, kind, matrix.shape, values.tobytes(), raw=True)
    nodes = [graph.node("Cast", [linear.node.input[0]], to=TYPES[dtype])]
    if emulated:
        nodes.append(graph.node("Cast", [nodes[-1].output[0]], to=TensorProto.FLOAT))
    nodes.append(graph.node("MatMul", [nodes[-1].output[0], name]))
    if not emulated:
        nodes.append(graph.node("Cast", [nodes[-1].output[0]], to=TensorProto.FLOAT))
    return _ended(graph, linear, nodes)


def _rounded(matrix: np.ndarray, dtype: str) -> np.ndarray:
    if dtype == "fp16":
        return matrix.astype(np.float16)
    from ml_dtypes import bfloat16  # which numpy lacks

    return matrix.astype(bfloat16)


def _quantised(graph: Graph, linear: Linear, largest: float) -> list[NodeProto]:
    numbers, factors = f"{linear.weight}.int8", f"{linear.weight}.factors"
    if numbers not in graph.constants:
        matrix = _matrix(graph, linear)
        scales = np.maximum(np.abs(matrix).max(0), 1e-12) / STEPS
        graph.constant(numbers, np.clip(np.rint(matrix / scales), -STEPS, STEPS).astype(np.int8))
        graph.constant(factors, scales.astype(np.float32))
    scale = graph.constant(f"{linear.weight}.input_scale", np.array(max(largest, 1e-12) / STEPS, np.float32))
    zero = graph.constant("rankwise_int8_zero", np.array(0, np.int8))
    x = graph.node("QuantizeLinear", [linear.node.input[0], scale, zero])
    rounded = graph.node("DequantizeLinear", [x.output[0], scale, zero])
    weight = graph.node("DequantizeLinear", [numbers, factors], axis=1)
    product = graph.node("MatMul", [rounded.output[0], weight.output[0]])
    return _ended(graph, linear, [x, rounded, weight, product])


def largest_inputs(
    model: ModelProto, folder: Path, feeds: Iterable[Feed], skip: Sequence[str], kinds_left_out: Sequence[str]
) -> dict[str, float]:
    """The largest absolute input of each product with a constant weight, by the weight's name, over all `feeds`.

    Runs the graph in ONNX Runtime; `folder` is for passing files. Products of `kinds_left_out` (`down_proj`) are not
    measured.
    """
    watched = copy.deepcopy(model)
    linears = [one for one in find_linears(Graph(watched, folder), skip) if one.kind not in kinds_left_out]
    inputs = {linear.weight: linear.node.input[0] for linear in linears}
    makers = {name for node in watched.graph.node for name in node.output}
    del watched.graph.output[:]
    for name in dict.fromkeys(name for name in inputs.values() if name in makers):
        watched.graph.output.append(make_tensor_value_info(name, TensorProto.FLOAT, None))
    session = open_session(watched, folder / "watched.onnx")
    names = [value.name for value in session.get_outputs()]
    found = dict.fromkeys(names, 0.0)
    for feed in feeds:
        for name, values in zip(names, session.run(None, dict(feed)), strict=True):
            found[name] = max(found[name], float(np.abs(values).max(initial=0.0)))
    return {weight: found[name] for weight, name in inputs.items() if name in found}


def save_graph(model: ModelProto, file: Path) -> None:
    """Writes a graph, its weights in one file beside it."""
    whole = copy.deepcopy(model)  # onnx takes the weights out of what it writes so
    onnx.save_model(whole, str(file), save_as_external_data=True, location=f"{file.name}.data")


def open_session(model: ModelProto, file: Path) -> Any:
    """The graph in ONNX Runtime, on the CPU; `file` is where it is written for that."""
    import onnxruntime

    save_graph(model, file)
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3  # it warns of every weight that the graph does not read
    return onnxruntime.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])
