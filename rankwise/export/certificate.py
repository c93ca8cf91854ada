"""What merging changed, measured: logits of the adapter model against those of the merged model.

Both models run in fp32 arithmetic on the weights as they are stored, so that the figures show what rounding the merged
weights changed, on any machine. Legend: V the vocabulary (for an encoder without a head, the probe's own positions);
the other axis is the positions of one probe.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int64
from torch import Tensor
from transformers import PreTrainedModel

from rankwise.errors import RequestError
from rankwise.models.labels import MULTI
from rankwise.models.probing import takes, undisturbed
from rankwise.models.seq2seq import decoder_inputs, start_token_id

KL_BOUNDS = {"fp32": 1e-6, "fp16": 1e-3, "bf16": 2e-2}
"""The largest mean KL(adapter || merged), in nats for each token, that a merged model of a dtype may have."""
LARGEST_SHARE = 0.5
"""And the largest share of the adapter's own effect: past it, rounding has drowned what the adapter does."""
MAX_PROBE_TOKENS = 512
EMBEDDING_TEMPERATURE = 0.05
CHUNK_TOKENS = 64
"""Positions compared at once in fp64: 64 x 150,000 x 8 bytes is 77 MB."""


@dataclass(frozen=True)
class Difference:
    """Logits of two models on the same tokens; `kl` is KL(first || second), mean over positions, in nats."""

    max_abs_diff: float
    mean_abs_diff: float
    kl: float
    top1_agreement: float
    num_tokens: int


@dataclass(frozen=True)
class Certificate:
    """What `merge_certificate.json` holds.

    `adapter_effect_kl`: KL(adapter || base), to compare `kl` with. `probes`: where the probe texts came from.
    `verdict`: `pass`, or `fail` when `kl` is above `bound`. `dequantised_from`: how the base that was compared with
    stored its weights (`8bit`, `nf4`, `fp4`), and the merged model does not; None for plain numbers.
    """

    dtype: str
    max_abs_diff: float
    mean_abs_diff: float
    kl: float
    bound: float
    top1_agreement: float
    adapter_effect_kl: float
    num_probe_tokens: int
    probes: str
    compared_in: str
    verdict: str
    dequantised_from: str | None = None

    def to_dict(self) -> dict[str, Any]:
        """As plain values for JSON."""
        return asdict(self)


def certify(
    dtype: str, merged: Difference, effect: Difference, probes: str, dequantised_from: str | None = None
) -> Certificate:
    """The verdict on a merged model of `dtype`: a KL that is no number fails too."""
    bound = max(KL_BOUNDS["fp32"], min(KL_BOUNDS[dtype], LARGEST_SHARE * effect.kl))
    return Certificate(
        dtype=dtype, max_abs_diff=merged.max_abs_diff, mean_abs_diff=merged.mean_abs_diff, kl=merged.kl, bound=bound,
        top1_agreement=merged.top1_agreement, adapter_effect_kl=effect.kl, num_probe_tokens=merged.num_tokens,
        probes=probes, compared_in="fp32", verdict="pass" if merged.kl <= bound else "fail",
        dequantised_from=dequantised_from,
    )  # fmt: skip


def trim_probes(probes: Sequence[Sequence[int]], most: int = MAX_PROBE_TOKENS) -> list[tuple[int, ...]]:
    """The first probes that hold `most` tokens in all, the last one cut.

    Raises: RequestError when no token is left.
    """
    kept: list[tuple[int, ...]] = []
    for probe in probes:
        room = most - sum(len(k) for k in kept)
        if room > 0 and probe:
            kept.append(tuple(probe[:room]))
    if not kept:
        raise RequestError("there is no probe token to compare the merged model on; give a text")
    return kept


def probe_logits(model: PreTrainedModel, probes: Sequence[Sequence[int]]) -> list[Float[Tensor, "_ _"]]:
    """Logits of each probe run alone, fp32 on the CPU; dropout off, no gradient."""
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad():
            rows = [torch.tensor([list(probe)], device=model.device) for probe in probes]
            return [_logits(model, row)[0].float().cpu() for row in rows]
    finally:
        model.train(was_training)


def answer_logits(model: PreTrainedModel, question: Sequence[int], answer: Sequence[int]) -> Float[Tensor, "_ _"]:
    """Of an encoder-decoder model: the logits from which each token of `answer` is chosen, fp32 on the CPU."""
    rows = [torch.tensor([list(ids)], device=model.device) for ids in (question, [start_token_id(model), *answer[:-1]])]
    with undisturbed(model):
        return model(input_ids=rows[0], decoder_input_ids=rows[1], use_cache=False).logits[0].float().cpu()


def _logits(model: PreTrainedModel, row: Int64[Tensor, "1 _"]) -> Float[Tensor, "1 _ V"]:
    """Of an encoder-decoder model: when both sides are given the probe. Of a classifier: one position.

    Where a text may have several labels, each is a position with two classes. An encoder without a head has no logits:
    the cosines of the probe's vectors with each other, over EMBEDDING_TEMPERATURE, stand for them.
    """
    if model.config.is_encoder_decoder:
        return model(input_ids=row, decoder_input_ids=decoder_inputs(model, row), use_cache=False).logits
    output = model(input_ids=row, use_cache=False) if takes(model, "use_cache") else model(input_ids=row)
    if "logits" not in output:
        vectors = F.normalize(output.last_hidden_state, dim=-1)
        return vectors @ vectors.transpose(1, 2) / EMBEDDING_TEMPERATURE
    if output.logits.ndim == 3:
        return output.logits
    if model.config.problem_type == MULTI:
        return torch.stack([output.logits, torch.zeros_like(output.logits)], dim=-1)
    return output.logits[:, None]


def compare(first: Sequence[Float[Tensor, "_ _"]], second: Sequence[Float[Tensor, "_ _"]]) -> Difference:
    """How the second model's logits differ from the first's, over all positions of all probes.

    Raises: RequestError when the two have different shapes.
    """
    if [tuple(t.shape) for t in first] != [tuple(t.shape) for t in second]:
        raise RequestError("the two models' logits have different shapes: their vocabularies differ")
    largest, total, kl, same, num_tokens, num_values = 0.0, 0.0, 0.0, 0, 0, 0
    for one, other in zip(first, second, strict=True):
        for a, b in zip(one.double().split(CHUNK_TOKENS), other.double().split(CHUNK_TOKENS), strict=True):
            difference = (a - b).abs()
            largest = max(largest, float(difference.max())) if difference.isfinite().all() else float("nan")
            total += float(difference.sum())
            log_p, log_q = a.log_softmax(-1), b.log_softmax(-1)
            kl += float((log_p.exp() * (log_p - log_q)).sum())
            same += int((a.argmax(-1) == b.argmax(-1)).sum())
            num_tokens += a.shape[0]
            num_values += a.numel()
    # rounding may leave a divergence of nothing just below 0; NaN stays NaN
    mean_kl = 0.0 if -1e-12 < kl / num_tokens < 0.0 else kl / num_tokens
    return Difference(largest, total / num_values, mean_kl, same / num_tokens, num_tokens)
