"""An ONNX export against torch: logits of whole rows and token by token, the greedy text, and what is timed.

The two ways through the graph are compared apart, because runtimes have kernels of their own for a single row.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedModel

from rankwise.export.certificate import EMBEDDING_TEMPERATURE, Difference, answer_logits, compare
from rankwise.export.onnx_runtime import Decoding, OnnxModel
from rankwise.export.onnx_seq2seq import OnnxSeq2Seq
from rankwise.export.speed import TIMED_TOKENS, Run
from rankwise.models.labels import MULTI
from rankwise.models.probing import takes, undisturbed
from rankwise.models.seq2seq import writes_apart

Export = OnnxModel | OnnxSeq2Seq

BY_TOKEN_ROWS, BY_TOKEN_TOKENS = 3, 16
"""Probes whose first tokens go through the cache one by one."""


def torch_logits(model: PreTrainedModel, rows: Sequence[Sequence[int]]) -> list[Tensor]:
    """What the model gives for each row alone, as logits [positions, choices] in fp32.

    Of a classifier: one position; where a text may have several labels, each is a position with two choices. Of hidden
    states: the cosines of the positions' vectors with each other, over EMBEDDING_TEMPERATURE.
    """
    if writes_apart(model):
        return [answer_logits(model, row, row) for row in rows]
    with undisturbed(model):
        more = {"use_cache": False} if takes(model, "use_cache") else {}
        outputs = [model(input_ids=torch.tensor([list(row)]), **more) for row in rows]
    return [
        as_logits(out.logits if "logits" in out else out.last_hidden_state, "logits" in out, model.config.problem_type)
        for out in outputs
    ]


def onnx_logits(
    export: Export, rows: Sequence[Sequence[int]], adapter: str | None, problem_type: str | None
) -> list[Tensor]:
    """The same from the export."""
    if isinstance(export, OnnxSeq2Seq):
        return [torch.from_numpy(export.logits(row, row, adapter)) for row in rows]
    if "logit_positions" in export.inputs:
        return [torch.from_numpy(export.logits(row, adapter)) for row in rows]
    found = [torch.from_numpy(export.encode(row, adapter)) for row in rows]
    return [as_logits(out, export.outputs == ["logits"], problem_type) for out in found]


def as_logits(output: Tensor, is_logits: bool, problem_type: str | None) -> Tensor:
    """A model's output for one row, [1, ...], as `torch_logits` says."""
    output = output.float()
    if not is_logits:
        vectors = F.normalize(output, dim=-1)
        return (vectors @ vectors.transpose(1, 2) / EMBEDDING_TEMPERATURE)[0]
    if output.ndim == 3:
        return output[0]
    return torch.stack([output[0], torch.zeros_like(output[0])], dim=-1) if problem_type == MULTI else output


def by_token_rows(probes: Sequence[Sequence[int]]) -> list[list[int]]:
    """The first tokens of a few probes."""
    return [list(probe[:BY_TOKEN_TOKENS]) for probe in probes[:BY_TOKEN_ROWS]]


def compare_by_token(
    model: PreTrainedModel, export: Export, probes: Sequence[Sequence[int]], adapter: str | None
) -> Difference:
    """The first tokens of a few probes, one by one through the export's cache, against torch's whole rows."""
    short = by_token_rows(probes)
    if isinstance(export, OnnxSeq2Seq):
        stepped = [torch.from_numpy(export.logits(probe, probe, adapter, by_token=True)) for probe in short]
    else:
        stepped = [torch.from_numpy(export.logits(probe, adapter, by_token=True)) for probe in short]
    return compare(torch_logits(model, short), stepped)


def written(export: Export, prompts: Sequence[Sequence[int]], adapter: str | None, num_tokens: int) -> list[list[int]]:
    """Greedy answers of `num_tokens` each, past any end of text: what follows one is decoded by the same graph."""
    decoding = Decoding(num_tokens, (), 0)
    return [export.generate([prompt], decoding, adapter)[0] for prompt in prompts]


def onnx_run(export: Export, prompt: Sequence[int], adapter: str | None, num_tokens: int = TIMED_TOKENS) -> Run:
    """What is timed of an export: the same that `speed.torch_run` runs in torch."""
    if isinstance(export, OnnxModel) and "logit_positions" in export.inputs:
        return onnx_steps(export, prompt, num_tokens, adapter)

    def run() -> None:
        if isinstance(export, OnnxModel):
            export.encode(prompt, adapter)
        else:
            export.generate([prompt], Decoding(num_tokens, (), 0), adapter)

    return run


def onnx_steps(export: OnnxModel, prompt: Sequence[int], num_tokens: int, adapter: str | None) -> Run:
    """`speed.torch_steps` through the export."""
    row, begun = np.array([list(prompt)], np.int64), export.empty_cache(1)
    if len(prompt) > 1:
        _, begun = export.step(row[:, :-1], np.ones_like(row[:, :-1]), begun, adapter)

    def run() -> None:
        cache, ids = begun, row[:, -1:]
        for place in range(num_tokens):
            mask = np.ones((1, len(prompt) + place), np.int64)
            logits, cache = export.step(ids, mask, cache, adapter)
            ids = logits[:, -1:].argmax(-1)

    return run


def onnx_prefill(export: OnnxModel, prompt: Sequence[int], adapter: str | None) -> Run:
    """`speed.torch_prefill` through the export."""
    row = np.array([list(prompt)], np.int64)
    return lambda: export.step(row, np.ones_like(row), export.empty_cache(1), adapter) and None
