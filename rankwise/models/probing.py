"""Looks at a model without disturbing it: in evaluation mode, without gradients, every module's mode restored."""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Iterator

import torch
from torch import nn
from transformers import PreTrainedModel


@contextlib.contextmanager
def undisturbed(model: nn.Module) -> Iterator[None]:
    """Inside the block the model is in evaluation mode and records no gradients; each module's own mode returns."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module in training:
            module.training = True


def backbone(model: PreTrainedModel) -> PreTrainedModel:
    """The model without its head, or the model itself when it has none."""
    found = model.base_model
    assert isinstance(found, PreTrainedModel), f"the backbone of {type(model).__name__} is not a transformers model"
    return found


def takes(model: nn.Module, argument: str) -> bool:
    """Whether the model's forward names this argument."""
    return argument in inspect.signature(model.forward).parameters


def num_positions(model: PreTrainedModel) -> int | None:
    """The longest row that the model has positions for; None where its config names no bound.

    RoBERTa and its kin count positions from behind the pad token's, and so have fewer than their table has rows.
    """
    positions = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if positions is None:
        return None
    for name, module in model.named_modules():
        if name.endswith("position_embeddings") and isinstance(module, nn.Embedding) and module.padding_idx is not None:
            return positions - module.padding_idx - 1
    return positions
