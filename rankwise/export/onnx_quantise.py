"""Integers in place of a graph's large weights; adapter inputs, and what is computed with them, stay fp32.

Weights (`int8`, `int4`): each row of a weight in blocks of BLOCK inputs with a scale of its own, symmetric, as ONNX
Runtime's MatMulNBits reads them; it quantises activations by the same blocks while it multiplies. The embedding is kept
in the same form, once for itself and a head that is tied to it.

Arithmetic (`int8-full`): int8 x int8 -> int32 with one scale for each output of a weight and one for each token of the
activations, measured as it runs (Yao et al. 2022, ZeroQuant, arXiv 2206.01861, section 4.1). One scale for a whole
activation tensor, which is what dynamic quantisation does elsewhere, loses the model: a few channels are a hundred
times larger than the rest (Dettmers et al. 2022, LLM.int8(), arXiv 2208.07339, section 4).

Legend: o outputs of a layer, n inputs, b blocks of a row.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float, UInt8
from onnx import ModelProto, NodeProto, TensorProto
from onnx.helper import get_attribute_value, make_node, make_opsetid
from onnx.numpy_helper import from_array, to_array

BLOCK = 32
DOMAIN = "com.microsoft"
INT8, INT4, FULL = "int8", "int4", "int8-full"
MAX_KL = {INT8: 0.02, INT4: 0.5, FULL: 0.1}
"""The largest KL(fp32 || quantised), nats a token on held-out text, that is kept unless asked otherwise."""
INT8_ARITHMETIC, FP32_ARITHMETIC = 4, 1
"""MatMulNBits' accuracy_level: activations in int8, by blocks, or as they are."""
HEAD_KIND, EMBEDDING_KIND = "lm_head", "embedding"


@dataclass(frozen=True)
class Linear:
    """A product with a constant weight: `weight` is its initializer, laid out [o, n] where `is_transposed`.

    `kind`: the last part of the layer's name (`q_proj`), `lm_head` for a head that is tied to the embedding.
    """

    node: NodeProto
    weight: str
    is_transposed: bool
    kind: str


