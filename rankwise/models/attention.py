"""Packed rows: examples end to end in one row, each attending only to itself, proven before it is used.

Two ways. `segments` gives each example to the model's own attention (sdpa or eager) one at a time, through
transformers' attention interface: no work is spent on pairs of positions that may not see each other. On CUDA all of
them go through one flash attention kernel where it can do what a layer asks for (`varlen`). `mask` leaves the model
alone and relies on the block-diagonal mask that transformers builds from position ids that restart; it costs the square
of the whole row. Both are checked numerically on the model itself: packed rows must equal each row alone under the
model's stock attention. Position ids restart in each example either way.

Models in bf16 on a CPU that multiplies it attend by blocks (`blocked`), packed or not, through the same interface.

Not here: encoder-decoder models (T5), whose cross attention would have to be packed too; they train with padded rows.
"""

from __future__ import annotations

import logging
import math
import sys
from collections.abc import Callable
from typing import Any, Literal
from weakref import WeakKeyDictionary, WeakSet

import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import eager_mask, sdpa_mask

from rankwise.errors import RequestError
from rankwise.models import blocked
from rankwise.models.batch import Batch
from rankwise.models.probing import backbone, takes, undisturbed
from rankwise.models.quiet import quietly
from rankwise.models.sharding import inside_forward
from rankwise.models.varlen import attend, kernel_for, window_of

PackingMode = Literal["segments", "mask"]

SEGMENTED = {"sdpa": "rankwise_segments", "eager": "rankwise_segments_eager"}
"""The name under which each stock attention is registered with segments. Without segments both behave as stock."""

_STOCK = {segmented: stock for stock, segmented in SEGMENTED.items()}
_MODES: WeakKeyDictionary[PreTrainedModel, PackingMode] = WeakKeyDictionary()
_LOOKED_AT: WeakSet[PreTrainedModel] = WeakSet()
"""Models of which `prefer_blocks` has decided."""

_TOLERANCES = {torch.float64: 1e-6, torch.float32: 1e-4, torch.bfloat16: 0.1, torch.float16: 0.05}
"""Relative error of a token's hidden state that rounding explains, by dtype. It must also be under a tenth of the error
that samples show when they do see each other (0.2 to 1 on real models), else the probe proves nothing."""

_CUTTABLE = {"full_attention", "sliding_attention"}
"""Layer types whose mask depends on distance only; Llama 4's chunks count from the row's start, and need `mask`."""

_PROBE_ERRORS = (TypeError, ValueError, RuntimeError, KeyError, AttributeError, NotImplementedError)
"""What a model raises when its forward does not know our arguments."""

_log = logging.getLogger(__name__)

_Attention = Callable[..., tuple[Tensor, Tensor | None]]


def _per_segment(
    stock: _Attention,
    module: nn.Module,
    qkv: tuple[Tensor, Tensor, Tensor],
    mask: Tensor | None,
    segment_lengths: tuple[int, ...] | None,
    options: dict[str, Any],
) -> tuple[Tensor, Tensor | None]:
    """Stock attention on each segment of `qkv` [1, heads, N, head_dim], with its block of `mask` [1, 1 or heads, N, N].

    A mask of causal and sliding-window kind depends on the distance of two positions only, so its diagonal blocks are
    the masks of the segments alone.
    """
    if segment_lengths is None:
        return stock(module, *qkv, mask, **options)
    lengths = list(segment_lengths)
    num_tokens = sum(lengths)
    _check_packed(qkv, num_tokens)
    if options.get("position_bias") is not None:
        raise NotImplementedError("a position bias cannot be cut into segments")
    causal_within = _causal_within(stock, module, options)
    outputs = []
    start = 0
    for query, key, value in zip(*(part.split(lengths, dim=2) for part in qkv), strict=True):
        length = query.shape[2]
        own = mask
        if mask is not None:
            own = None if length <= causal_within else mask[..., start : start + length, start : start + length]
        outputs.append(stock(module, query, key, value, own, **options)[0])
        start += length
    return torch.cat(outputs, dim=1), None


