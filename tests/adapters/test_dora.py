"""DoRA against its formula written out in float64, and how often its norm is formed."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from rankwise.adapters.config import LoraConfig
from rankwise.adapters.dora import DoraLayer
from rankwise.attach.inject import attach, merge_in
from rankwise.train.recompute import enable_gradient_checkpointing
from tests import tiny


def build(layer: nn.Module, **options) -> DoraLayer:
    config = LoraConfig(r=4, use_dora=True, init_lora_weights=False, target_modules=["0"], **options)
    found = attach(nn.Sequential(layer), config)[0]
    with torch.no_grad():
        found.magnitude.mul_(torch.rand_like(found.magnitude) + 0.5)
    return found


def formula(layer: DoraLayer, x: torch.Tensor):
    """The paper's equation 5 in float64, the norm constant; leaves in the order x, A, B, m."""
    leaves = [t.detach().double().requires_grad_() for t in (x, layer.lora_A, layer.lora_B, layer.magnitude)]
    wide, A, B, m = leaves
    directed = layer.kind.matrix(layer.weight.detach()).double() + layer.scale * B @ A
    y = wide @ (m[:, None] * directed / directed.detach().norm(dim=1, keepdim=True)).T
    return (y if layer.bias is None else y + layer.bias.detach().double()), leaves


LAYERS = {
    "linear": lambda: nn.Linear(12, 8),
    "no bias": lambda: nn.Linear(12, 8, bias=False),
    "Conv1D": lambda: Conv1D(8, 12),
}


@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_output_and_gradients_are_the_paper_s(kind, dtype):
    layer = build(LAYERS[kind]().to(dtype))
    x = torch.randn(3, 5, 12, dtype=dtype, requires_grad=True)
    y, (expected, leaves) = layer(x), formula(layer, x)
    grad = torch.randn_like(y)
    found = torch.autograd.grad(y, (x, layer.lora_A, layer.lora_B, layer.magnitude), grad)
    exact = torch.autograd.grad(expected, leaves, grad.double())
    tolerance = 0.03 if dtype == torch.bfloat16 else 1e-5
    for a, b in zip([y, *found], [expected, *exact], strict=True):
        assert (a - b).abs().max() <= tolerance * b.abs().max()
    assert all(tensor.dtype == torch.float32 for tensor in found[1:])


def test_small_steps_of_the_magnitude_show_in_bf16():
    """A gain of 1.003 would be 1 when rounded to bf16: on the mean of many outputs its effect must be there."""
    layer = attach(
        nn.Sequential(nn.Linear(64, 400, bias=False).bfloat16()),
        LoraConfig(r=2, use_dora=True, target_modules=["0"]),
    )[0]
    x = torch.randn(200, 64).bfloat16()
    before = layer(x).double()
    with torch.no_grad():
        layer.magnitude.mul_(1.003)
    after = layer(x).double()
    assert float((after * before).sum() / (before * before).sum()) == pytest.approx(1.003, abs=5e-4)


def test_the_norm_is_formed_once_a_step(monkeypatch):
    formed = []
    norm = DoraLayer._norm
    monkeypatch.setattr(DoraLayer, "_norm", lambda self: formed.append(self) or norm(self))
    model = attach(tiny.llama(), LoraConfig(r=4, use_dora=True)).train()
    enable_gradient_checkpointing(model)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.05)
    layers = [layer for layer in model.modules() if isinstance(layer, DoraLayer)]
    ids = tiny.token_ids()
    for _ in range(3):
        formed.clear()
        loss = model(ids, labels=ids).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        assert len(formed) == len(layers) == len(set(formed))
    with torch.no_grad():
        formed.clear()
        model.eval()
        expected = model(ids).logits
        assert torch.equal(model(ids).logits, expected)
        assert len(formed) == len(layers)
        layers[0].lora_B.add_(1.0)
        assert not torch.equal(model(ids).logits, expected)
        assert formed[len(layers) :] == [layers[0]]


def test_the_norm_follows_what_writes_past_the_version_counter():
    layer = build(nn.Linear(12, 8))
    x = torch.randn(3, 12)
    layer(x).sum().backward()
    layer.lora_B.data.mul_(3.0)
    assert torch.allclose(layer(x), formula(layer, x)[0].float(), atol=1e-4)


@pytest.mark.parametrize("kind", LAYERS)
def test_an_output_without_weights_stays_as_it_is(kind):
    """Its norm is zero, and zero by zero is no number: PEFT gives nan for the whole output."""
    layer = LAYERS[kind]()
    with torch.no_grad():
        (layer.weight.T if isinstance(layer, Conv1D) else layer.weight)[2] = 0
    x = torch.randn(5, 12)
    base = layer(x).detach()
    found = attach(nn.Sequential(layer), LoraConfig(r=4, use_dora=True, target_modules=["0"]))
    assert torch.equal(found(x), base)
    optimizer = torch.optim.SGD([p for p in found.parameters() if p.requires_grad], lr=0.1)
    for _ in range(2):
        found(x).square().sum().backward()
        optimizer.step()
    out = found(x).detach()
    assert out.isfinite().all() and torch.equal(out[:, 2], base[:, 2]) and not torch.equal(out, base)
    assert torch.allclose(merge_in(found)(x), out, atol=1e-5)
