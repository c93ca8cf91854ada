"""Padded rows that cost as much as their tokens: between embeddings and head, a model computes tokens only.

Heads and poolings read padded rows [B, T]. Before the first block a hook lays the tokens of all rows end to end, in
[1, N], and behind the last one they are put back, zeros where padding was; attention goes segment by segment, through
the same interface as packed rows (`attention`). So embeddings, positions, heads and poolings are the model's own,
whatever they are, and no forward is changed. The idea is ModernBERT's (Warner et al. 2024, arXiv 2412.13663).

Proven on the first batch with padding: each token's hidden state must be as with padding, within rounding and within a
tenth of the error that rows which see each other show; and what is read of them must not depend, to the bit, on what
stands where padding was. Else the model keeps padded rows. Left alone: windows and chunks (their masks differ within a
segment), gates, whose tasks are given row by row, models spread over processes, and encoder-decoder models.

Legend: B rows, T positions of a padded row, N tokens of all rows.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any
from weakref import WeakKeyDictionary

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from rankwise.adapters.gate import GateLayer
from rankwise.models.attention import (
    can_segment,
    is_segmented,
    relative_error,
    restore_attention,
    rounding,
    switch_to_segments,
)
from rankwise.models.probing import backbone, undisturbed
from rankwise.models.sharding import blocks, is_sharded

MASK = "attention_mask"

_PROVEN: WeakKeyDictionary[PreTrainedModel, bool] = WeakKeyDictionary()
"""Whether a model gives the same without padding."""

_WINDOWS = (
    "sliding_window", "local_attention", "attention_window", "attention_window_size", "window_size",
    "attention_chunk_size",
)  # fmt: skip
"""Settings by which a model's attention ends short of a row."""

HOOKS_STAY_OUTSIDE = "__call__" not in vars(GradientCheckpointingLayer)
"""Whether a checkpointed block is computed again without its hooks, from what they had made of its arguments."""

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Tokens:
    """Which positions of padded rows are tokens.

    Args:
        mask: True where a token is.
        places: of all tokens, in B * T.
        lengths: of each row that has tokens, in their order.
        filling: what stands where padding was, behind the blocks.
    """

    mask: Bool[Tensor, "B T"]
    places: Int64[Tensor, " N"]
    lengths: tuple[int, ...]
    filling: float = 0.0

    @classmethod
    def of(cls, mask: Int64[Tensor, "B T"]) -> Tokens:
        """Of an attention mask: 1 for tokens, 0 for padding."""
        there = mask.bool()
        counts = there.sum(1).tolist()
        return cls(there, there.flatten().nonzero().squeeze(1), tuple(count for count in counts if count))

    def cut(self, padded: Tensor) -> Tensor:
        """[B or 1, T, ...] to [1, N, ...]."""
        rows = padded.expand(len(self.mask), *padded.shape[1:])
        return rows.flatten(0, 1).index_select(0, self.places)[None]

    def padded(self, tokens: Float[Tensor, "1 N H"]) -> Float[Tensor, "B T H"]:
        """The tokens back in their places."""
        flat = tokens.new_full((self.mask.numel(), tokens.shape[-1]), self.filling)
        return flat.index_copy(0, self.places, tokens[0]).view(*self.mask.shape, -1)


def without_padding(
    model: PreTrainedModel, inputs: Mapping[str, Any], read: Callable[[], Float[Tensor, "..."]], is_tagged: bool = False
) -> Float[Tensor, "..."]:
    """What `read` gives, computed without the padding where that is known to give the same.

    Args:
        model: which `read` calls.
        inputs: of the model's forward, with `input_ids` and `attention_mask` [B, T].
        read: calls the model on them, and returns something of each row, [B, ...].
        is_tagged: of each position rather, [B, T, ...], of which padded ones mean nothing.
    """
    if not _is_able(model):
        return read()
    mask: Tensor = inputs[MASK]
    tokens = Tokens.of(mask)
    if not mask.shape[1] < len(tokens.places) < mask.numel():
        return read()
    if model in _PROVEN and not is_segmented(model):
        del _PROVEN[model]  # its attention is another one since
    if model not in _PROVEN:
        verdict = _is_equal(model, inputs, tokens, lambda: read()[tokens.mask] if is_tagged else read())
        if verdict is None:
            return read()
        _PROVEN[model] = verdict
    if not _PROVEN[model]:
        return read()
    with _hooked(model, tokens):
        return read()