def _check_packed(qkv: tuple[Tensor, Tensor, Tensor], num_tokens: int) -> None:
    if any(part.shape[0] != 1 or part.shape[2] != num_tokens for part in qkv):
        raise NotImplementedError("packed rows go through self-attention in one row, without a cache")


def _causal_within(stock: _Attention, module: nn.Module, options: dict[str, Any]) -> int:
    """The length up to which a windowed mask is plainly causal, which sdpa does faster without a mask."""
    window = options.get("sliding_window")
    if stock is _sdpa and isinstance(window, int) and vars(module).get("is_causal") is True:
        return window
    return 0


def _sdpa(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    **options: Any,  # transformers' attention interface: what each family passes on to its attention
) -> tuple[Tensor, Tensor | None]:
    """Stock sdpa attention, or the same by blocks where that is faster."""
    beyond = any(options.get(name) for name in ("dropout", "softcap", "output_attentions"))
    if beyond or options.get("position_bias") is not None or not blocked.fits(query, key, value, attention_mask):
        return sdpa_attention_forward(module, query, key, value, attention_mask, **options)
    causal = options.get("is_causal")
    if causal is None:
        causal = getattr(module, "is_causal", True)  # as sdpa_attention_forward has it
    causal = bool(causal) and attention_mask is None
    return blocked.blocked_attention(query, key, value, attention_mask, causal, options.get("scaling")), None


def _sdpa_segments(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    segment_lengths: tuple[int, ...] | None = None,
    **options: Any,  # the same
) -> tuple[Tensor, Tensor | None]:
    qkv = query, key, value
    kernel = None if segment_lengths is None else kernel_for(query, value)
    window = window_of(module, attention_mask, options)
    if kernel is not None and segment_lengths is not None and window is not None:
        _check_packed(qkv, sum(segment_lengths))
        return attend(kernel, qkv, list(segment_lengths), options.get("scaling"), window), None
    return _per_segment(_sdpa, module, qkv, attention_mask, segment_lengths, options)


def _eager_segments(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    segment_lengths: tuple[int, ...] | None = None,
    **options: Any,  # the same
) -> tuple[Tensor, Tensor | None]:
    eager = _eager_attention(type(module))
    return _per_segment(eager, module, (query, key, value), attention_mask, segment_lengths, options)


def _eager_attention(cls: type) -> _Attention:
    """The family's own eager attention, which lies beside its attention class (Gemma 2's caps the scores)."""
    for parent in cls.__mro__:
        found = vars(sys.modules[parent.__module__]).get("eager_attention_forward")
        if found is not None:
            return found
    raise NotImplementedError(f"{cls.__name__} has no eager attention to call")


AttentionInterface.register(SEGMENTED["sdpa"], _sdpa_segments)
AttentionInterface.register(SEGMENTED["eager"], _eager_segments)
# Without these two, padded batches would get no mask at all, in silence.
AttentionMaskInterface.register(SEGMENTED["sdpa"], sdpa_mask)
AttentionMaskInterface.register(SEGMENTED["eager"], eager_mask)


def packing_mode(model: PreTrainedModel) -> PackingMode:
    """Prepares the model for packed rows, once, and proves on a small probe that samples do not see each other.

    With `segments` the model's attention implementation is switched to ours; other calls, such as generation, behave
    as before.

    Raises: RequestError when neither way gives what each row alone gives.
    """
    mode = _MODES.get(model)
    if mode is not None and (mode == "mask" or is_segmented(model)):
        return mode
    if model.config.is_encoder_decoder:
        raise _refusal(model, "it is an encoder-decoder model")
    return inside_forward(model, lambda: _proven_mode(model))


