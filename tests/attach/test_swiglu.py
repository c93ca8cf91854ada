"""Fused SwiGLU MLPs: the stock forward's numbers, fewer bytes kept, and nothing left behind."""

from __future__ import annotations

import copy
import importlib
import inspect
import pickle
import re

import pytest
import torch
from torch import nn

from rankwise.adapters.config import LoraConfig
from rankwise.attach import swiglu
from rankwise.attach.inject import attach, detach, disabled, merge_in
from rankwise.attach.swiglu import MLPS, fuse_mlps, split_mlps
from rankwise.errors import RequestError
from rankwise.train.recompute import enable_gradient_checkpointing
from tests import tiny
from tests.adapters.test_fused import saved_bytes

FAMILIES = {"llama": tiny.llama, "qwen": tiny.qwen, "mistral": tiny.mistral, "cohere": tiny.cohere}
OPTIONS = {
    "lora": {},
    "dropout": {"lora_dropout": 0.3},
    "dora": {"use_dora": True},
    "pissa": {"init_lora_weights": "pissa"},
    "down alone": {"target_modules": ["down_proj"]},
}
STOCK = re.compile(
    r"(down_proj = self\.down_proj|return self\.down_proj)"
    r"\(self\.act_fn\(self\.gate_proj\((\w+)\)\) \* self\.up_proj\(\2\)\)\s*(return down_proj)?$"
)


def build(family="llama", dtype=torch.float32, **options):
    options = {"r": 4, "init_lora_weights": False, **options}
    return attach(FAMILIES[family]().to(dtype), LoraConfig(**options))


def gradients(model, ids):
    model.zero_grad()
    torch.manual_seed(1)
    loss = model(ids, labels=ids).loss
    loss.backward()
    return [loss.detach(), *(p.grad.clone() for p in model.parameters() if p.requires_grad)]


def replaced(model) -> int:
    return sum("forward" in vars(module) for module in model.modules() if type(module).__name__.endswith("MLP"))


@pytest.mark.parametrize("name", MLPS)
def test_the_table_is_of_stock_forwards(name):
    """Each class exists and its forward is that one expression."""
    module, kind = name.rsplit(".", 1)
    source = inspect.getsource(getattr(importlib.import_module(f"transformers.models.{module}"), kind).forward)
    assert STOCK.fullmatch(source.split(":\n", 1)[1].strip()), source


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_output_and_gradients_are_the_stock_forward_s(family, options, dtype):
    """To the last bit: the same operations on the same numbers."""
    model = build(family, dtype, **OPTIONS[options]).train()
    ids = tiny.token_ids()
    stock = gradients(model, ids)
    assert fuse_mlps(model) == replaced(model) == 2
    for mine, expected in zip(gradients(model, ids), stock, strict=True):
        assert torch.equal(mine, expected)


def test_the_gradients_are_the_formula_s_in_float64():
    x = [torch.randn(3, n, dtype=torch.float64, requires_grad=True) for n in (7, 7)]
    from tests.adapters.test_fused import parts

    _, W, b, A, B = parts(torch.float64)
    from rankwise.adapters.fused import Factors, lora_linear

    def mine(gate, up, b, A, B):
        return lora_linear(gate, W, b, Factors(A, B, 0.3, A.detach(), B.detach()), None, up)

    assert torch.autograd.gradcheck(mine, (*x, b, A, B))


def test_less_is_kept():
    model = build()
    before = saved_bytes(model)
    fuse_mlps(model)
    rows, width = 4 * 64, 48
    assert before - saved_bytes(model) == 2 * 2 * rows * width * 4, "of each of two MLPs: silu(gate) and the product"


@pytest.mark.parametrize("reentrant", [False, True])
def test_with_gradient_checkpointing(reentrant):
    model = build().train()
    ids = tiny.token_ids()
    stock = gradients(model, ids)
    fuse_mlps(model)
    if reentrant:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": True})
        model.enable_input_require_grads()
    else:
        enable_gradient_checkpointing(model)
    for mine, expected in zip(gradients(model, ids), stock, strict=True):
        assert torch.allclose(mine, expected, atol=1e-7)