def quantise_rows(
    weight: Float[np.ndarray, "o n"], bits: int
) -> tuple[UInt8[np.ndarray, "o b _"], Float[np.ndarray, "o b"]]:
    """Blocks of whole numbers around the middle of their range, and their scales: w = (q - 2 ** (bits - 1)) * scale.

    4 bits lie two in a byte, the lower half first; their scale makes the largest number of a block an end of the range.
    """
    rows, width = weight.shape
    num_blocks = -(-width // BLOCK)
    padded = np.zeros((rows, num_blocks * BLOCK), np.float32)
    padded[:, :width] = weight
    blocks = padded.reshape(rows, num_blocks, BLOCK)
    middle = 2 ** (bits - 1)
    if bits == 8:
        scales = np.abs(blocks).max(-1) / (middle - 1)
    else:
        largest = np.take_along_axis(blocks, np.abs(blocks).argmax(-1)[..., None], -1)[..., 0]
        scales = largest / -middle
    divisor = np.where(scales == 0, 1.0, scales)[..., None]
    numbers = np.clip(np.rint(blocks / divisor) + middle, 0, 2 * middle - 1).astype(np.uint8)
    if bits == 4:
        numbers = numbers[..., 0::2] | (numbers[..., 1::2] << 4)
    return numbers, scales.astype(np.float32)


def quantise_outputs(weight: Float[np.ndarray, "o n"]) -> tuple[np.ndarray, Float[np.ndarray, " o"]]:
    """int8 numbers [n, o] and a scale for each output."""
    scales = np.maximum(np.abs(weight).max(1), 1e-12) / 127.0
    numbers = np.clip(np.rint(weight / scales[:, None]), -127, 127).astype(np.int8)
    return np.ascontiguousarray(numbers.T), scales.astype(np.float32)


class Graph:
    """A model's graph while it is rewritten: who makes what, and constants by name."""

    def __init__(self, model: ModelProto, folder: Path) -> None:

        self.model, self.graph = model, model.graph
        self.folder = folder
        self.constants: dict[str, TensorProto] = {tensor.name: tensor for tensor in self.graph.initializer}
        self.makers: dict[str, NodeProto] = {name: node for node in self.graph.node for name in node.output}
        self.new_nodes: dict[int, list[NodeProto]] = {}
        self.count = 0

    def array(self, name: str) -> np.ndarray:
        """A constant's values, from wherever they lie."""
        return to_array(self.constants[name], str(self.folder))

    def constant(self, name: str, values: np.ndarray) -> str:
        """Adds a constant, once; its name."""
        if name not in self.constants:
            tensor = from_array(np.ascontiguousarray(values), name)
            self.constants[name] = tensor
            self.graph.initializer.append(tensor)
        return name

    def node(self, operator: str, inputs: Sequence[str], output: str | None = None, **attributes: Any) -> NodeProto:
        """A new node with one output, not placed yet."""
        self.count += 1
        domain = attributes.pop("domain", "")
        name = output or f"rankwise_{operator}_{self.count}"
        return make_node(
            operator, list(inputs), [name], name=f"rankwise_{operator}_{self.count}", domain=domain, **attributes
        )

    def replace(self, old: NodeProto, new: Iterable[NodeProto]) -> None:
        """Puts nodes where `old` stands."""
        self.new_nodes[id(old)] = list(new)

    def settle(self) -> None:
        """Carries the replacements out, and drops what nobody reads any more."""
        nodes: list[NodeProto] = []
        for node in self.graph.node:
            nodes.extend(self.new_nodes.get(id(node), [node]))
        while True:
            read = {name for node in nodes for name in node.input} | {value.name for value in self.graph.output}
            alive = [node for node in nodes if read.intersection(node.output)]
            if len(alive) == len(nodes):
                break
            nodes = alive
        constants = [tensor for tensor in self.constants.values() if tensor.name in read]
        copies = [NodeProto.FromString(node.SerializeToString()) for node in nodes]
        del self.graph.node[:]
        self.graph.node.extend(copies)
        tensors = [TensorProto.FromString(tensor.SerializeToString()) for tensor in constants]
        del self.graph.initializer[:]
        self.graph.initializer.extend(tensors)
        if not any(entry.domain == DOMAIN for entry in self.model.opset_import):
            self.model.opset_import.append(make_opsetid(DOMAIN, 1))


def find_linears(graph: Graph, skip: Sequence[str] = ()) -> list[Linear]:
    """Products with a constant matrix, in the graph's order; `skip`: names that are no constants (adapter inputs)."""
    found: list[Linear] = []
    for node in graph.graph.node:
        if node.op_type not in ("MatMul", "Gemm"):
            continue
        weight, transposed = node.input[1], False
        maker = graph.makers.get(weight)
        if maker is not None and maker.op_type == "Transpose" and maker.input[0] in graph.constants:
            weight, transposed = maker.input[0], True
        if weight in skip or weight not in graph.constants or len(graph.constants[weight].dims) != 2:
            continue
        if node.op_type == "Gemm":
            attributes = {entry.name: get_attribute_value(entry) for entry in node.attribute}
            if attributes.get("transA", 0) or attributes.get("alpha", 1.0) != 1.0 or attributes.get("beta", 1.0) != 1.0:
                continue
            transposed = transposed != bool(attributes.get("transB", 0))
        found.append(Linear(node, weight, transposed, kind_of(weight)))
    embeddings = {node.input[0] for node in graph.graph.node if node.op_type == "Gather"}
    return [
        Linear(linear.node, linear.weight, linear.is_transposed, HEAD_KIND) if linear.weight in embeddings else linear
        for linear in found
    ]


def kind_of(weight: str) -> str:
    """`q_proj` of `model.layers.0.self_attn.q_proj.base.weight`."""
    parts = [part for part in weight.split(".") if part not in ("weight", "base")]
    return parts[-1]


def quantise_weights(
    graph: Graph, linears: Sequence[Linear], bits: int, skip: Sequence[str] = (), exact: frozenset[str] = frozenset()
) -> None:
    """Puts MatMulNBits in place of each of `linears`, and a gather of the same numbers in place of an embedding's.

    A head and an embedding stay at 8 bits in a 4-bit model. `exact`: kinds whose activations stay fp32.
    """
    for linear in linears:
        width = 8 if linear.kind == HEAD_KIND else bits
        _replace_linear(graph, linear, width, FP32_ARITHMETIC if linear.kind in exact else INT8_ARITHMETIC)
    for node in graph.graph.node:
        if node.op_type == "Gather" and node.input[0] not in skip and _is_embedding(graph, node):
            _replace_gather(graph, node)


def _is_embedding(graph: Graph, node: NodeProto) -> bool:
    """Whether a gather picks rows of a table of words: one that is wide, whole blocks wide, and long."""
    table = graph.constants.get(node.input[0])
    if table is None or len(table.dims) != 2 or table.data_type != TensorProto.FLOAT:
        return False
    axis = next((entry.i for entry in node.attribute if entry.name == "axis"), 0)
    return axis == 0 and table.dims[1] % BLOCK == 0 and table.dims[0] > table.dims[1]


def _stored(graph: Graph, weight: str, is_transposed: bool, bits: int) -> tuple[str, str, int, int]:
    """Names of a weight's numbers and scales, added once, and its outputs and inputs."""
    rows, width = graph.constants[weight].dims if is_transposed else reversed(graph.constants[weight].dims)
    numbers, scales = f"{weight}.q{bits}", f"{weight}.scales{bits}"
    if numbers not in graph.constants:
        values = graph.array(weight)
        packed, factors = quantise_rows(values if is_transposed else values.T, bits)
        graph.constant(numbers, packed)
        graph.constant(scales, factors)
    return numbers, scales, rows, width


def _replace_linear(graph: Graph, linear: Linear, bits: int, level: int) -> None:
    numbers, scales, rows, width = _stored(graph, linear.weight, linear.is_transposed, bits)
    bias = linear.node.input[2] if len(linear.node.input) > 2 else None
    product = graph.node(
        "MatMulNBits", [linear.node.input[0], numbers, scales], None if bias else linear.node.output[0],
        domain=DOMAIN, K=width, N=rows, bits=bits, block_size=BLOCK, accuracy_level=level,
    )  # fmt: skip
    added = [graph.node("Add", [product.output[0], bias], linear.node.output[0])] if bias else []
    graph.replace(linear.node, [product, *added])


def _replace_gather(graph: Graph, node: NodeProto) -> None:
    """Rows of the table, made numbers again."""
    numbers, scales, _, width = _stored(graph, node.input[0], True, 8)
    middle = graph.constant("rankwise_middle", np.array(128.0, np.float32))
    last = graph.constant("rankwise_last", np.array([-1], np.int64))
    shape = graph.constant(f"rankwise_row_{width}", np.array([0, 0, width], np.int64))
    rows = graph.node("Gather", [numbers, node.input[1]], axis=0)
    floats = graph.node("Cast", [rows.output[0]], to=TensorProto.FLOAT)
    centred = graph.node("Sub", [floats.output[0], middle])
    factors = graph.node("Gather", [scales, node.input[1]], axis=0)
    wide = graph.node("Unsqueeze", [factors.output[0], last])
    scaled = graph.node("Mul", [centred.output[0], wide.output[0]])
    whole = graph.node("Reshape", [scaled.output[0], shape], node.output[0])
    graph.replace(node, [rows, floats, centred, factors, wide, scaled, whole])


def quantise_arithmetic(graph: Graph, linears: Sequence[Linear]) -> None:
    """Puts products of int8 numbers in place of `linears`: a scale for each token, one for each output."""
    quantised: dict[str, tuple[str, str, list[NodeProto]]] = {}
    for linear in linears:
        x = linear.node.input[0]
        first: list[NodeProto] = []
        if x not in quantised:
            numbers, scale, first = _token_numbers(graph, x)
            quantised[x] = numbers, scale, first
        numbers, scale, _ = quantised[x]
        graph.replace(linear.node, [*first, *_int8_product(graph, linear, numbers, scale)])


def _token_numbers(graph: Graph, x: str) -> tuple[str, str, list[NodeProto]]:
    """uint8 numbers around 128 and a scale for each token of `x` [..., n].

    Unsigned: x64 without VNNI adds pairs of signed products in 16 bits, which overflow.
    """
    last = graph.constant("rankwise_last", np.array([-1], np.int64))
    least = graph.constant("rankwise_least", np.array(1e-9, np.float32))
    most = graph.constant("rankwise_most", np.array(127.0, np.float32))
    middle = graph.constant("rankwise_middle", np.array(128.0, np.float32))
    size = graph.node("Abs", [x])
    largest = graph.node("ReduceMax", [size.output[0], last], keepdims=1)
    bounded = graph.node("Max", [largest.output[0], least])
    scale = graph.node("Div", [bounded.output[0], most])
    ratio = graph.node("Div", [x, scale.output[0]])
    whole = graph.node("Round", [ratio.output[0]])
    shifted = graph.node("Add", [whole.output[0], middle])
    numbers = graph.node("Cast", [shifted.output[0]], to=TensorProto.UINT8)
    nodes = [size, largest, bounded, scale, ratio, whole, shifted, numbers]
    return numbers.output[0], scale.output[0], nodes


def _int8_product(graph: Graph, linear: Linear, numbers: str, scale: str) -> list[NodeProto]:
    weight, factors = f"{linear.weight}.int8", f"{linear.weight}.factors"
    if weight not in graph.constants:
        values = graph.array(linear.weight)
        packed, scales = quantise_outputs(values if linear.is_transposed else values.T)
        graph.constant(weight, (packed.astype(np.int16) + 128).astype(np.uint8))
        graph.constant(factors, scales)
    middle = graph.constant("rankwise_zero", np.array(128, np.uint8))
    bias = linear.node.input[2] if len(linear.node.input) > 2 else None
    product = graph.node("MatMulInteger", [numbers, weight, middle, middle])
    floats = graph.node("Cast", [product.output[0]], to=TensorProto.FLOAT)
    by_token = graph.node("Mul", [floats.output[0], scale])
    by_output = graph.node("Mul", [by_token.output[0], factors], None if bias else linear.node.output[0])
    added = [graph.node("Add", [by_output.output[0], bias], linear.node.output[0])] if bias else []
    return [product, floats, by_token, by_output, *added]


def quantise(
    graph: Graph, precision: str, left_out: frozenset[str] = frozenset(), to_plain: bool = True,
    skip: Sequence[str] = (),
) -> None:  # fmt: skip
    """Rewrites the graph in `precision`, except layers of the kinds `left_out`, and settles it.

    Those stay fp32, or with `to_plain` false get 8-bit weights and keep their activations. `skip`: adapter inputs.
    """
    linears = find_linears(graph, skip)
    chosen = [linear for linear in linears if linear.kind not in left_out]
    if precision != FULL:
        quantise_weights(graph, chosen, {INT8: 8, INT4: 4}[precision], skip)
    else:
        by_weight = [
            linear for linear in linears if linear.kind == HEAD_KIND or (linear.kind in left_out and not to_plain)
        ]
        quantise_weights(graph, by_weight, 8, skip, left_out)
        quantise_arithmetic(graph, [linear for linear in chosen if linear.kind != HEAD_KIND])
    graph.settle()