def _proven_mode(model: PreTrainedModel) -> PackingMode:
    restore_attention(model)
    rows, packed = _probe_batch(model)
    failures: list[str] = []
    with undisturbed(model):
        alone = [backbone(model)(input_ids=ids)[0] for ids in rows]
        if not all(bool(output.isfinite().all()) for output in alone):
            raise RequestError(
                f"{type(model).__name__} gives inf or nan for a row of a few tokens: its weights or its adapter hold "
                f"such numbers, or {str(model.dtype).removeprefix('torch.')} is too narrow for it; load another, or "
                "set train.precision=fp32"
            )
        as_one_sample = {"input_ids": packed.input_ids, "attention_mask": torch.ones_like(packed.input_ids)}
        mixed = _packed_error(model, as_one_sample, alone)
        bound = min(rounding(alone[0]), mixed / 10)
        for mode in ("segments", "mask"):
            if mode == "segments" and not switch_to_segments(model):
                continue
            try:
                error = _packed_error(model, packed_inputs(packed, mode, backbone(model)), alone)
                failure = f"packed rows differ from rows alone by {error:.1e}, more than {bound:.1e} ({model.dtype})"
            except _PROBE_ERRORS as raised:
                error, failure = math.inf, f"{type(raised).__name__}: {' '.join(str(raised).split())[:120]}"
            if error <= bound:
                _MODES[model] = mode
                return mode
            restore_attention(model)
            failures.append(f"{mode}: {failure}")
    raise _refusal(model, "; ".join(failures))


def _refusal(model: PreTrainedModel, reason: str) -> RequestError:
    return RequestError(f"{type(model).__name__} cannot keep packed samples apart ({reason}); set data.packing=false")


def packed_inputs(batch: Batch, mode: PackingMode, model: PreTrainedModel) -> dict[str, Any]:
    """The arguments of the model's forward for a packed batch."""
    assert batch.segment_lengths is not None and batch.position_ids is not None, "the batch is not packed"
    inputs: dict[str, Any] = {"input_ids": batch.input_ids, "position_ids": batch.position_ids}
    if mode == "segments":
        # A mask of ones keeps transformers from building the block mask that segments make needless.
        inputs |= {"attention_mask": torch.ones_like(batch.input_ids), "segment_lengths": batch.segment_lengths}
    return inputs | _no_cache(model)


def forward_inputs(batch: Batch, model: PreTrainedModel) -> dict[str, Any]:
    """The arguments of the model's forward for any batch, padded or packed.

    Raises: RequestError when the batch is packed and the model cannot keep samples apart.
    """
    if batch.is_packed:
        return packed_inputs(batch, packing_mode(model), model)
    inputs: dict[str, Any] = {"input_ids": batch.input_ids}
    if batch.attention_mask is not None:
        inputs["attention_mask"] = batch.attention_mask
    if batch.position_ids is not None:
        inputs["position_ids"] = batch.position_ids
    inputs |= _no_cache(model)
    prefer_blocks(model, inputs)
    return inputs


def _no_cache(model: PreTrainedModel) -> dict[str, Any]:
    return {"use_cache": False} if takes(model, "use_cache") else {}


def prefer_blocks(model: PreTrainedModel, inputs: dict[str, Any]) -> None:
    """Lets a bf16 model on a CPU that multiplies bf16 attend by blocks, once proven equal on its first `inputs`.

    Only what goes through stock sdpa attention changes, and only where blocks are faster (`blocked`). No other model is
    touched. The first batch itself is the probe, since rows may be routed: another number of rows would not fit.
    """
    if model in _LOOKED_AT:
        return
    _LOOKED_AT.add(model)
    able = model.device.type == "cpu" and model.dtype == torch.bfloat16 and blocked.has_bf16_products()
    if able and not model.config.is_encoder_decoder and _implementation(model) == "sdpa":
        inside_forward(model, lambda: _switch_if_equal(model, inputs))


