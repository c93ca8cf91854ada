"""How a frozen linear layer's weight is stored, and what is computed with it. The only file that knows of storage.

`8bit` is LLM.int8() (Dettmers et al. 2022, arXiv 2208.07339): whole numbers C with one scale a row, W = C S / 127.
`nf4` and `fp4` are QLoRA's (Dettmers et al. 2023, arXiv 2305.14314, section 3): 4-bit codes, a scale for each block of
64, which double quantisation stores in 8 bits. Both are bitsandbytes' layers, which this file finds without importing:
where bitsandbytes has not been imported, nothing is stored that way.

Two things that bitsandbytes 0.50 does on a CPU are undone here, because they would change results:
- in evaluation mode its 8-bit layer rounds the activations too, with an eye to the largest of the whole batch, so that
  samples change each other; in training mode it does not. `compute_by_weight` keeps to y = x W^T in both.
- on CPUs with bf16 instructions its 4-bit layer repacks its weight when it is first evaluated: scales are rounded to
  bf16, and no gradient passes any more. `unpack` takes that back, and `keep_unpacked` turns it off.

Legend: N tokens, n inputs, o outputs. Not here: other libraries' storage (GPTQ, AWQ, FP8), which is only recognised.
"""

from __future__ import annotations

import copy
import sys
from functools import partial
from typing import Any, cast

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

INT8_STEPS = 127
"""The largest code of an 8-bit row stands for the row's scale."""


def _library() -> Any:
    """The package bitsandbytes where it has been imported, else None."""
    return sys.modules.get("bitsandbytes")


def storage_of(module: nn.Module) -> str | None:
    """`8bit`, `nf4` or `fp4` for a layer stored that way; None for any other module."""
    library = _library()
    if library is None:
        return None
    weight: Any = module._parameters.get("weight")
    if isinstance(module, library.nn.Linear8bitLt):
        return "8bit" if weight is not None and weight.dtype == torch.int8 else None
    if isinstance(module, library.nn.Linear4bit):
        return str(weight.quant_type) if weight is not None and weight.quant_state is not None else None
    return None


def storage_in(model: nn.Module) -> str | None:
    """The storage of a model's quantised layers, with `+` between several; None where it has none."""
    found = {storage_of(module) for module in model.modules()} - {None}
    return "+".join(sorted(str(storage) for storage in found)) or None


def is_quantized(module: nn.Module) -> bool:
    """Whether the layer's weight is stored in 8 or 4 bits."""
    return storage_of(module) is not None


def foreign_storage(module: nn.Module) -> str | None:
    """How a weight is stored that is neither plain numbers nor one of the storages here; None where it is one."""
    library = _library()
    weight: Any = module._parameters.get("weight")
    if weight is None or is_quantized(module):
        return None
    if library is not None and isinstance(module, (library.nn.Linear8bitLt, library.nn.Linear4bit)):
        return "not quantised yet: bitsandbytes does that when the layer is moved to its device"
    if library is not None and isinstance(module, (library.nn.Embedding8bit, library.nn.Embedding4bit)):
        return "an embedding in 8 or 4 bits"
    return None if weight.dtype.is_floating_point and weight.dtype.itemsize > 1 else str(weight.dtype)


def weight_shape(module: nn.Module) -> torch.Size:
    """Shape of the layer's weight as numbers, however it is stored."""
    weight: Any = module.weight
    return torch.Size(weight.quant_state.shape) if storage_of(module) in ("nf4", "fp4") else weight.shape


def num_weights(parameter: nn.Parameter) -> int:
    """How many numbers a parameter stands for: a 4-bit one packs two into each of its elements."""
    library = _library()
    if library is None or not isinstance(parameter, library.nn.Params4bit):
        return parameter.numel()
    packed: Any = parameter
    return parameter.numel() if packed.quant_state is None else torch.Size(packed.quant_state.shape).numel()


def stated_dtype(module: nn.Module) -> torch.dtype | None:
    """The dtype that a 4-bit layer was told to compute in; None for the dtype of its input, as 8-bit layers do."""
    stated = vars(module).get("compute_dtype")
    return stated if isinstance(stated, torch.dtype) else None


def dense_weight(module: nn.Module, dtype: torch.dtype | None = None) -> Float[Tensor, "..."]:
    """The layer's weight as numbers, without a gradient: as it is where it is plain, else dequantised (into fp32).

    Dequantised numbers are rounded once, to `dtype`. The result must not be written into.
    """
    weight: Any = module.weight
    storage = storage_of(module)
    if storage is None:
        return weight.detach() if dtype is None else weight.detach().to(dtype)
    dtype = dtype or torch.float32
    if storage == "8bit":
        state: Any = module.state  # which takes the codes and scales over from the weight on the first call
        codes = weight.data if state.CB is None else state.CB
        scales = weight.SCB if state.SCB is None else state.SCB
        return codes.detach().to(dtype, copy=True).mul_(scales.detach().unsqueeze(1).mul(1.0 / INT8_STEPS))
    state = copy.copy(weight.quant_state)
    state.dtype = dtype
    return _library().functional.dequantize_4bit(weight.data, state)


