"""Whether what an artefact wrote is what the model in torch would have written."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from transformers import PreTrainedModel

from rankwise.export.certificate import answer_logits, probe_logits

TOLERANCE = 1e-3
"""A token counts as the model's own when its logit is this close to the best one: ties are broken by rounding."""


def same_text(
    model: PreTrainedModel,
    prompts: Sequence[Sequence[int]],
    written: Sequence[Sequence[int]],
    tolerance: float = TOLERANCE,
) -> float:
    """Share of the tokens `written` to `prompts` that `model`, given what stands before them, writes greedily too.

    1 where nothing was written.
    """
    same, total = 0, 0
    for prompt, tokens in zip(prompts, written, strict=True):
        if not tokens:
            continue
        if model.config.is_encoder_decoder:
            logits = answer_logits(model, prompt, tokens)
        else:
            logits = probe_logits(model, [[*prompt, *tokens]])[0][len(prompt) - 1 : -1]
        own = logits[torch.arange(len(tokens)), torch.tensor(list(tokens))]
        same += int((own >= logits.max(dim=-1).values - tolerance).sum())
        total += len(tokens)
    return same / total if total else 1.0
