"""Engines without a GPU; the graphs that they are built from, in ONNX Runtime."""

from __future__ import annotations

import copy
from pathlib import Path

import numpy as np
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper

from rankwise.attach.inject import detach
from rankwise.errors import RequestError, WorkError
from rankwise.export import tensorrt_graph
from rankwise.export.certificate import probe_logits
from rankwise.export.onnx_folding import fold_constants
from rankwise.export.onnx_graph import CAUSAL, cache_shapes, export_graph
from rankwise.export.onnx_slots import read_adapter
from rankwise.export.tensorrt_graph import Limits, in_precision, input_shapes, largest_inputs, open_session, save_graph
from rankwise.recipes.export_tensorrt import LEFT_OUT, _Graph, _left_out, _Measured
from tests.export.gguf_models import attached, llama

PROBES = [list(range(3, 33)), list(range(100, 120))]
LIMITS = Limits(rows=2, context=32, rank=8)


@pytest.fixture(scope="module")
def traced(tmp_path_factory) -> tuple[_Graph, list[torch.Tensor]]:
    """A tiny model's graph with adapter inputs, and torch's logits with the adapter."""
    model = attached(llama())
    expected = probe_logits(model, PROBES)
    adapter = read_adapter(model, "tiny")
    plain = detach(model).eval()
    graph = export_graph(plain, CAUSAL, [adapter], tmp_path_factory.mktemp("graph"))
    assert fold_constants(graph.model) > 0
    return _Graph(graph.model, adapter.named(), cache_shapes(plain)), expected


def logits(model, graph: _Graph, folder: Path) -> list[np.ndarray]:
    session = open_session(model, folder / "x.onnx")
    return [session.run(["logits"], feed)[0][0] for feed in graph.feeds(PROBES)]


def farthest(found, expected) -> float:
    return max(float(np.abs(a - b.numpy()).max()) for a, b in zip(found, expected, strict=True))


def test_a_folded_graph_computes_what_torch_does(traced, tmp_path):
    graph, expected = traced
    assert farthest(logits(graph.model, graph, tmp_path), expected) < 1e-4
    kinds = {node.op_type for node in graph.model.graph.node}
    assert "Constant" not in kinds


@pytest.mark.parametrize(("dtype", "low", "high"), [("fp16", 1e-4, 0.1), ("bf16", 1e-3, 1.0)])
def test_products_in_a_narrower_type(traced, tmp_path, dtype, low, high):
    graph, expected = traced
    model = copy.deepcopy(graph.model)
    assert in_precision(model, tmp_path, dtype, list(graph.adapter), {}, emulated=True) == 15, (
        "seven in each layer, head"
    )
    assert low < farthest(logits(model, graph, tmp_path), expected) < high
    built = copy.deepcopy(graph.model)
    in_precision(built, tmp_path, dtype, list(graph.adapter), {})
    kind = {"fp16": TensorProto.FLOAT16, "bf16": TensorProto.BFLOAT16}[dtype]
    stored = [tensor for tensor in built.graph.initializer if tensor.data_type == kind]
    assert len(stored) == 15 and all(name in {v.name for v in built.graph.input} for name in graph.adapter)


def test_int8_by_explicit_quantisation(traced, tmp_path):
    graph, expected = traced
    largest = largest_inputs(graph.model, tmp_path, graph.feeds(PROBES[:1]), list(graph.adapter), LEFT_OUT)
    assert len(largest) == 12 and all((values > 0).any() for values in largest.values())
    assert not any("down_proj" in name for name in largest)
    model = copy.deepcopy(graph.model)
    in_precision(model, tmp_path, "fp16", list(graph.adapter), largest, emulated=True)
    operators = [node.op_type for node in model.graph.node]
    assert operators.count("QuantizeLinear") == 6, "q, k, v share an input, and so do gate and up"
    assert operators.count("DequantizeLinear") == 6 + 12
    assert 1e-3 < farthest(logits(model, graph, tmp_path), expected) < 10


def test_kinds_that_lose_most_are_left_out_until_the_bound_holds(traced, tmp_path):
    graph, expected = traced
    largest = largest_inputs(graph.model, tmp_path, graph.feeds(PROBES[:1]), list(graph.adapter), LEFT_OUT)
    measured = _Measured(graph, tmp_path, "int8", largest, PROBES, expected)
    whole = measured.difference(frozenset()).kl
    assert _left_out(measured, whole) == frozenset()
    chosen = _left_out(measured, 0.7 * whole)
    assert 0 < len(chosen) < 6 and measured.difference(chosen).kl <= 0.7 * whole


def test_smoothing_saves_the_small_channels(tmp_path, monkeypatch):
    """One channel of two hundred times the others': with one scale for all, these would be rounded away."""
    generator = np.random.default_rng(0)
    weight = generator.normal(size=(64, 32)).astype(np.float32)
    x = generator.normal(size=(1, 50, 64)).astype(np.float32)
    x[..., 7] *= 200
    value = helper.make_tensor_value_info
    nodes = [helper.make_node("Identity", ["x"], ["h"]), helper.make_node("MatMul", ["h", "w"], ["logits"])]
    shapes = value("x", TensorProto.FLOAT, [1, "t", 64]), value("logits", TensorProto.FLOAT, [1, "t", 32])
    graph = helper.make_graph(nodes, "g", [shapes[0]], [shapes[1]], [numpy_helper.from_array(weight, "w")])
    plain = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)
    largest = largest_inputs(plain, tmp_path, [{"x": x}], [], [])
    assert np.allclose(largest["w"], np.abs(x[0]).max(0))
    errors = {}
    for strength in (tensorrt_graph.STRENGTH, 0.0):
        monkeypatch.setattr(tensorrt_graph, "STRENGTH", strength)
        model = copy.deepcopy(plain)
        in_precision(model, tmp_path, "fp16", [], largest)
        [found] = open_session(model, tmp_path / f"{strength}.onnx").run(["logits"], {"x": x})
        errors[strength] = float(np.sqrt(np.mean((found - x @ weight) ** 2)))
    strong, none = errors.values()
    assert strong < 0.3 * none


