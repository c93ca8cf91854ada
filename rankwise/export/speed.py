"""How fast an artefact is against the model in torch: the same tokens by both, measured in turns."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, EncoderDecoderCache, PreTrainedModel

from rankwise.models.kv_cache import cache_argument, cache_tensors, filled_cache
from rankwise.models.probing import takes, undisturbed
from rankwise.models.seq2seq import start_token_id, writes_apart

TIMED_TOKENS, TIMED_ROUNDS = 8, 3
Run = Callable[[], None]


def paired_ratio(first: Run, second: Run, rounds: int = TIMED_ROUNDS) -> float:
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


def torch_run(model: PreTrainedModel, prompt: Sequence[int], num_tokens: int = TIMED_TOKENS) -> Run:
    """What is timed of a model: `num_tokens` written behind `prompt`; of one that does not write, a pass over it."""
    if writes_apart(model):
        return torch_answer(model, prompt, num_tokens)
    return torch_steps(model, prompt, num_tokens) if model.can_generate() else torch_pass(model, prompt)


def what_is_timed(model: PreTrainedModel, prompt: Sequence[int], num_tokens: int = TIMED_TOKENS) -> str:
    """For a note: what `torch_run` runs."""
    if not model.can_generate():
        return f"a pass over {len(prompt)} tokens"
    return f"{num_tokens} tokens behind {len(prompt)}"


def torch_steps(model: PreTrainedModel, prompt: Sequence[int], num_tokens: int) -> Run:
    """A function that decodes `num_tokens` greedily behind `prompt`, which torch's own cache holds already."""
    argument = cache_argument(model)
    begun = DynamicCache()
    if len(prompt) > 1:
        with torch.no_grad():
            model(input_ids=_row(model, prompt[:-1]), use_cache=True, **{argument: begun})
    past = cache_tensors(begun)

    @torch.no_grad()
    def run() -> None:
        cache, ids = filled_cache(past), _row(model, prompt[-1:])
        for _ in range(num_tokens):
            logits = model(input_ids=ids, use_cache=True, **{argument: cache}).logits
            ids = logits[:, -1:].argmax(-1)

    return run


def torch_prefill(model: PreTrainedModel, prompt: Sequence[int]) -> Run:
    """A function that reads `prompt` and gives the logits behind it."""
    more = {"logits_to_keep": 1} if takes(model, "logits_to_keep") else {}

    @torch.no_grad()
    def run() -> None:
        model(input_ids=_row(model, prompt), use_cache=True, **more)

    return run


def torch_answer(model: PreTrainedModel, question: Sequence[int], num_tokens: int) -> Run:
    """Of an encoder-decoder model: a function that reads `question` and writes `num_tokens` greedily."""
    ids, start = _row(model, question), start_token_id(model)
    mask = torch.ones_like(ids)
    encode: Any = model.get_encoder()

    @torch.no_grad()
    def run() -> None:
        cache, new = EncoderDecoderCache(DynamicCache(), DynamicCache()), _row(model, [start])
        encoded = encode(input_ids=ids, attention_mask=mask)
        for _ in range(num_tokens):
            given = {"encoder_outputs": encoded, "attention_mask": mask, "decoder_input_ids": new}
            logits = model(**given, use_cache=True, **{cache_argument(model): cache}).logits
            new = logits[:, -1:].argmax(-1)

    return run


def torch_pass(model: PreTrainedModel, row: Sequence[int]) -> Run:
    """Of an encoder or a classifier: a function that reads `row`."""
    ids = _row(model, row)

    def run() -> None:
        with undisturbed(model):
            model(input_ids=ids, attention_mask=torch.ones_like(ids))

    return run


def _row(model: PreTrainedModel, ids: Sequence[int]) -> Tensor:
    return torch.tensor([list(ids)], device=model.device)
