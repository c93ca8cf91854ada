"""What each objective needs of the model and of the rows; known without torch, so that a run file can be checked.

To add an objective: a line here, and one in `objectives.py` that says how its losses are computed.
"""

from __future__ import annotations

from dataclasses import dataclass

from rankwise.data.fields import ANSWERS, LABELLED, PAIRED, PREFERENCES, TAGGED, TEXTS


@dataclass(frozen=True)
class Needs:
    """What one objective trains, and on what.

    Args:
        task: the model's head, a key of `rankwise.models.load.TASKS`.
        task_type: PEFT's name for it, written into the adapter's config.
        rows: the kind of row that it trains on (`Format.rows`).
        layout: how a row becomes token sequences: a key of `rankwise.data.layouts.LAYOUTS`, or, without a template, one
            of `rankwise.data.head_encoder.HEAD_LAYOUTS`.
        unit: what one loss is of; only a loss of tokens has a perplexity.
        packs: whether the rows of a micro batch can lie end to end; where they can't, they are padded.
        generates: whether rows ask for an answer that the model can write.
        smooths: whether label smoothing and the z-loss apply: the losses are cross entropies of tokens.
    """

    task: str
    task_type: str
    rows: str
    layout: str = "whole"
    unit: str = "token"
    packs: bool = True
    generates: bool = True
    smooths: bool = False


NEEDS: dict[str, Needs] = {
    "sft": Needs("causal-lm", "CAUSAL_LM", ANSWERS, smooths=True),
    "text": Needs("causal-lm", "CAUSAL_LM", TEXTS, generates=False, smooths=True),
    "seq2seq": Needs("seq2seq-lm", "SEQ_2_SEQ_LM", ANSWERS, layout="seq2seq", packs=False, smooths=True),
    "dpo": Needs("causal-lm", "CAUSAL_LM", PREFERENCES, layout="preference", unit="pair"),
    "classification": Needs(
        "sequence-classification", "SEQ_CLS", LABELLED, "classes", unit="label", packs=False, generates=False
    ),
    "token-classification": Needs(
        "token-classification", "TOKEN_CLS", TAGGED, "tags", unit="tag", packs=False, generates=False
    ),
    "embedding": Needs("encoder", "FEATURE_EXTRACTION", PAIRED, "pairs", unit="row", packs=False, generates=False),
}


def remedy_for(rows: str) -> str:
    """What to do with this kind of row: the objectives that train on it."""
    names = [name for name, needs in NEEDS.items() if needs.rows == rows]
    return f"use train.objective={' or '.join(names)}"
