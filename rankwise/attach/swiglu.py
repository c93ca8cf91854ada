"""SwiGLU MLPs that keep two tensors for the backward pass instead of four.

The stock forward, down(silu(gate(x)) * up(x)), keeps gate, silu(gate), up and their product; here the product goes
straight into the adapted down projection (`rankwise.adapters.fused`), which forms it again. This is the only forward of
a model that rankwise ever replaces: on the instance, for classes of the table below alone, on request, and after the
stock forward has given the same output and the same gradient.
"""

from __future__ import annotations

import logging
from functools import partial
from typing import cast

import torch
from torch import Tensor, nn
from transformers.activations import SiLUActivation

from rankwise.adapters.low_rank import HOOKS, LowRankLayer
from rankwise.attach.attachment import base_of, need_active
from rankwise.errors import RequestError

MLPS = (
    "bamba.modeling_bamba.BambaMLP",
    "cohere.modeling_cohere.CohereMLP",
    "cohere2.modeling_cohere2.Cohere2MLP",
    "deepseek_v2.modeling_deepseek_v2.DeepseekV2MLP",
    "deepseek_v3.modeling_deepseek_v3.DeepseekV3MLP",
    "ernie4_5.modeling_ernie4_5.Ernie4_5MLP",
    "exaone4.modeling_exaone4.Exaone4MLP",
    "granite.modeling_granite.GraniteMLP",
    "helium.modeling_helium.HeliumMLP",
    "hunyuan_v1_dense.modeling_hunyuan_v1_dense.HunYuanDenseV1MLP",
    "jamba.modeling_jamba.JambaMLP",
    "llama.modeling_llama.LlamaMLP",
    "ministral.modeling_ministral.MinistralMLP",
    "mistral.modeling_mistral.MistralMLP",
    "olmo.modeling_olmo.OlmoMLP",
    "olmo2.modeling_olmo2.Olmo2MLP",
    "olmo3.modeling_olmo3.Olmo3MLP",
    "qwen2.modeling_qwen2.Qwen2MLP",
    "qwen3.modeling_qwen3.Qwen3MLP",
    "qwen3_moe.modeling_qwen3_moe.Qwen3MoeMLP",
    "smollm3.modeling_smollm3.SmolLM3MLP",
    "stablelm.modeling_stablelm.StableLmMLP",
)
"""Classes below `transformers.models` whose forward is down(act(gate(x)) * up(x)) and nothing else."""
PROJECTIONS = ("gate_proj", "up_proj", "down_proj")
SILU = (nn.SiLU, SiLUActivation)
_log = logging.getLogger(__name__)
TOLERANCES = {2: 2.0**-6, 4: 1e-5, 8: 1e-9}
"""Of the largest number, by the bytes of one."""


def fuse_mlps(model: nn.Module, required: bool = True) -> int:
    """Replaces the forward of every MLP of a known class whose down projection is adapted; how many these were.

    The first MLP of each class is checked against its stock forward. A class where it differs is left as it is, with a
    warning.

    Raises: RequestError when nothing is attached; with `required` also where there is no such MLP, or one differs.
    """
    need_active(model, "fuse MLPs")
    found = [module for module in model.modules() if _is_known(module)]
    if not found and required:
        raise RequestError(
            f"fused_mlp has no effect: this {type(model).__name__} has no SwiGLU MLP of a known class with an adapted "
            "down_proj; set it to auto or false"
        )
    for kind in {type(mlp) for mlp in found}:
        first = next(mlp for mlp in found if type(mlp) is kind)
        if _agrees(first):
            continue
        if required:
            raise RequestError(f"fused_mlp: {kind.__name__} computes something else here; set it to auto or false")
        _log.warning("%s computes something else than a SwiGLU MLP here, so it keeps its own forward", kind.__name__)
        found = [mlp for mlp in found if type(mlp) is not kind]
    for mlp in found:
        vars(mlp)["forward"] = partial(swiglu_forward, mlp)
    return len(found)


def split_mlps(model: nn.Module) -> None:
    """Gives every MLP its own forward back."""
    for module in model.modules():
        replaced = vars(module).get("forward")
        if isinstance(replaced, partial) and replaced.func is swiglu_forward:
            del vars(module)["forward"]


def swiglu_forward(mlp: nn.Module, x: Tensor) -> Tensor:
    """The output of down(silu(gate(x)) * up(x)); as the stock forward where somebody listens to `down`."""
    gate, up, down = (cast(nn.Module, mlp._modules[name]) for name in PROJECTIONS)
    a, b = gate(x), up(x)
    if isinstance(down, LowRankLayer) and down.active and not any(vars(down)[hooks] for hooks in HOOKS):
        return down.adapted(a, b)
    return cast(Tensor, down(nn.functional.silu(a) * b))


def _is_known(module: nn.Module) -> bool:
    kind = type(module)
    return (
        kind.__module__.startswith("transformers.models.")
        and f"{kind.__module__.removeprefix('transformers.models.')}.{kind.__qualname__}" in MLPS
        and isinstance(module._modules.get("act_fn"), SILU)
        and "forward" not in vars(module)
        and isinstance(module._modules["down_proj"], LowRankLayer)
        and all(_is_plain(base_of(cast(nn.Module, module._modules[name]))) for name in PROJECTIONS)
    )


def _is_plain(module: nn.Module) -> bool:
    return type(module) is nn.Linear and not module.weight.is_meta


@torch.enable_grad()
def _agrees(mlp: nn.Module) -> bool:
    """Whether output and gradient of two rows are those of the stock forward, up to rounding."""
    weight = cast(nn.Linear, base_of(cast(nn.Module, mlp._modules["gate_proj"]))).weight
    x = torch.linspace(-1.0, 1.0, 2 * weight.shape[1], device=weight.device).view(2, -1).to(weight.dtype)
    x.requires_grad_()
    training = [module for module in mlp.modules() if module.training]
    mlp.eval()
    try:
        outputs = [mlp.forward(x), swiglu_forward(mlp, x)]
        gradients = [torch.autograd.grad(y, x, torch.ones_like(y))[0] for y in outputs]
    finally:
        for module in training:
            module.training = True
    tolerance = TOLERANCES[x.element_size()]
    return all(
        float((mine - stock).detach().abs().max()) <= tolerance * float(stock.detach().abs().max())
        for stock, mine in (outputs, gradients)
    )
