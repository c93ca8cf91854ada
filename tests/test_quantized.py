"""What is computed with weights in 8 and 4 bits, against bitsandbytes' own layers and plain arithmetic."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from rankwise import quantized
from tests import bits, tiny
from tests.bits import STORAGES, bitsandbytes

needs_packing = pytest.mark.skipif(not bits.packs_for_cpu(), reason="this CPU has no bf16 instructions to pack for")


def layer(storage: str, bias: bool = True, compute: torch.dtype | None = None) -> nn.Module:
    """A quantised layer of 64 inputs and 96 outputs, on the CPU."""
    plain = nn.Linear(64, 96, bias=bias)
    if storage == "8bit":
        made = bitsandbytes.nn.Linear8bitLt(64, 96, bias=bias, has_fp16_weights=False, threshold=6.0)
    else:
        made = bitsandbytes.nn.Linear4bit(64, 96, bias=bias, quant_type=storage, compute_dtype=compute)
    made.load_state_dict(plain.state_dict())
    return made.to("cpu").requires_grad_(False)


def relative(found: torch.Tensor, wanted: torch.Tensor) -> float:
    return float((found - wanted).norm() / wanted.norm())


@pytest.mark.parametrize("storage", STORAGES)
def test_what_is_stored(storage):
    one = layer(storage)
    assert quantized.storage_of(one) == storage and quantized.is_quantized(one)
    assert quantized.weight_shape(one) == (96, 64) and quantized.num_weights(one.weight) == 96 * 64
    assert quantized.foreign_storage(one) is None


def test_plain_layers_are_as_they_are():
    plain = nn.Linear(4, 3)
    assert quantized.storage_of(plain) is None and quantized.weight_shape(plain) == (3, 4)
    assert quantized.dense_weight(plain).data_ptr() == plain.weight.data_ptr()
    assert quantized.dense_weight(plain, torch.bfloat16).dtype == torch.bfloat16
    assert quantized.foreign_storage(plain) is None and quantized.foreign_storage(nn.ReLU()) is None


def test_foreign_storage_is_named():
    fresh = bitsandbytes.nn.Linear8bitLt(4, 3, has_fp16_weights=False)
    assert "not quantised yet" in str(quantized.foreign_storage(fresh))
    eight = nn.Linear(4, 3)
    eight.weight = nn.Parameter(torch.ones(3, 4).to(torch.float8_e4m3fn), requires_grad=False)
    assert quantized.foreign_storage(eight) == "torch.float8_e4m3fn"
    table = bitsandbytes.nn.EmbeddingNF4(64, 64)
    assert "embedding" in str(quantized.foreign_storage(table))


@pytest.mark.parametrize("storage", STORAGES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_dequantised_numbers_are_rounded_once(storage, dtype):
    one = layer(storage)
    exact = quantized.dense_weight(one, torch.float32)
    rounded = quantized.dense_weight(one, dtype)
    assert rounded.dtype == dtype and torch.equal(rounded, exact.to(dtype))


@pytest.mark.parametrize("storage", STORAGES)
def test_dequantised_numbers_are_those_of_an_identity_matrix(storage):
    one = layer(storage, bias=False).train()
    assert torch.equal(one(torch.eye(64)).T, quantized.dense_weight(one))
    assert torch.equal(one(torch.eye(64)).T, quantized.dense_weight(one)), "also after its first call"


@pytest.mark.parametrize("storage", STORAGES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bias", [True, False])
def test_product_and_gradient_are_those_of_the_dense_layer(storage, dtype, bias):
    one = layer(storage, bias)
    x = torch.randn(3, 5, 64).to(dtype).requires_grad_()
    twin = x.detach().clone().requires_grad_()
    own_bias = None if one.bias is None else one.bias.to(dtype)
    upstream = torch.randn(3, 5, 96).to(dtype)
    y = quantized.frozen_product(one, x)
    wanted = nn.functional.linear(twin, quantized.dense_weight(one, dtype), own_bias)
    assert y.dtype == dtype and torch.equal(y, wanted)
    y.backward(upstream)
    wanted.backward(upstream)
    assert torch.equal(x.grad, twin.grad)


@pytest.mark.parametrize("storage", STORAGES)
def test_product_is_bitsandbytes_own_in_training(storage):
    one = layer(storage, compute=torch.float32).train()
    x = torch.randn(7, 64, requires_grad=True)
    twin = x.detach().clone().requires_grad_()
    assert quantized.computes_by_weight(one, x)
    y, wanted = quantized.frozen_product(one, x), one(twin)
    assert torch.equal(y, wanted)
    y.sum().backward()
    wanted.sum().backward()
    assert torch.equal(x.grad, twin.grad)


def test_a_trained_bias_gets_its_gradient():
    one = layer("nf4")
    one.bias.requires_grad_(True)
    x = torch.randn(3, 5, 64)
    quantized.frozen_product(one, x).sum().backward()
    assert torch.equal(one.bias.grad, torch.full((96,), 15.0))


def test_an_eight_bit_layer_on_its_own_rounds_activations_in_evaluation():
    one = layer("8bit").eval()
    x = torch.randn(7, 64)
    x[0, 0] = 50.0  # an outlier column, which LLM.int8() takes out of the rounding for all samples
    assert not quantized.computes_by_weight(one, x)
    alone, beside = one(x[1:]), one(x)[1:]
    assert not torch.equal(alone, beside), "if samples no longer change each other, compute_by_weight can go"
    quantized.compute_by_weight(one)
    assert quantized.computes_by_weight(one, x)
    assert torch.allclose(one(x[1:]), one(x)[1:], atol=1e-5)
    assert torch.equal(one(x), one.train()(x))


def test_by_weight_survives_a_copy():
    one = layer("8bit").eval()
    quantized.compute_by_weight(one)
    other = copy.deepcopy(one)
    other.state.SCB = None
    other.weight.SCB = torch.zeros(96)
    x = torch.ones(2, 64)
    assert torch.equal(other(x), other.bias.expand(2, 96)) and not torch.equal(one(x), other(x))


def test_a_replaced_forward_is_respected():
    one = layer("nf4").train()
    one.forward = lambda x: x
    assert not quantized.computes_by_weight(one, torch.ones(1, 64))


def test_a_four_bit_layer_that_computes_in_another_dtype_does_so_itself():
    assert not quantized.computes_by_weight(layer("nf4", compute=torch.bfloat16), torch.ones(1, 64))
    assert quantized.computes_by_weight(layer("nf4", compute=torch.bfloat16), torch.ones(1, 64).bfloat16())


@needs_packing
@pytest.mark.parametrize("storage", ["nf4", "fp4"])
@pytest.mark.parametrize("double", [True, False])
def test_packed_layers_are_unpacked_to_the_same_numbers(storage, double):
    model = bits.quantise(
        tiny.llama(hidden_size=64, intermediate_size=128, initializer_range=0.1), storage, torch.bfloat16, double
    )
    one = model.model.layers[0].self_attn.q_proj
    before = quantized.dense_weight(one)
    with torch.no_grad():
        model(tiny.token_ids())
        packed = one(torch.eye(64).bfloat16()).T.float()
    assert one.weight.quant_state.packing_format_for_cpu, "if it no longer packs, unpack can go"
    quantized.unpack(model)
    after = quantized.dense_weight(one, torch.bfloat16).float()
    assert relative(after, before) < 5e-3, "what packing itself rounded"
    assert relative(after, packed) < 1e-2, "its product rounds to bf16"
    allowed = quantized.keep_unpacked(model)
    assert one in allowed
    with torch.no_grad():
        model(tiny.token_ids())
    assert torch.equal(quantized.dense_weight(one, torch.bfloat16).float(), after)
    quantized.allow_packing(allowed)
    assert one.support_avx512bf16_for_cpu


@needs_packing
def test_without_packing_evaluation_changes_no_weight_and_gradients_pass():
    model = bits.llama("nf4")
    quantized.keep_unpacked(model)
    one = model.model.layers[0].self_attn.q_proj
    before = quantized.dense_weight(one)
    with torch.no_grad():
        model(tiny.token_ids())
    assert torch.equal(quantized.dense_weight(one), before)
    x = torch.randn(2, 64, requires_grad=True)
    one(x).sum().backward()
    assert x.grad is not None and float(x.grad.norm()) > 0


@pytest.mark.parametrize("storage", STORAGES)
@pytest.mark.parametrize("build", [bits.llama, bits.gpt2], ids=["llama", "gpt2"])
def test_plain_layers_compute_the_same(storage, build):
    model = build(storage).train()
    plain = copy.deepcopy(model)
    for name, module in list(model.named_modules()):
        if quantized.is_quantized(module):
            plain.set_submodule(name, quantized.plain_layer(module, quantized.dense_weight(module)))
    assert not any(quantized.is_quantized(module) for module in plain.modules())
    quantized.forget_quantization(plain)
    wanted = build.__name__ == "gpt2"
    assert any(type(module).__name__ == "Conv1D" for module in plain.modules()) == wanted
    assert torch.allclose(plain(tiny.token_ids()).logits, model(tiny.token_ids()).logits, atol=1e-5)
    for name in ("quantization_config", "_is_quantized"):
        assert name not in vars(plain.config)
    assert not {"hf_quantizer", "quantization_method", "is_quantized", "is_loaded_in_4bit"} & vars(plain).keys()
    plain.to(torch.float64)
