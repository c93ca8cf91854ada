"""The fused layer on weights in 8 and 4 bits against plain autograd of the same formula, and what it keeps."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from rankwise import quantized
from rankwise.adapters.config import LoraConfig
from rankwise.adapters.dropout import keep_rule, kept_entries, spread
from rankwise.adapters.fused import Factors, lora_linear
from rankwise.attach.inject import adapter_layers, attach
from tests import bits, tiny
from tests.attach.peft_cases import randomise
from tests.bits import STORAGES
from tests.test_quantized import layer, relative

storages = pytest.mark.parametrize("storage", STORAGES)
SCALE = 1.7


def parts(dtype: torch.dtype, shape: tuple[int, ...] = (3, 5)) -> list[torch.Tensor]:
    x = torch.randn(*shape, 64, dtype=dtype, requires_grad=True)
    return [x, torch.randn(4, 64, requires_grad=True), torch.randn(96, 4, requires_grad=True)]


def copies(tensors: list[torch.Tensor]) -> list[torch.Tensor]:
    return [tensor.detach().clone().requires_grad_() for tensor in tensors]


def fused(base: nn.Module, x: torch.Tensor, A: torch.Tensor, B: torch.Tensor, dropout: float = 0.0) -> torch.Tensor:
    factors = Factors(A, B, SCALE, A.detach().to(x.dtype), B.detach().to(x.dtype))
    bias = base.bias if base.bias is None else base.bias.to(x.dtype)
    return lora_linear(x, base, bias, factors, keep_rule(dropout) if dropout else None)


def formula(base: nn.Module, x: torch.Tensor, A: torch.Tensor, B: torch.Tensor, kept=None) -> torch.Tensor:
    bias = base.bias if base.bias is None else base.bias.to(x.dtype)
    y = F.linear(x, quantized.dense_weight(base, x.dtype), bias)
    return y + SCALE * F.linear(F.linear(x if kept is None else kept(x), A.to(x.dtype)), B.to(x.dtype))


@storages
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_output_and_gradients_equal_the_formula(storage, bias, dtype):
    base, mine = layer(storage, bias, dtype).train(), parts(dtype)
    theirs = copies(mine)
    upstream = torch.randn(3, 5, 96, dtype=dtype)
    y, wanted = fused(base, *mine), formula(base, *theirs)
    bound = 1e-5 if dtype == torch.float32 else 0.02
    assert y.dtype == dtype and relative(y, wanted) < bound
    y.backward(upstream)
    wanted.backward(upstream)
    for a, b in zip(mine, theirs, strict=True):
        assert a.grad.dtype == a.dtype and relative(a.grad, b.grad) < bound
    with torch.no_grad():
        quantized.compute_by_weight(base)
        quantized.keep_unpacked(base)
        assert relative(fused(base.eval(), *mine), wanted) < bound


@storages
def test_dropout(storage):
    base, mine = layer(storage).train(), parts(torch.float32)
    theirs = copies(mine)
    rule = keep_rule(0.25)
    torch.manual_seed(3)
    y = fused(base, *mine, dropout=0.25)
    torch.manual_seed(3)
    mask = kept_entries(mine[0].numel(), rule, torch.device("cpu"))
    ones = spread(mask, torch.ones(15, 64)).bool().view(3, 5, 64) / rule.probability
    wanted = formula(base, *theirs, kept=lambda x: x * ones)
    assert relative(y, wanted) < 1e-5
    y.square().sum().backward()
    wanted.square().sum().backward()
    for a, b in zip(mine, theirs, strict=True):
        assert relative(a.grad, b.grad) < 1e-4


@storages
def test_it_keeps_neither_the_weight_nor_the_output(storage):
    base, (x, A, B) = layer(storage, bias=False).train(), parts(torch.float32, (50,))
    kept: list[torch.Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        fused(base, x, A, B)
    once = {t.data_ptr(): t.numel() for t in kept}  # the factors are kept as they are, and as what was computed with
    assert sorted(once.values()) == sorted([x.numel(), 50 * 4, A.numel(), B.numel()])


@storages
def test_attached_layers_take_it_unless_somebody_listens(storage):
    model = attach(bits.llama(storage), LoraConfig(r=4, target_modules=["q_proj"])).train()
    randomise(model)
    one = model.model.layers[0].self_attn.q_proj
    x = torch.randn(2, 64, requires_grad=True)
    assert "LoraLinear" in type(one(x).grad_fn.next_functions[0][0]).__name__
    wanted = one(x).detach()
    one.base.register_forward_hook(lambda module, arguments, output: output * 2)
    y = one(x)
    assert "LoraLinear" not in str(y.grad_fn) and not torch.allclose(y, wanted)
    if storage == "8bit":
        other = model.model.layers[1].self_attn.q_proj.eval()
        assert "LoraLinear" not in str(other(x).grad_fn), "on its own it rounds activations in evaluation"


@storages
def test_layers_that_read_one_tensor_share_its_projection(storage):
    model = attach(bits.llama(storage, torch.bfloat16), LoraConfig(r=4, target_modules="all-linear"))
    groups = {
        tuple(name for name, other in adapter_layers(model).items() if other in one.readers.layers)
        for one in adapter_layers(model).values()
        if one.readers is not None
    }
    assert sorted(len(group) for group in groups) == [2, 2, 3, 3]
    randomise(model)
    with torch.no_grad():
        shared = model.train()(tiny.token_ids()).logits
        for one in adapter_layers(model).values():
            one.readers = None
        assert relative(shared.float(), model(tiny.token_ids()).logits.float()) < 0.01
