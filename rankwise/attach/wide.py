"""Heads in float32 on a narrower base: a module that is trained whole holds fp32 weights and computes in fp32.

A head is a few thousand weights with a learning rate meant for fp32: in bf16 the steps of Adam fall below half a unit
in the last place and vanish. So its copy is fp32 (see `Attachment.exchange`), what enters the module is cast to the
dtype that its weights have now (inside `disabled` that is the base's own), and what leaves it is cast back to the
base's dtype for whatever frozen part comes next. A head of the task has none after it: its logits stay fp32.

PEFT keeps such modules in the base's dtype; its file is the same, and a base in fp32 gives the same logits.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

NARROW = (torch.bfloat16, torch.float16)


def is_narrow(tensor: Tensor) -> bool:
    """Whether small steps would be lost in the tensor's dtype."""
    return tensor.dtype in NARROW


def compute_wide(model: nn.Module, names: Iterable[str], heads: Iterable[str]) -> None:
    """Makes the modules `names`, whose weights are now fp32, compute in it; `heads` end names whose outputs stay so.

    Modules whose weights the base has in fp32 anyway are left as they are.
    """
    for name in names:
        module = model.get_submodule(name)
        floats = [parameter for parameter in module.parameters() if parameter.is_floating_point()]
        if not floats or not any(parameter.dtype == torch.float32 for parameter in floats):
            continue
        module.register_forward_pre_hook(cast_inputs, with_kwargs=True)
        if not any(name.endswith(head) for head in heads):
            module.register_forward_hook(partial(cast_output, dtype=_dtype_around(model)))


def compute_as_before(model: nn.Module) -> None:
    """Takes away what `compute_wide` put in."""
    for module in model.modules():
        for key in [key for key, hook in module._forward_pre_hooks.items() if hook is cast_inputs]:
            del module._forward_pre_hooks[key]
            module._forward_pre_hooks_with_kwargs.pop(key, None)
        for key in [key for key, hook in module._forward_hooks.items() if _casts_output(hook)]:
            del module._forward_hooks[key]


def cast_inputs(
    module: nn.Module, arguments: tuple[Any, ...], named: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Forward pre-hook: floating inputs in the dtype that the module's weights have now."""
    dtype = next(parameter.dtype for parameter in module.parameters() if parameter.is_floating_point())
    return tuple(_cast(value, dtype) for value in arguments), {key: _cast(value, dtype) for key, value in named.items()}


def cast_output(module: nn.Module, arguments: Any, output: Any, dtype: torch.dtype) -> Any:
    """Forward hook: a floating output in the base's dtype."""
    return _cast(output, dtype)


def _casts_output(hook: Any) -> bool:
    return isinstance(hook, partial) and hook.func is cast_output


def _cast(value: Any, dtype: torch.dtype) -> Any:
    return value.to(dtype) if isinstance(value, Tensor) and value.is_floating_point() else value


def _dtype_around(model: nn.Module) -> torch.dtype:
    """The narrow dtype that the base has."""
    return next(parameter.dtype for parameter in model.parameters() if is_narrow(parameter))