def _is_able(model: PreTrainedModel) -> bool:
    if _PROVEN.get(model) is False or model.config.is_encoder_decoder or is_sharded(model) or not can_segment(model):
        return False
    config = model.config.get_text_config()
    settings = [getattr(config, name, None) for name in _WINDOWS]
    if any(isinstance(value, (int, list, tuple)) for value in settings):
        return False
    if not {"full_attention"}.issuperset(getattr(config, "layer_types", None) or ()):
        return False
    return not any(isinstance(module, GateLayer) for module in model.modules()) and not _cuts_again(model)


def _cuts_again(model: PreTrainedModel) -> bool:
    """Whether blocks are computed again in the backward pass through their hooks, which are gone then."""
    if not (model.training and torch.is_grad_enabled()):
        return False
    if not any(getattr(module, "gradient_checkpointing", False) for module in model.modules()):
        return False
    stack = blocks(backbone(model))
    return not HOOKS_STAY_OUTSIDE or not all(isinstance(block, GradientCheckpointingLayer) for block in stack)


def _is_equal(
    model: PreTrainedModel, inputs: Mapping[str, Any], tokens: Tokens, read: Callable[[], Tensor]
) -> bool | None:
    """Whether hidden states and what is read of them are as with padding; None: this batch can't tell.

    The model's attention is segmented then.
    """
    was_segmented, proven = is_segmented(model), False
    try:
        with undisturbed(model):
            wanted = backbone(model)(**inputs)[0][tokens.mask]
            if not was_segmented and not switch_to_segments(model):
                return False
            failure = _difference(model, inputs, tokens, wanted)
            with _hooked(model, tokens):
                said = read()
            with _hooked(model, replace(tokens, filling=1.0)):
                reads_padding = not torch.equal(read(), said)
        if not failure and reads_padding:
            failure = "what is read of its hidden states depends on padding"
        if not failure and not bool(said.any()):  # a head of zeros may yet learn to read padding
            return None
        proven = not failure
    except Exception as raised:  # noqa: BLE001 (whatever a model's code makes of rows of tokens, it keeps padded ones)
        failure = f"{type(raised).__name__}: {' '.join(str(raised).split())[:120]}"
    finally:
        if not proven and not was_segmented:
            restore_attention(model)
    if failure:
        _log.info("%s computes padding too: %s", type(model).__name__, failure)
    return proven


def _difference(model: PreTrainedModel, inputs: Mapping[str, Any], tokens: Tokens, wanted: Float[Tensor, "N H"]) -> str:
    """How the hidden states of tokens alone differ from those with padding; empty: not at all, but for rounding."""

    def error(lengths: tuple[int, ...]) -> float:
        with _hooked(model, replace(tokens, lengths=lengths)):
            return relative_error(backbone(model)(**inputs)[0][tokens.mask], wanted)

    own, mixed = error(tokens.lengths), error((len(tokens.places),))
    bound = min(rounding(wanted), mixed / 10)
    return "" if own <= bound else f"hidden states differ by {own:.1e}, more than {bound:.1e}"


@contextlib.contextmanager
def _hooked(model: PreTrainedModel, tokens: Tokens) -> Iterator[None]:
    stack = blocks(backbone(model))
    held: list[Any] = []
    try:
        held += [block.register_forward_pre_hook(_Cutting(tokens), with_kwargs=True) for block in stack]
        held += [block.register_forward_hook(_Padding(tokens)) for block in stack[-1:]]
        yield
    finally:
        for handle in held:
            handle.remove()


@dataclass(frozen=True)
class _Cutting:
    """Before a block: its arguments, of tokens only. Masks of padding are none; what else has positions is cut."""

    tokens: Tokens

    def __call__(self, block: nn.Module, args: tuple[Any, ...], named: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        cut = {name: None if name == MASK else self._cut(value) for name, value in named.items()}
        return tuple(self._cut(value) for value in args), cut | {"segment_lengths": self.tokens.lengths}

    def _cut(self, value: Any) -> Any:
        if isinstance(value, tuple):
            return tuple(self._cut(one) for one in value)
        if not isinstance(value, Tensor) or value.ndim < 2:
            return value
        rows, length = self.tokens.mask.shape
        if value.ndim == 4 and value.shape[1] != length and value.shape[-1] == length:
            return None
        if value.shape[0] in (1, rows) and value.shape[1] == length:
            return None if value.ndim == 2 and not _are_positions(value) else self.tokens.cut(value)
        return value


def _are_positions(value: Tensor) -> bool:
    """Rather than a mask of two dimensions."""
    return not value.is_floating_point() and value.dtype != torch.bool


@dataclass(frozen=True)
class _Padding:
    """Behind the last block: the tokens back in padded rows."""

    tokens: Tokens

    def __call__(self, block: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        if isinstance(output, tuple):
            return (self.tokens.padded(output[0]), *output[1:])
        return self.tokens.padded(output)
