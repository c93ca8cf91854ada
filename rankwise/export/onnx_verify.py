"""An ONNX export against torch: logits of whole rows and token by token, the greedy text, and the time of a token.

The two ways through the graph are compared apart, because runtimes have kernels of their own for a single row.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from rankwise.export.certificate import EMBEDDING_TEMPERATURE, Difference, compare
from rankwise.export.onnx_graph import filled_cache
from rankwise.export.onnx_runtime import Decoding, OnnxModel
from rankwise.models.labels import MULTI
from rankwise.models.probing import takes, undisturbed

BY_TOKEN_ROWS, BY_TOKEN_TOKENS = 3, 16
"""Probes whose first tokens go through the cache one by one."""


def torch_logits(model: PreTrainedModel, rows: Sequence[Sequence[int]]) -> list[Tensor]:
    """What the model gives for each row alone, as logits [positions, choices] in fp32.

    Of a classifier: one position; where a text may have several labels, each is a position with two choices. Of hidden
    states: the cosines of the positions' vectors with each other, over EMBEDDING_TEMPERATURE.
    """
    with undisturbed(model):
        more = {"use_cache": False} if takes(model, "use_cache") else {}
        outputs = [model(input_ids=torch.tensor([list(row)]), **more) for row in rows]
    return [
        as_logits(out.logits if "logits" in out else out.last_hidden_state, "logits" in out, model.config.problem_type)
        for out in outputs
    ]


def onnx_logits(
    export: OnnxModel, rows: Sequence[Sequence[int]], adapter: str | None, problem_type: str | None
) -> list[Tensor]:
    """The same from the export."""
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


def compare_by_token(
    model: PreTrainedModel, export: OnnxModel, probes: Sequence[Sequence[int]], adapter: str | None
) -> Difference:
    """The first tokens of a few probes, one by one through the export's cache, against torch's whole rows."""
    short = [list(probe[:BY_TOKEN_TOKENS]) for probe in probes[:BY_TOKEN_ROWS]]
    stepped = [torch.from_numpy(export.logits(probe, adapter, by_token=True)) for probe in short]
    return compare(torch_logits(model, short), stepped)


def written(
    export: OnnxModel, prompts: Sequence[Sequence[int]], adapter: str | None, num_tokens: int
) -> list[list[int]]:
    """Greedy answers of `num_tokens` each, past any end of text: what follows one is decoded by the same graph."""
    decoding = Decoding(num_tokens, (), 0)
    return [export.generate([prompt], decoding, adapter)[0] for prompt in prompts]


def torch_steps(model: PreTrainedModel, prompt: Sequence[int], num_tokens: int) -> Callable[[], None]:
    """A function that decodes `num_tokens` greedily behind `prompt`, which torch's own cache holds already."""
    argument = "cache" if takes(model, "cache") else "past_key_values"
    begun: Any = DynamicCache()
    with torch.no_grad():
        model(input_ids=torch.tensor([list(prompt[:-1])]), use_cache=True, **{argument: begun})
    past = [tensor for layer in begun.layers for tensor in (layer.keys, layer.values)]

    @torch.no_grad()
    def run() -> None:
        cache, ids = filled_cache(past), torch.tensor([[prompt[-1]]])
        for _ in range(num_tokens):
            logits = model(input_ids=ids, use_cache=True, **{argument: cache}).logits
            ids = logits[:, -1:].argmax(-1)

    return run


def onnx_steps(export: OnnxModel, prompt: Sequence[int], num_tokens: int, adapter: str | None) -> Callable[[], None]:
    """The same through the export."""
    row = np.array([list(prompt)], np.int64)
    _, begun = export.step(row[:, :-1], np.ones_like(row[:, :-1]), export.empty_cache(1), adapter)

    def run() -> None:
        cache, ids = begun, row[:, -1:]
        for place in range(num_tokens):
            mask = np.ones((1, len(prompt) + place), np.int64)
            logits, cache = export.step(ids, mask, cache, adapter)
            ids = logits[:, -1:].argmax(-1)

    return run


def torch_prefill(model: PreTrainedModel, prompt: Sequence[int]) -> Callable[[], None]:
    """A function that reads `prompt` and gives the logits behind it."""
    more = {"logits_to_keep": 1} if takes(model, "logits_to_keep") else {}

    @torch.no_grad()
    def run() -> None:
        model(input_ids=torch.tensor([list(prompt)]), use_cache=True, **more)

    return run


def onnx_prefill(export: OnnxModel, prompt: Sequence[int], adapter: str | None) -> Callable[[], None]:
    """The same through the export."""
    row = np.array([list(prompt)], np.int64)
    return lambda: export.step(row, np.ones_like(row), export.empty_cache(1), adapter) and None


def paired_ratio(first: Callable[[], None], second: Callable[[], None], rounds: int) -> float:
    """The median over rounds of (time of `first`) / (time of `second`), measured in turns; one round warms up."""
    ratios = []
    for number in range(rounds + 1):
        times = [0.0, 0.0]
        order = ((0, first), (1, second)) if number % 2 else ((1, second), (0, first))
        for which, run in order:
            start = time.perf_counter()
            run()
            times[which] = time.perf_counter() - start
        ratios.append(times[0] / times[1])
    return statistics.median(ratios[1:])