def test_shapes_of_open_inputs(traced):
    graph, _ = traced
    shapes = input_shapes(graph.model, LIMITS)
    assert shapes["input_ids"] == ([1, 1], [1, 16], [2, 32])
    assert shapes["past_key_values.1.value"] == ([1, 2, 0, 16], [1, 2, 16, 16], [2, 2, 32, 16])
    assert shapes["attention_mask"] == ([1, 1], [1, 32], [2, 64])
    factor = "model.layers.0.self_attn.q_proj.lora_A"
    assert shapes[factor] == ([64, 0], [64, 8], [64, 8]) and set(graph.adapter) < set(shapes)


def test_folding_leaves_inputs_and_weights_alone():
    weight = numpy_helper.from_array(np.ones((4, 4), np.float32), "w")
    two = numpy_helper.from_array(np.array([2, 2], np.int64), "two")
    nodes = [
        helper.make_node("Concat", ["two", "two"], ["shape"], axis=0),
        helper.make_node("Reshape", ["x", "shape"], ["y"]),
        helper.make_node("Add", ["default", "w"], ["z"]),
    ]
    value = helper.make_tensor_value_info
    given = [value("x", TensorProto.FLOAT, [16]), value("default", TensorProto.FLOAT, [4, 4])]
    default = numpy_helper.from_array(np.zeros((4, 4), np.float32), "default")
    outputs = [value("y", TensorProto.FLOAT, [2, 2, 2, 2]), value("z", TensorProto.FLOAT, [4, 4])]
    model = helper.make_model(helper.make_graph(nodes, "g", given, outputs, [weight, two, default]))
    assert fold_constants(model) == 1
    assert [node.op_type for node in model.graph.node] == ["Reshape", "Add"], "a default may be overruled"
    assert numpy_helper.to_array(model.graph.initializer[-1]).tolist() == [2, 2, 2, 2]


# --- with the package; no GPU --------------------------------------------------------------------------------------


@pytest.mark.parametrize("precision", ["fp32", "fp16", "int8"])
def test_an_engine_with_lora_inputs_builds(traced, tmp_path, precision):
    pytest.importorskip("tensorrt_rtx")
    from rankwise.export.tensorrt_engine import CAPABILITIES, build_engine

    graph, _ = traced
    model = copy.deepcopy(graph.model)
    largest = {}
    if precision == "int8":
        largest = largest_inputs(model, tmp_path, graph.feeds(PROBES), list(graph.adapter), LEFT_OUT)
    if precision != "fp32":
        in_precision(model, tmp_path, "fp16", list(graph.adapter), largest)
    save_graph(model, tmp_path / "m.onnx")
    engine = build_engine(tmp_path / "m.onnx", tmp_path / "m.engine", input_shapes(model, LIMITS))
    assert engine.num_bytes == (tmp_path / "m.engine").stat().st_size > 10_000
    assert set(graph.adapter) < set(engine.open_inputs) and engine.capabilities == CAPABILITIES


def test_what_can_not_be_built_is_said(traced, tmp_path):
    pytest.importorskip("tensorrt_rtx")
    from rankwise.export.tensorrt_engine import build_engine

    graph, _ = traced
    save_graph(graph.model, tmp_path / "m.onnx")
    with pytest.raises(WorkError, match=r"could not build the engine: .*SM75"):
        build_engine(tmp_path / "m.onnx", tmp_path / "m.engine", input_shapes(graph.model, LIMITS), ["SM75"])
    (tmp_path / "torn.onnx").write_bytes(b"not a graph")
    with pytest.raises(WorkError, match=r"can't read the graph"):
        build_engine(tmp_path / "torn.onnx", tmp_path / "m.engine", {})
    assert not (tmp_path / "m.engine").exists()


def test_a_runner_needs_a_gpu(tmp_path):
    pytest.importorskip("tensorrt_rtx")
    from rankwise.export.tensorrt_runtime import MANIFEST, EngineModel

    with pytest.raises(RequestError, match="is no TensorRT export"):
        EngineModel(tmp_path)
    (tmp_path / MANIFEST).write_text("{}")
    if not torch.cuda.is_available():
        with pytest.raises(RequestError, match="this machine has none"):
            EngineModel(tmp_path)


@pytest.mark.gpu
def test_an_engine_computes_what_torch_does(tmp_path):
    pytest.importorskip("tensorrt_rtx")
    from rankwise.export.tensorrt_runtime import EngineModel
    from rankwise.recipes.export import export
    from rankwise.recipes.target import find_target, open_target
    from tests.recipes.test_export_gguf import a_run

    run = a_run(tmp_path)
    export(str(run), str(tmp_path / "engine"), "tensorrt", {"dtype": "fp32"}, device="cpu")
    model = open_target(find_target(str(run), device="cpu"), "fp32").model
    engine = EngineModel(tmp_path / "engine")
    expected = probe_logits(model, PROBES)
    for probe, wanted in zip(PROBES, expected, strict=True):
        torch.testing.assert_close(engine.logits(probe).cpu(), wanted, atol=2e-2, rtol=0)
    with torch.no_grad():
        row = torch.tensor([PROBES[0]])
        wanted = model.generate(row, max_new_tokens=8, do_sample=False)[0, row.shape[1] :].tolist()
    assert engine.generate(PROBES[0], 8) == wanted
