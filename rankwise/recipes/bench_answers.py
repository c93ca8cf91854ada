"""Answers to the first test rows of a cell's task, and their scores: beside the losses, for rows that head a table."""

from __future__ import annotations

from typing import Any

from rankwise.bench.suite import Answers
from rankwise.data.templates import stop_token_ids
from rankwise.evaluate.answers import score
from rankwise.evaluate.generate import generate_answers
from rankwise.recipes.bench_cell import Trained
from rankwise.recipes.bench_measure import MEASURED_BATCH, TEST, examples_of
from rankwise.recipes.run import RunConfig

SCORES = ("chrf", "bleu")
"""Of answers, as `rankwise evaluate` has them: 0 to 100."""


def answered(trained: Trained, run: RunConfig, asked: Answers) -> dict[str, Any]:
    """Greedy answers of what was trained: `rows`, `max_new_tokens`, the SCORES, and `texts` in the rows' order.

    Raises: RequestError for a prompt that does not fit into the model with its answer.
    """
    data = trained.data
    rows = list(examples_of(data, run)[TEST][: asked.rows])
    stop_ids = stop_token_ids(data.tokenizer, run.data, run.train.needs.layout)
    with trained.computing():
        texts = generate_answers(
            trained.model, data.tokenizer, [row.prompt_ids for row in rows], asked.max_new_tokens, MEASURED_BATCH,
            stop_ids=stop_ids,
        )  # fmt: skip
    scores = score(texts, [row.answer for row in rows], SCORES)
    return {"rows": len(rows), "max_new_tokens": asked.max_new_tokens, **scores, "texts": texts}
