"""Padded rows that cost as much as their tokens: between embeddings and head, a model computes tokens only.

Heads and poolings read padded rows [B, T]. Before the first block a hook lays the tokens of all rows end to end, in
[1, N], and behind the last one they are put back, zeros where padding was; attention goes segment by segment, through
the same interface as packed rows (`attention`). So embeddings, positions, heads and poolings are the model's own,
whatever they are, and no forward is changed. The idea is ModernBERT's (Warner et al. 2024, arXiv 2412.13663).

Proven on the first batch with padding, which must give each token's hidden state, and what is made of them, as with
padding; else the model keeps padded rows. Left alone: windows and chunks (their masks differ within a segment), gates,
whose tasks are given row by row, models spread over processes, and encoder-decoder models.

Legend: B rows, T positions of a padded row, N tokens of all rows.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor, nn
from transformers import PreTrainedModel

from rankwise.adapters.gate import GateLayer
from rankwise.models.attention import relative_error, restore_attention, rounding, switch_to_segments
from rankwise.models.probing import backbone, undisturbed
from rankwise.models.sharding import blocks, is_sharded

HIDDEN, MASK = "hidden_states", "attention_mask"

_PROVEN: WeakKeyDictionary[PreTrainedModel, bool] = WeakKeyDictionary()
"""Whether a model gives the same without padding."""

_WINDOWS = ("sliding_window", "local_attention", "attention_window", "attention_chunk_size")
"""Settings by which a model's attention ends short of a row."""

_FAILURES = (TypeError, ValueError, RuntimeError, KeyError, AttributeError, NotImplementedError, IndexError)
"""What a model raises whose blocks are called otherwise."""

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Tokens:
    """Which positions of padded rows are tokens.

    Args:
        mask: True where a token is.
        places: of all tokens, in B * T.
        lengths: of each row that has tokens, in their order.
    """

    mask: Bool[Tensor, "B T"]
    places: Int64[Tensor, " N"]
    lengths: tuple[int, ...]

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
        """The tokens back in their places, zeros elsewhere."""
        flat = tokens.new_zeros(self.mask.numel(), tokens.shape[-1]).index_copy(0, self.places, tokens[0])
        return flat.view(*self.mask.shape, -1)


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
    mask: Tensor = inputs[MASK]
    tokens = Tokens.of(mask)
    if not mask.shape[1] < len(tokens.places) < mask.numel() or not _is_able(model):
        return read()
    if model not in _PROVEN:
        _PROVEN[model] = _is_equal(model, inputs, tokens, lambda: read()[tokens.mask] if is_tagged else read())
    if not _PROVEN[model]:
        return read()
    with _hooked(model, tokens):
        return read()


def _is_able(model: PreTrainedModel) -> bool:
    config = model.config.get_text_config()
    if model.config.is_encoder_decoder or is_sharded(model) or not _PROVEN.get(model, True):
        return False
    if any(isinstance(getattr(config, name, None), int) for name in _WINDOWS):
        return False
    if not {"full_attention"}.issuperset(getattr(config, "layer_types", None) or ()):
        return False
    return not any(isinstance(module, GateLayer) for module in model.modules())


def _is_equal(model: PreTrainedModel, inputs: Mapping[str, Any], tokens: Tokens, read: Callable[[], Tensor]) -> bool:
    """Whether hidden states and what is read of them are as with padding. The model's attention is segmented then."""
    part = backbone(model)
    with undisturbed(model):
        wanted, said = part(**inputs)[0][tokens.mask], read()
        if not switch_to_segments(model):
            return False
        try:
            with _hooked(model, tokens):
                error = relative_error(part(**inputs)[0][tokens.mask], wanted)
                error = max(error, float((read() - said).abs().max() / said.abs().max()))
            failure = f"hidden states, or what is read of them, differ by {error:.1e}"
        except _FAILURES as raised:
            error, failure = torch.inf, f"{type(raised).__name__}: {' '.join(str(raised).split())[:120]}"
    if error <= rounding(wanted.dtype):
        return True
    restore_attention(model)
    _log.info("%s computes padding too: %s", type(model).__name__, failure)
    return False


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
        if value.ndim == 4 and value.shape[-1] == length and value.shape[-2] in (1, length):
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
