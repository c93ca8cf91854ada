"""Gradient checkpointing: activations are computed again in the backward pass instead of kept (Chen et al. 2016,
arXiv 1604.06174), one transformer block at a time, by the model's own blocks.

What attention gives is kept: it is small, hidden size times tokens, and the dearest part of a block to compute again
(selective recomputation, Korthikanti et al. 2022, arXiv 2205.05198, section 5, chooses differently because attention
then wrote its scores to memory). At 2 x 512 tokens keeping it takes 6 % off a step.
"""

from __future__ import annotations

from functools import partial
from typing import Any

from torch.utils.checkpoint import CheckpointPolicy, SelectiveCheckpointContext, create_selective_checkpoint_contexts
from transformers import PreTrainedModel

from rankwise.errors import RequestError

HAS_NEW_NAME = "activation_checkpointing_enable" in vars(PreTrainedModel)
"""The earlier releases of transformers 5 know the other name only; the later ones warn that 6 drops it."""

KEPT = frozenset(
    {
        "aten._scaled_dot_product_flash_attention_for_cpu.default",
        "aten._scaled_dot_product_flash_attention.default",
        "aten._scaled_dot_product_efficient_attention.default",
        "aten._scaled_dot_product_cudnn_attention.default",
        "aten._flash_attention_forward.default",
        "aten._efficient_attention_forward.default",
        "rankwise.blocked_attention.default",  # bf16 on CPUs
        "torch_attn._varlen_attn.default",  # packed rows on CUDA
        "flash_attn._flash_attn_varlen_forward.default",
    }
)
"""Operations, by name, whose results are kept. Eager attention has none of them: its scores are computed again."""


def enable_gradient_checkpointing(model: PreTrainedModel) -> None:
    """Turns it on for training mode; evaluation is not touched.

    Raises: RequestError for a model whose blocks can't be recomputed.
    """
    if not model.supports_gradient_checkpointing:
        kind = type(model).__name__
        raise RequestError(f"{kind} has no gradient checkpointing; set train.gradient_checkpointing=false")
    settings: dict[str, Any] = {
        "use_reentrant": False, "context_fn": partial(create_selective_checkpoint_contexts, _keep_attention),
    }  # fmt: skip
    if HAS_NEW_NAME:
        model.activation_checkpointing_enable(activation_checkpointing_kwargs=settings)
    else:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=settings)
    # Not re-entrant, gradients reach the adapters inside a block although its input, the frozen embedding, needs none;
    # the hook that transformers adds for the other kind would only carry gradients below the first adapter.
    model.disable_input_require_grads()


def _keep_attention(
    context: SelectiveCheckpointContext,
    operation: Any,
    *arguments: Any,
    **options: Any,  # torch's seam: what the operation is called with
) -> CheckpointPolicy:
    return CheckpointPolicy.MUST_SAVE if str(operation) in KEPT else CheckpointPolicy.PREFER_RECOMPUTE