def _switch_if_equal(model: PreTrainedModel, inputs: dict[str, Any]) -> None:
    mask = inputs.get("attention_mask")
    seen = torch.ones_like(inputs["input_ids"], dtype=torch.bool) if mask is None else mask.bool()
    with undisturbed(model):
        wanted = backbone(model)(**inputs)[0][seen]
        if not switch_to_segments(model):
            return
        error = relative_error(backbone(model)(**inputs)[0][seen], wanted)
    if not error <= _TOLERANCES[torch.bfloat16]:
        _log.warning("%s keeps stock attention: by blocks it is off by %.1e", type(model).__name__, error)
        restore_attention(model)


def restore_attention(model: PreTrainedModel) -> None:
    """Gives the model its stock attention implementation back."""
    _MODES.pop(model, None)
    stock = _STOCK.get(_implementation(model))
    if stock is not None:
        model.set_attn_implementation(stock)


def _implementation(model: PreTrainedModel) -> str:
    return str(backbone(model).config._attn_implementation)


def rounding(hidden: Tensor) -> float:
    """The `relative_error` that rounding explains, of hidden states computed in this context (autocast or not)."""
    kind = hidden.device.type
    return _TOLERANCES.get(torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else hidden.dtype, 1e-4)


def is_segmented(model: PreTrainedModel) -> bool:
    """Whether the model attends through our interface, which takes segments."""
    return _implementation(model) in _STOCK


def _twin(model: PreTrainedModel) -> str | None:
    """The segmented implementation that stands for the model's own; None: there is none."""
    layer_types = vars(model.config.get_text_config()).get("layer_types") or ()
    implementations = {
        str(module.config._attn_implementation) for module in model.modules() if isinstance(module, PreTrainedModel)
    }
    if not _CUTTABLE.issuperset(layer_types) or len(implementations) != 1:
        return None
    return SEGMENTED.get(implementations.pop())


def can_segment(model: PreTrainedModel) -> bool:
    """Whether the model's stock attention has a segmented twin, or is one."""
    return is_segmented(model) or _twin(model) is not None


def switch_to_segments(model: PreTrainedModel) -> bool:
    """Whether the model's stock attention has a segmented twin, which it now uses."""
    twin = _twin(model)
    if twin is None:
        return False
    with quietly():
        model.set_attn_implementation(twin)
    return is_segmented(model)


def _probe_batch(model: PreTrainedModel) -> tuple[list[Int64[Tensor, "1 _"]], Batch]:
    """Two rows of random tokens, and both packed; the first outgrows the model's window if that is short enough."""
    text = model.config.get_text_config()
    window = vars(text).get("sliding_window")
    longest = 2 * window if isinstance(window, int) and window <= 64 else 13
    generator = torch.Generator().manual_seed(0)
    rows = [torch.randint(text.vocab_size, (1, length), generator=generator) for length in (longest, 7)]
    ids = torch.cat(rows, dim=1)
    batch = Batch(
        input_ids=ids,
        labels=ids,
        example_index=torch.cat([torch.full_like(row, index) for index, row in enumerate(rows)], dim=1),
        num_examples=len(rows),
        position_ids=torch.cat([torch.arange(row.shape[1])[None] for row in rows], dim=1),
        segment_lengths=tuple(row.shape[1] for row in rows),
    )
    return [row.to(model.device) for row in rows], batch.to(model.device)


def _packed_error(model: PreTrainedModel, inputs: dict[str, Any], alone: list[Float[Tensor, "1 _ H"]]) -> float:
    """How far the rows of a packed forward are from the rows alone, relative, the worse row."""
    hidden = backbone(model)(**inputs)[0]
    parts = hidden.split([row.shape[1] for row in alone], dim=1)
    return max(relative_error(part, row) for part, row in zip(parts, alone, strict=True))


def relative_error(found: Float[Tensor, "... H"], wanted: Float[Tensor, "... H"]) -> float:
    """Relative error that nine tokens in ten stay under: rounding may send single tokens to another expert."""
    difference = (found.double() - wanted.double()).norm(dim=-1) / wanted.double().norm(dim=-1)
    return float(difference.flatten().quantile(0.9))
