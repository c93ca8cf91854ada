"""What must not change when a request is refused: values, flags, classes and identities of everything in a model."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel


def snapshot(model: nn.Module) -> dict[str, Any]:
    tensors = [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]
    return {
        "classes": [(name, type(module)) for name, module in model.named_modules(remove_duplicate=False)],
        "identities": [(name, id(tensor)) for name, tensor in tensors],
        "flags": [(name, p.requires_grad) for name, p in model.named_parameters(remove_duplicate=False)],
        "modes": [module.training for module in model.modules()],
        "attributes": [sorted(vars(module)) for module in model.modules()],
        "numbers": [
            {k: v for k, v in vars(module).items() if isinstance(v, int)} for module in model.modules()
        ],  # num_embeddings and the like
        "config": model.config.to_dict() if isinstance(model, PreTrainedModel) else None,
        "values": {name: tensor.detach().clone() for name, tensor in tensors},
    }


def assert_unchanged(model: nn.Module, before: dict[str, Any]) -> None:
    after = snapshot(model)
    for what in before:
        if what != "values":
            assert after[what] == before[what], f"{what} changed"
    assert after["values"].keys() == before["values"].keys()
    for name, tensor in before["values"].items():
        assert torch.equal(after["values"][name], tensor), f"{name} changed"


def logits(model: nn.Module, **inputs: Tensor) -> Tensor:
    with torch.no_grad():
        out = model(**inputs)
    return out.logits if hasattr(out, "logits") else out.last_hidden_state


def relative(mine: Tensor, theirs: Tensor) -> float:
    return float((mine - theirs).abs().max() / theirs.abs().max())
