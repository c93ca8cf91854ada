"""A graph in the precision that TensorRT is to compute in: networks are strongly typed, so the graph has to say it.

`fp16`, `bf16`: products with constant weights are computed in that type, between two casts; everything else (norms,
softmax, attention, the adapter's products, the cache) stays fp32. `int8`: both sides of such a product pass through
QuantizeLinear and DequantizeLinear (explicit Q/DQ), which TensorRT fuses into an INT8 product: weights with a scale for
each output, activations with one scale, calibrated as the largest absolute value on given rows (Wu et al. 2020,
"Integer quantization for deep learning inference", arXiv 2004.09602, section 4). One scale for all activations loses a
model whose channels differ much (see `onnx_quantise`), so each channel is first divided by a factor of its own, which
its column of the weight is multiplied by (Xiao et al. 2022, SmoothQuant, arXiv 2211.10438, equation 4). Kinds of layers
for which that is not enough can be left out, and those are fp16.

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
from jaxtyping import Float
from onnx import ModelProto, NodeProto, TensorProto
from onnx.helper import make_tensor, make_tensor_value_info

from rankwise.export.onnx_quantise import DOMAIN, Graph, Linear, find_linears
from rankwise.export.tensorrt_engine import Shapes

TYPES = {"fp16": TensorProto.FLOAT16, "bf16": TensorProto.BFLOAT16}
STEPS = 127
STRENGTH = 0.75
"""Of smoothing, from 0 to 1: how much of the channels' differences moves from the activations into the weights. On
SmolLM2 with down_proj left out 0.5 drifts by KL 0.017 and 0.75 by 0.009; without smoothing it is 0.24."""
LEAST = 1e-5
"""Of a channel's largest value: one that calibration has not seen would be blown up."""
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
    largest: Mapping[str, np.ndarray],
    emulated: bool = False,
) -> int:
    """Rewrites the graph's products with constant weights, in place.

    Args:
        model: the graph.
        folder: where its weights lie.
        dtype: `fp16` or `bf16`, of the products that are not in int8.
        skip: adapter inputs.
        largest: the largest absolute value [n] of each input, by the weight's name, of the products that are to be in
            int8.
        emulated: whether inputs and weights are rounded to `dtype` and multiplied in fp32, which any runtime can do.

    Returns how many products were rewritten.
    """
    graph = Graph(model, folder)
    linears = find_linears(graph, skip)
    chosen = [linear for linear in linears if linear.weight in largest]
    factors = _smoothing(graph, chosen, largest)
    smoothed: dict[str, str] = {}
    for linear in linears:
        if linear.weight not in largest:
            graph.replace(linear.node, _typed(graph, linear, dtype, emulated))
            continue
        x, nodes = linear.node.input[0], list[NodeProto]()
        if x not in smoothed:
            nodes = _rounded_input(graph, x, factors[x], largest[linear.weight])
            smoothed[x] = nodes[-1].output[0]
        graph.replace(linear.node, [*nodes, *_quantised(graph, linear, smoothed[x], factors[x])])
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


def _smoothing(
    graph: Graph, linears: Sequence[Linear], largest: Mapping[str, np.ndarray]
) -> dict[str, Float[np.ndarray, " n"]]:
    """What each channel is divided by, by the input's name: products that share an input share its factors."""
    weights: dict[str, np.ndarray] = {}
    for linear in linears:
        rows, x = np.abs(_matrix(graph, linear)).max(1), linear.node.input[0]
        weights[x] = np.maximum(weights[x], rows) if x in weights else rows
    inputs = {linear.node.input[0]: np.maximum(largest[linear.weight], LEAST) for linear in linears}
    return {
        x: np.maximum(inputs[x] ** STRENGTH / np.maximum(weights[x], LEAST) ** (1 - STRENGTH), LEAST).astype(np.float32)
        for x in inputs
    }


def _rounded_input(
    graph: Graph, x: str, factors: Float[np.ndarray, " n"], largest: Float[np.ndarray, " n"]
) -> list[NodeProto]:
    """Activations smoothed, as whole numbers, and back: with one scale, as the products take them."""
    zero = graph.constant("rankwise_int8_zero", np.array(0, np.int8))
    shares = graph.constant(f"{x}.smoothing", (1 / factors).astype(np.float32))
    scale = graph.constant(f"{x}.scale", np.array(max(float((largest / factors).max()), 1e-12) / STEPS, np.float32))
    smoothed = graph.node("Mul", [x, shares])
    whole = graph.node("QuantizeLinear", [smoothed.output[0], scale, zero])
    return [smoothed, whole, graph.node("DequantizeLinear", [whole.output[0], scale, zero])]


def _quantised(graph: Graph, linear: Linear, x: str, factors: Float[np.ndarray, " n"]) -> list[NodeProto]:
    numbers, scales = f"{linear.weight}.{x}.int8", f"{linear.weight}.{x}.factors"
    if numbers not in graph.constants:
        matrix = _matrix(graph, linear) * factors[:, None]
        steps = np.maximum(np.abs(matrix).max(0), 1e-12) / STEPS
        graph.constant(numbers, np.clip(np.rint(matrix / steps), -STEPS, STEPS).astype(np.int8))
        graph.constant(scales, steps.astype(np.float32))
    weight = graph.node("DequantizeLinear", [numbers, scales], axis=1)
    product = graph.node("MatMul", [x, weight.output[0]])
    return _ended(graph, linear, [weight, product])


def largest_inputs(
    model: ModelProto, folder: Path, feeds: Iterable[Feed], skip: Sequence[str], kinds_left_out: Sequence[str]
) -> dict[str, Float[np.ndarray, " n"]]:
    """The largest absolute value of each input of each product with a constant weight, by the weight's name.

    Runs the graph on all `feeds` in ONNX Runtime; `folder` is for passing files. Products of `kinds_left_out`
    (`down_proj`) are not measured.
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
    found: dict[str, np.ndarray] = {}
    for feed in feeds:
        for name, values in zip(names, session.run(None, dict(feed)), strict=True):
            channels = np.abs(values).reshape(-1, values.shape[-1]).max(0, initial=0.0)
            found[name] = np.maximum(found[name], channels) if name in found else channels
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