def test_the_base_a_copy_and_the_plain_model():
    model, ids = build(), tiny.token_ids()
    expected, base = model(ids).logits, tiny.llama()(ids).logits
    fuse_mlps(model)
    with torch.no_grad():
        assert torch.equal(model(ids).logits, expected)
    with disabled(model):
        assert torch.equal(model(ids).logits, base)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        with torch.no_grad():
            twin.model.layers[0].mlp.down_proj.lora_B.zero_()
        assert not torch.equal(twin(ids).logits, expected) and torch.equal(model(ids).logits, expected)
    merged = merge_in(copy.deepcopy(model))
    assert replaced(merged) == 0 and torch.allclose(merged(ids).logits, expected, atol=1e-4)
    split_mlps(model)
    assert replaced(model) == 0
    fuse_mlps(model)
    assert replaced(detach(model)) == 0 and torch.equal(model(ids).logits, base)


def test_listeners_of_the_down_projection_get_its_input():
    model = build()
    fuse_mlps(model)
    seen = []
    model.model.layers[0].mlp.down_proj.register_forward_pre_hook(lambda module, inputs: seen.append(inputs))
    model(tiny.token_ids())
    assert len(seen) == 1 and len(seen[0]) == 1 and seen[0][0].shape[-1] == 48


def test_generation_and_autocast():
    model, ids = build(), tiny.token_ids(rows=1)
    expected = model.generate(ids, max_new_tokens=6, do_sample=False)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        cast = model(ids).logits
    fuse_mlps(model)
    assert torch.equal(model.generate(ids, max_new_tokens=6, do_sample=False), expected)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(model(ids).logits, cast)


@pytest.mark.parametrize(
    ("model", "options"),
    [
        (tiny.gpt2, {}),
        (tiny.gemma2, {}),  # GELU
        (tiny.llama, {"target_modules": ["q_proj"]}),
        (lambda: tiny.llama(hidden_act="gelu"), {}),
    ],
    ids=["another class", "another class with gates", "down is not adapted", "another activation"],
)
def test_nothing_to_fuse(model, options):
    model = attach(model(), LoraConfig(r=2, **options))
    assert fuse_mlps(model, required=False) == 0
    with pytest.raises(RequestError, match=r"no SwiGLU MLP .* set it to auto or false"):
        fuse_mlps(model)
    with pytest.raises(RequestError, match="no adapter is attached"):
        fuse_mlps(detach(model))


def test_a_forward_that_does_more_is_refused(monkeypatch, caplog):
    """A release of transformers that changes a class of the table is found out, output or gradient alone."""
    kind = type(tiny.llama().model.layers[0].mlp)
    stock = kind.forward
    for change in (lambda y: y * 1.1, lambda y: y + (y.detach() - y) * 0.2):
        monkeypatch.setattr(kind, "forward", lambda self, x, change=change: change(stock(self, x)))
        model = build()
        with pytest.raises(RequestError, match="LlamaMLP computes something else here; set it to auto or false"):
            fuse_mlps(model)
        assert fuse_mlps(model, required=False) == replaced(model) == 0
        assert "LlamaMLP computes something else than a SwiGLU MLP here" in caplog.text


def test_replaced_forwards_stay():
    """Offloading replaces them too."""
    model = build()
    own = nn.Module.forward
    vars(model.model.layers[0].mlp)["forward"] = own
    assert fuse_mlps(model) == 1 and vars(model.model.layers[0].mlp)["forward"] is own
    split_mlps(model)
    assert vars(model.model.layers[0].mlp)["forward"] is own


@pytest.mark.unchecked
def test_one_graph_under_compile():
    torch._dynamo.reset()
    model = attach(tiny.llama(num_hidden_layers=1).bfloat16(), LoraConfig(r=4, init_lora_weights=False))
    ids = tiny.token_ids()
    fuse_mlps(model)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    found, expected = compiled(ids).logits, model(ids).logits
    assert (found - expected).abs().max() <= 0.03 * expected.abs().max()
    assert swiglu.swiglu_forward is vars(model.model.layers[0].mlp)["forward"].func
