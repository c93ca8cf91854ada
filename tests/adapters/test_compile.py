"""torch.compile sees one graph through every adapter layer, and finds the gradients of the eager layer."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from rankwise.adapters.config import LoraConfig
from rankwise.adapters.gate_config import GateConfig
from rankwise.attach.gates import attach_embedding, attach_gate, set_task
from rankwise.attach.inject import attach
from tests import tiny

pytestmark = pytest.mark.unchecked
OPTIONS = {"lora": {}, "dora": {"use_dora": True}, "dropout": {"lora_dropout": 0.5}}


def build(dtype, **options):
    torch._dynamo.reset()
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 24), nn.GELU(), nn.Linear(24, 8, bias=False)).to(dtype)
    config = LoraConfig(r=4, init_lora_weights=False, target_modules=["0", "2"], **options)
    return attach(model, config).train()


def gradients(model, run, x):
    model.zero_grad()
    y = run(x)
    y.float().square().mean().backward()
    return [y.detach(), *(p.grad.clone() for p in model.parameters() if p.requires_grad)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("options", OPTIONS)
def test_one_graph_forward_and_backward(dtype, options):
    """Compiled, dropout follows another random stream: there that entries are dropped is all that can be said."""
    model = build(dtype, **OPTIONS[options])
    x = torch.randn(5, 16, dtype=dtype)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    expected, found = gradients(model, model, x), gradients(model, compiled, x)
    assert all(bool(grad.abs().sum() > 0) for grad in found)
    if options == "dropout":
        assert not torch.equal(compiled(x), compiled(x))
        model.eval()
    else:
        for a, b in zip(found, expected, strict=True):
            assert (a - b).abs().max() <= (1e-5 if dtype == torch.float32 else 0.06) * b.abs().max()
    with torch.no_grad():
        assert torch.allclose(compiled(x), model(x), rtol=1e-5 if dtype == torch.float32 else 0.05, atol=1e-2)


def test_a_language_model_is_one_graph():
    torch._dynamo.reset()
    model = attach(tiny.llama(num_hidden_layers=1).bfloat16(), LoraConfig(r=4, init_lora_weights=False))
    ids = tiny.token_ids()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    found, expected = compiled(ids).logits, model(ids).logits
    assert (found - expected).abs().max() <= 0.03 * expected.abs().max()


@pytest.mark.parametrize("mode", ["task", "rows", "soft", "vectors"])
def test_a_gate_is_one_graph(mode):
    """One task, a task for each row, a learned mixture, task embeddings: forward, and gradients of what is trained."""
    torch._dynamo.reset()
    torch.manual_seed(0)
    config = LoraConfig(r=4, init_lora_weights=False, target_modules=["q_proj", "down_proj"])
    base = tiny.llama(num_hidden_layers=1)
    if mode == "vectors":
        model = attach_embedding(base, config, ["a", "b"])
    else:
        model = attach_gate(base, {"a": config, "b": config}, GateConfig("soft" if mode == "soft" else "hard"))
    set_task(model, {"task": "a", "rows": ["a", "b"], "soft": None, "vectors": "b"}[mode])
    ids = torch.randint(0, 250, (2, 20))  # more tokens than rows are counted by

    def run(of):
        model.zero_grad()
        logits = of(ids).logits
        logits.float().square().mean().backward()
        return [logits.detach(), *(p.grad.clone() for p in model.parameters() if p.grad is not None)]

    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    expected, found = run(model), run(compiled)
    assert len(found) == len(expected) > 4
    for a, b in zip(found, expected, strict=True):
        assert (a - b).abs().max() <= 1e-4 * max(float(b.abs().max()), 1e-6)
    if mode == "task":
        set_task(model, "b")
        with torch.no_grad():
            other = compiled(ids).logits
            assert torch.allclose(other, model(ids).logits, atol=1e-5), "another task is another graph"
            assert not torch.allclose(other, expected[0], atol=1e-3)


@pytest.mark.slow
@pytest.mark.parametrize("options", OPTIONS)
def test_inductor_makes_one_graph_too(options):
    model = build(torch.float32, **OPTIONS[options])
    compiled = torch.compile(model, fullgraph=True)
    assert all(bool(grad.isfinite().all()) for grad in gradients(model, compiled, torch.randn(5, 16)))
