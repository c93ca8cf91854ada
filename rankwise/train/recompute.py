"""Gradient checkpointing: activations are computed again in the backward pass instead of kept (Chen et al. 2016,
arXiv 1604.06174), one transformer block at a time, by the model's own blocks.
"""

from __future__ import annotations

from transformers import PreTrainedModel

from rankwise.errors import RequestError

HAS_NEW_NAME = "activation_checkpointing_enable" in vars(PreTrainedModel)
"""The earlier releases of transformers 5 know the other name only; the later ones warn that 6 drops it."""


def enable_gradient_checkpointing(model: PreTrainedModel) -> None:
    """Turns it on for training mode; evaluation is not touched.

    Raises: RequestError for a model whose blocks can't be recomputed.
    """
    if not model.supports_gradient_checkpointing:
        kind = type(model).__name__
        raise RequestError(f"{kind} has no gradient checkpointing; set train.gradient_checkpointing=false")
    if HAS_NEW_NAME:
        model.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": False})
    else:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    # Not re-entrant, gradients reach the adapters inside a block although its input, the frozen embedding, needs none;
    # the hook that transformers adds for the other kind would only carry gradients below the first adapter.
    model.disable_input_require_grads()
