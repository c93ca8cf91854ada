"""Graphs of tiny models through ONNX Runtime: adapters as inputs, the cache, copied layers, the library's traps."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch

import rankwise as rw
from rankwise.adapters.config import LoraConfig
from rankwise.attach.inject import adapter_parameters, attach
from rankwise.errors import RequestError, WorkError
from rankwise.export.onnx_adapters import write_adapter
from rankwise.export.onnx_defaults import add_defaults, check_inputs, save_graph
from rankwise.export.onnx_graph import export_graph
from rankwise.export.onnx_layers import TRACED, equal_layers
from rankwise.export.onnx_quantise import FULL, INT4, INT8, Graph, find_linears, quantise, quantise_rows
from rankwise.export.onnx_runtime import session_of
from rankwise.export.onnx_slots import AdapterTensors, base_sha256, evened_out, read_adapter
from tests import tiny

IDS = tiny.token_ids(2, 9)


def attached(model, seed: int = 0, **fields):
    """With an adapter that changes something."""
    torch.manual_seed(seed)
    attach(model, LoraConfig(**{"r": 3, "lora_alpha": 6, **fields}))
    with torch.no_grad():
        for parameter in adapter_parameters(model).values():
            parameter.add_(0.1 * torch.randn(parameter.shape))
    return model


@torch.no_grad()
def logits(model) -> np.ndarray:
    return model(IDS).logits.numpy()


class Exported:
    """A tiny Llama of more layers than are traced, with adapters of two ranks, as a graph."""

    def __init__(self, root: Path) -> None:
        self.model = tiny.llama(tied=True, num_hidden_layers=TRACED + 2, initializer_range=0.2)
        self.base = logits(self.model)
        self.adapters: dict[str, AdapterTensors] = {}
        self.wanted: dict[str, np.ndarray] = {}
        for name, rank, targets in (("one", 1, "all-linear"), ("five", 5, ["q_proj", "down_proj"])):
            only = {"layers_to_transform": [0, 4]} if name == "five" else {}
            attached(self.model, seed=rank, r=rank, target_modules=targets, **only)
            self.adapters[name], self.wanted[name] = read_adapter(self.model, name), logits(self.model)
            rw.detach(self.model)
        self.traced = export_graph(self.model, "causal-lm", list(self.adapters.values()), root)
        self.plain = root / "plain.onnx"
        save_graph(self.traced.model, self.plain)
        self.defaults = {name: tensor.numpy() for name, tensor in self.traced.defaults.items()}
        self.file = root / "model.onnx"
        add_defaults(self.traced.model, self.defaults)
        save_graph(self.traced.model, self.file)
        self.session = session_of(self.file, 1)
        for name, adapter in self.adapters.items():
            write_adapter(adapter, root / f"{name}.onnx_adapter", 7)
        self.root = root

    def adapter(self, name: str) -> onnxruntime.LoraAdapter:
        adapter = onnxruntime.LoraAdapter()
        adapter.Load(str(self.root / f"{name}.onnx_adapter"))
        return adapter

    def with_adapters(self, *names: str) -> onnxruntime.RunOptions:
        options = onnxruntime.RunOptions()
        self.kept = [self.adapter(name) for name in names]
        for adapter in self.kept:
            options.add_active_adapter(adapter)
        return options


@pytest.fixture(scope="module")
def exported(tmp_path_factory) -> Exported:
    return Exported(tmp_path_factory.mktemp("graph"))


def feeds(session, ids=IDS, cache=None) -> dict[str, np.ndarray]:
    found = {
        node.name: np.zeros((ids.shape[0], node.shape[1], 0, node.shape[3]), np.float32)
        for node in session.get_inputs()
        if node.name.startswith("past_key_values.")
    }
    found.update(cache or {})
    past = next(iter(found.values())).shape[2]
    mask = np.ones((ids.shape[0], past + ids.shape[1]), np.int64)
    return {
        **found, "input_ids": ids.numpy(), "attention_mask": mask, "logit_positions": np.arange(ids.shape[1]),
    }  # fmt: skip


def first(session, options=None, **more) -> np.ndarray:
    return session.run(["logits"], {**feeds(session), **more}, options)[0]


def test_without_an_adapter_it_is_the_base(exported):
    assert np.abs(first(exported.session) - exported.base).max() < 2e-5


@pytest.mark.parametrize("name", ["one", "five"])
def test_an_adapter_file_of_any_rank_is_the_adapter(exported, name):
    """`one` is on every layer, `five` on two kinds in two layers: the others stay at rank 0."""
    found = first(exported.session, exported.with_adapters(name))
    assert np.abs(found - exported.wanted[name]).max() < 2e-5
    assert np.abs(exported.wanted[name] - exported.base).max() > 0.1


def test_token_by_token_through_the_cache_is_the_whole_row(exported):
    session, options, cache = exported.session, exported.with_adapters("one"), {}
    outputs = [node.name for node in session.get_outputs()]
    for place in range(IDS.shape[1]):
        given = feeds(session, IDS[:, place : place + 1], cache)
        found = dict(zip(outputs, session.run(outputs, given, options), strict=True))
        cache = {
            name.replace("present.", "past_key_values."): value for name, value in found.items() if name != "logits"
        }
        assert np.abs(found["logits"][:, 0] - exported.wanted["one"][:, place]).max() < 2e-5


def test_rows_padded_on_the_left_are_the_rows_alone(exported):
    session = exported.session
    given = feeds(session)
    given["attention_mask"][0, :4] = 0
    found = session.run(["logits"], given)[0][0, 4:]
    alone = session.run(["logits"], feeds(session, IDS[:1, 4:]))[0][0]
    assert np.abs(found - alone).max() < 2e-5


def test_layers_that_were_not_traced_are_copies(exported):
    assert equal_layers(exported.model) is not None and exported.model.config.num_hidden_layers == TRACED + 2
    names = [node.name for node in exported.traced.model.graph.node]
    assert any(name.endswith(f".layer{TRACED + 1}") for name in names), "the last layer is a copy of the third"
    inputs = [node.name for node in exported.session.get_inputs()]
    assert inputs[-1] == f"past_key_values.{TRACED + 1}.value"


def test_layers_that_are_not_alike_are_all_traced():
    model = tiny.llama(num_hidden_layers=TRACED + 1)
    assert equal_layers(model) is not None
    model.model.layers[2].mlp.act_fn = torch.nn.ReLU()
    assert equal_layers(model) is None
    assert equal_layers(tiny.llama()) is None, "too few to gain by copying"


def test_nothing_of_this_machine_is_in_the_graph(exported):
    assert b"site-packages" not in exported.file.read_bytes() and b"/rankwise/" not in exported.file.read_bytes()


# --- traps of ONNX Runtime: if one of these fails, the library has changed -----------------------------------------


def test_trap_of_two_active_adapters_the_first_wins_silently(exported):
    found = first(exported.session, exported.with_adapters("one", "five"))
    assert np.abs(found - exported.wanted["one"]).max() < 2e-5


def test_trap_io_binding_leaves_adapters_out(exported):
    binding = exported.session.io_binding()
    for name, value in feeds(exported.session).items():
        binding.bind_cpu_input(name, np.ascontiguousarray(value))
    binding.bind_output("logits")
    exported.session.run_with_iobinding(binding, exported.with_adapters("one"))
    assert np.abs(binding.copy_outputs_to_cpu()[0] - exported.base).max() < 2e-5


def test_trap_adapter_inputs_without_a_default_are_refused(exported):
    session = session_of(exported.plain, 1)
    with pytest.raises(ValueError, match="Required inputs"):
        first(session, exported.with_adapters("one"))


def test_trap_a_rewriting_that_takes_defaults_for_constants_is_found(exported):
    """As quantisers do: rank 0 is baked in, and the adapter would have no effect."""
    model = onnx.load(str(exported.file), load_external_data=False)
    name = exported.traced.adapter_inputs[0]
    check_inputs([model], exported.traced.adapter_inputs)
    model.graph.input.remove(next(value for value in model.graph.input if value.name == name))
    with pytest.raises(WorkError, match=r"has lost 1 of its \d+ adapter inputs \('.*lora_A'\)"):
        check_inputs([model], exported.traced.adapter_inputs)


# --- fewer bits ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bits", [8, 4])
def test_quantised_rows_against_float64(bits):
    weight = torch.randn(7, 80, generator=torch.Generator().manual_seed(0)).numpy()
    weight[2, :32] = 0.0
    numbers, scales = quantise_rows(weight, bits)
    assert numbers.shape == (7, 3, 32 * bits // 8) and scales.shape == (7, 3)
    if bits == 4:
        numbers = np.stack([numbers & 15, numbers >> 4], -1).reshape(7, 3, 32)
    again = ((numbers.astype(np.float64) - 2 ** (bits - 1)) * scales[..., None]).reshape(7, 96)[:, :80]
    padded = np.abs(np.pad(weight, ((0, 0), (0, 16))).reshape(7, 3, 32)).max(-1)
    step = np.repeat(padded / (2 ** (bits - 1) - 1), 32, axis=1)[:, :80]
    assert (np.abs(again - weight) <= step * (0.5 if bits == 8 else 1.0) + 1e-6).all()
    assert (again[2, :32] == 0).all()


@pytest.mark.parametrize(("precision", "largest"), [(INT8, 0.08), (INT4, 0.6), (FULL, 0.12)])
def test_a_quantised_graph_is_near_and_keeps_its_adapters(exported, tmp_path, precision, largest):
    model = onnx.load(str(exported.plain), load_external_data=False)
    graph = Graph(model, exported.root)
    kinds = {linear.kind for linear in find_linears(graph, exported.traced.adapter_inputs)}
    assert kinds == {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj", "lm_head"}
    quantise(graph, precision, skip=exported.traced.adapter_inputs)
    add_defaults(model, exported.defaults)
    check_inputs([model], exported.traced.adapter_inputs)
    onnx.external_data_helper.load_external_data_for_model(model, str(exported.root))
    save_graph(model, tmp_path / "model.onnx")
    session = session_of(tmp_path / "model.onnx", 1)
    assert 1e-4 < np.abs(first(session) - exported.base).mean() < largest, "of logits of size 1"
    for name in exported.adapters:
        assert np.abs(first(session, exported.with_adapters(name)) - exported.wanted[name]).mean() < largest
    effect = first(session, exported.with_adapters("one")) - first(session)
    assert np.abs(effect - (exported.wanted["one"] - exported.base)).mean() < largest, "the adapter is not quantised"
    sizes = [file.stat().st_size for file in (tmp_path / "model.onnx.data", exported.root / "plain.onnx.data")]
    assert sizes[0] < 0.4 * sizes[1], "the embedding that the head is tied to is there once, in 8 bits"


def test_a_kind_that_is_left_out_stays_as_it_was(exported):
    model = onnx.load(str(exported.plain), load_external_data=False)
    quantise(Graph(model, exported.root), INT8, frozenset({"down_proj"}), skip=exported.traced.adapter_inputs)
    kept = [linear.kind for linear in find_linears(Graph(model, exported.root), exported.traced.adapter_inputs)]
    assert set(kept) == {"down_proj"}


def test_what_is_left_out_of_int8_arithmetic_keeps_its_activations(exported):
    model = onnx.load(str(exported.plain), load_external_data=False)
    skip = exported.traced.adapter_inputs
    quantise(Graph(model, exported.root), FULL, frozenset({"down_proj"}), to_plain=False, skip=skip)
    levels = {
        node.input[1]: next(entry.i for entry in node.attribute if entry.name == "accuracy_level")
        for node in model.graph.node
        if node.op_type == "MatMulNBits"
    }
    assert {level for weight, level in levels.items() if "down_proj" in weight} == {1}
    assert {level for weight, level in levels.items() if "down_proj" not in weight} == {4}, "the head"
    assert sum(node.op_type == "MatMulInteger" for node in model.graph.node) == 6 * (TRACED + 2)


# --- adapters that can't be switched -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "what"),
    [({"use_dora": True}, "is DoRA"), ({"trainable_token_indices": [1, 2]}, "is trained token rows")],
)
def test_what_is_not_low_rank_is_refused_with_the_way_out(fields, what):
    with pytest.raises(RequestError, match=rf"adapter 'mine' {what}: .*; export it with --merged"):
        read_adapter(attached(tiny.llama(), **fields), "mine")


def test_pissa_and_patterns_are_plain_factors_of_twice_the_rank():
    model = attached(tiny.llama(), init_lora_weights="pissa", rank_pattern={"q_proj": 2})
    found = read_adapter(model, "mine")
    layer = model.model.layers[0].self_attn.q_proj
    down, up = found.factors["model.layers.0.self_attn.q_proj"]
    assert down.shape == (32, 4) and up.shape == (4, 32)
    assert torch.allclose((down @ up).T, layer.delta_weight(), atol=1e-6)


def test_the_bases_hash_sees_every_number():
    model = tiny.llama()
    before = base_sha256(dict(model.named_parameters()))
    assert base_sha256(dict(tiny.llama().named_parameters())) == before
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[3, 4] += 1e-6
    assert base_sha256(dict(model.named_parameters())) != before


@pytest.mark.slow
@pytest.mark.parametrize("family", ["qwen", "mistral", "gpt2", "gemma3"])
def test_other_families(family, tmp_path):
    """Biases, sliding windows, Conv1D, layers of two kinds; rows longer than the window of 8."""
    model = tiny.CAUSAL_LMS[family]()
    base = logits(model)
    attached(model)
    adapter, wanted = read_adapter(model, family), logits(model)
    rw.detach(model)
    traced = export_graph(model, "causal-lm", [adapter], tmp_path)
    add_defaults(traced.model, {name: tensor.numpy() for name, tensor in traced.defaults.items()})
    save_graph(traced.model, tmp_path / "model.onnx")
    session = session_of(tmp_path / "model.onnx", 1)
    assert np.abs(first(session) - base).max() < 2e-5
    given = {name: tensor.numpy() for name, tensor in adapter.named().items()}
    assert np.abs(first(session, **given) - wanted).max() < 2e-5


def test_layers_that_some_adapters_leave_out_are_evened_out():
    pair = torch.zeros(32, 2), torch.zeros(2, 48)
    adapter = AdapterTensors({"model.layers.1.mlp.up_proj": pair, "lm_head": pair}, {})
    names = [f"model.layers.{number}.mlp.up_proj" for number in range(4)]
    found = evened_out([*names, "lm_head"], "model.layers", 4, [adapter])
    assert list(found.factors) == [names[0], names[2], names[3]] and set(found.ranks) == {0}