class _FrozenProduct(torch.autograd.Function):
    """y = x W^T + b of a quantised layer. Keeps neither W nor x: W is dequantised again in the backward pass."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, bias: Tensor | None, module: nn.Module) -> Tensor:
        ctx.module = module
        return F.linear(x, dense_weight(module, x.dtype), bias)

    @staticmethod
    @once_differentiable  # which hides the argument names from the type checker
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, grad: Tensor
    ) -> tuple[Tensor | None, Tensor | None, None]:
        need_x, need_bias, _ = ctx.needs_input_grad
        grad_x = grad @ dense_weight(ctx.module, grad.dtype) if need_x else None
        return grad_x, grad.flatten(0, -2).sum(0) if need_bias else None, None


def frozen_product(module: nn.Module, x: Float[Tensor, "*batch n"]) -> Float[Tensor, "*batch o"]:
    """The product x W^T + b, with the weight dequantised into the dtype of `x`, differentiable in x and b."""
    bias = module._parameters.get("bias")
    return cast(Tensor, _FrozenProduct.apply(x, bias if bias is None else bias.to(x.dtype), module))


def compute_by_weight(model: nn.Module) -> None:
    """Makes every 8-bit layer compute x W^T with its dequantised weight, in training and in evaluation alike."""
    for module in model.modules():
        if storage_of(module) == "8bit":
            vars(module)["forward"] = partial(frozen_product, module)


def compute_in(model: nn.Module, dtype: torch.dtype) -> None:
    """Makes 4-bit layers compute in `dtype`, forward and backward, whatever their weights were before."""
    for module in _four_bit_layers(model):
        module.compute_dtype, module.compute_type_is_set = dtype, True
        if module.weight.quant_state is not None:
            module.weight.quant_state.dtype = dtype


def computes_by_weight(module: nn.Module, x: Tensor) -> bool:
    """Whether the layer's own forward on `x` is x W^T with its dequantised weight, so that one may compute that.

    A 4-bit layer casts `x` to the dtype that it computes in; an 8-bit one on its own does so in training on a CPU.
    """
    own: Any = vars(module).get("forward")
    by_weight = isinstance(own, partial) and own.func is frozen_product
    storage = storage_of(module)
    if storage == "8bit":
        return by_weight or (own is None and module.training and x.device.type == "cpu")
    return storage is not None and own is None and stated_dtype(module) in (None, x.dtype)


def _four_bit_layers(model: nn.Module) -> list[Any]:
    library = _library()
    return [] if library is None else [one for one in model.modules() if isinstance(one, library.nn.Linear4bit)]


def unpack(model: nn.Module) -> None:
    """Unpacks the 4-bit layers that have repacked their weights for the CPU: the same numbers, stored as others are.

    Asked for its state a layer unpacks, but bitsandbytes rounds the scales of the blocks again: they are kept here.
    """
    for module in _four_bit_layers(model):
        packed = module.weight.quant_state
        if packed is None or not vars(packed).get("packing_format_for_cpu", False):
            continue
        scales = packed.absmax.T.reshape(-1).float()
        module.state_dict()
        state = module.weight.quant_state
        state.absmax, state.nested, state.state2, state.offset = scales, False, None, None
        module.weight.compress_statistics = False


def keep_unpacked(model: nn.Module) -> list[nn.Module]:
    """Keeps 4-bit layers from repacking their weights for the CPU.

    Returns those that were allowed to, for `allow_packing`.
    """
    allowed = [module for module in _four_bit_layers(model) if module.support_avx512bf16_for_cpu]
    for module in allowed:
        vars(module)["support_avx512bf16_for_cpu"] = False
    return allowed


def allow_packing(modules: list[nn.Module]) -> None:
    """Undoes `keep_unpacked`."""
    for module in modules:
        vars(module)["support_avx512bf16_for_cpu"] = True


def plain_layer(module: nn.Module, weight: Float[Tensor, "o n"]) -> nn.Module:
    """An ordinary layer with the quantised layer's bias and `weight`; GPT-2's `Conv1D` where it was one."""
    num_outputs, num_inputs = weight.shape
    bias = module._parameters.get("bias")
    with torch.device("meta"):
        if vars(module).get("source_cls") is Conv1D:
            layer: nn.Module = Conv1D(num_outputs, num_inputs)
            weight = weight.T.contiguous()
        else:
            layer = nn.Linear(num_inputs, num_outputs, bias=bias is not None)
    layer.weight = nn.Parameter(weight.detach(), requires_grad=False)
    if bias is not None:
        layer.bias = nn.Parameter(bias.detach().to(weight.dtype), requires_grad=bias.requires_grad)
    return layer.train(module.training)


def forget_quantization(model: nn.Module) -> None:
    """Makes a transformers model whose quantised layers are all gone say that it is an ordinary one."""
    if not isinstance(model, PreTrainedModel) or not vars(model).get("is_quantized", False):
        return
    model.hf_quantizer.remove_quantization_config(model)  # type: ignore[union-attr]
    for name in ("is_quantized", "is_loaded_in_8bit", "is_loaded_in_4bit"):
        vars(model).pop(name, None)
    for module in model.modules():
        if isinstance(module, PreTrainedModel):
            vars(module.config).pop("_is_quantized", None)
