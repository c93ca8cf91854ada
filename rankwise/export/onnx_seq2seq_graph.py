"""An encoder-decoder model (T5, mT5, BART) as two ONNX graphs, with the adapter's tensors as inputs of both.

`encoder.onnx` reads the question once: inputs `input_ids` and `attention_mask` [B, S], padded on the right; outputs
`present.L.encoder.key` and `.value` [B, heads, S, width], the keys and values of each decoder layer's attention to the
question. The decoder's projections that make them belong to this graph, so that nothing is computed again for each
token of the answer. `decoder.onnx` writes: inputs `input_ids` [B, T], `encoder_attention_mask` [B, S],
`past_key_values.L.decoder.key` and `.value` [B, heads, P, width] (P may be 0), and what the encoder gave as
`past_key_values.L.encoder.key` and `.value`; outputs `logits` [B, T, V], `present.L.decoder.key` and `.value`.

Each graph has every adapter input, so that one adapter file serves both: ONNX Runtime refuses a file with tensors that
the graph has no input for, and is content with inputs that no node reads. The embedding lies in both graphs.

Legend: B rows, S tokens of the question, T new tokens of the answer, P those in the cache, V vocabulary, L layer.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, final

import torch
from onnx import ModelProto, NodeProto, TensorProto
from torch import Tensor, nn
from transformers import DynamicCache, EncoderDecoderCache, PreTrainedModel

from rankwise.errors import RequestError
from rankwise.export.onnx_folder import DECODER_FILE, ENCODER_FILE
from rankwise.export.onnx_graph import (
    NEW,
    PAST,
    RANK,
    ROWS,
    Call,
    Traced,
    current,
    places_of,
    rank_axis,
    stripped,
    traced_call,
    written_out,
)
from rankwise.export.onnx_slots import AdapterTensors, default_tensors, slotted
from rankwise.models.kv_cache import cache_argument, cache_tensors, filled_caches

SOURCE = 7
"""Tokens of the question in the example that is traced; see `onnx_graph.ROWS`."""


@final
class _Encoder(nn.Module):
    """Question to the keys and values that the decoder attends to."""

    def __init__(self, model: PreTrainedModel, places: Sequence[str]) -> None:
        super().__init__()
        self.model = model
        self.places = list(places)

    def forward(self, input_ids: Tensor, attention_mask: Tensor, adapter: list[Tensor]) -> tuple[Tensor, ...]:
        cache = EncoderDecoderCache(DynamicCache(), DynamicCache())
        arguments: dict[str, Any] = {
            "input_ids": input_ids, "attention_mask": attention_mask, "decoder_input_ids": input_ids[:, :1],
            cache_argument(self.model): cache, "use_cache": True,
        }  # fmt: skip
        torch.func.functional_call(self.model, dict(zip(self.places, adapter, strict=True)), (), arguments)
        return tuple(cache_tensors(cache.cross_attention_cache))


@final
class _Decoder(nn.Module):
    """New tokens of the answer to logits."""

    def __init__(self, model: PreTrainedModel, places: Sequence[str], width: int) -> None:
        super().__init__()
        self.model = model
        self.places = list(places)
        self.width = width

    def forward(
        self, input_ids: Tensor, mask: Tensor, past: list[Tensor], source: list[Tensor], adapter: list[Tensor]
    ) -> tuple[Tensor, ...]:
        cache = filled_caches(past, source)
        nothing = source[0].new_zeros(source[0].shape[0], source[0].shape[2], self.width)  # its shape alone is read
        arguments: dict[str, Any] = {
            "encoder_outputs": (nothing,), "attention_mask": mask, "decoder_input_ids": input_ids,
            cache_argument(self.model): cache, "use_cache": True,
        }  # fmt: skip
        output = torch.func.functional_call(self.model, dict(zip(self.places, adapter, strict=True)), (), arguments)
        return (output.logits, *cache_tensors(cache.self_attention_cache))


def export_seq2seq(model: PreTrainedModel, adapters: Sequence[AdapterTensors], folder: Path) -> dict[str, Traced]:
    """The plain fp32 `model` with inputs for `adapters` as two graphs in memory, by file.

    `folder` is for passing files. All layers are traced: T5's first, which makes the position bias, is unlike the rest.

    Raises: RequestError for a model that can't be traced.
    """
    with slotted(model, adapters, RANK) as names, written_out(model):
        places = places_of(model, names)
        example = [current(model, place) for place in places]
        dynamic = [rank_axis(name) for name in places.values()]
        shapes = _cache_shapes(model)
        calls = {
            ENCODER_FILE: _encoder_call(model, list(places), len(shapes), example, dynamic),
            DECODER_FILE: _decoder_call(model, list(places), shapes, example, dynamic),
        }
        graphs = {
            file: _pruned(stripped(traced_call(type(model).__name__, call, list(places.values()), folder)))
            for file, call in calls.items()
        }
    defaults = default_tensors(model, names, adapters)
    return {file: Traced(graph, names, defaults) for file, graph in graphs.items()}


@torch.no_grad()
def _cache_shapes(model: PreTrainedModel) -> list[tuple[int, int]]:
    """Heads and width of each tensor of the cache of answers, and of questions: they are alike.

    Raises: RequestError for a model whose cache is not keys and values.
    """
    cache, ids = EncoderDecoderCache(DynamicCache(), DynamicCache()), torch.zeros(1, 2, dtype=torch.long)
    model(input_ids=ids, decoder_input_ids=ids, use_cache=True, **{cache_argument(model): cache})
    own, source = (
        [(tensor.shape[1], tensor.shape[3]) for tensor in cache_tensors(part) if tensor.ndim == 4]
        for part in (cache.self_attention_cache, cache.cross_attention_cache)
    )
    if not own or own != source:
        raise RequestError(
            f"{type(model).__name__} keeps more than keys and values between tokens, which this export can't carry; "
            "export with --to merged"
        )
    return own


def _names(prefix: str, side: str, num_tensors: int) -> list[str]:
    return [f"{prefix}.{layer}.{side}.{which}" for layer in range(num_tensors // 2) for which in ("key", "value")]


def _encoder_call(
    model: PreTrainedModel, places: list[str], num_tensors: int, example: list[Tensor], dynamic: list[dict[int, Any]]
) -> Call:
    axes = {0: torch.export.Dim("rows"), 1: torch.export.Dim("source")}
    ids = torch.zeros(ROWS, SOURCE, dtype=torch.long)
    return Call(
        _Encoder(model, places), (ids, torch.ones_like(ids), example), (axes, axes, dynamic),
        ["input_ids", "attention_mask"], _names("present", "encoder", num_tensors),
    )  # fmt: skip


def _decoder_call(
    model: PreTrainedModel, places: list[str], shapes: list[tuple[int, int]], example: list[Tensor],
    dynamic: list[dict[int, Any]],
) -> Call:  # fmt: skip
    rows, new, past, source = (torch.export.Dim(name) for name in ("rows", "new", "past", "source"))
    embedding: Any = model.get_input_embeddings()
    return Call(
        _Decoder(model, places, embedding.weight.shape[1]),
        (
            torch.zeros(ROWS, NEW, dtype=torch.long),
            torch.ones(ROWS, SOURCE, dtype=torch.long),
            [torch.zeros(ROWS, heads, PAST, width) for heads, width in shapes],
            [torch.zeros(ROWS, heads, SOURCE, width) for heads, width in shapes],
            example,
        ),
        (
            {0: rows, 1: new},
            {0: rows, 1: source},
            [{0: rows, 2: past} for _ in shapes],
            [{0: rows, 2: source} for _ in shapes],
            dynamic,
        ),
        [
            "input_ids",
            "encoder_attention_mask",
            *_names("past_key_values", "decoder", len(shapes)),
            *_names("past_key_values", "encoder", len(shapes)),
        ],
        ["logits", *_names("present", "decoder", len(shapes))],
    )


def _pruned(model: ModelProto) -> ModelProto:
    """Without nodes and weights that no output needs: each graph is traced from the whole model."""
    graph = model.graph
    needed = {value.name for value in graph.output}
    kept: list[NodeProto] = []
    for node in reversed(graph.node):
        if needed.intersection(node.output):
            kept.append(node)
            needed.update(node.input)
    nodes = [NodeProto.FromString(node.SerializeToString()) for node in reversed(kept)]
    tensors = [
        TensorProto.FromString(tensor.SerializeToString()) for tensor in graph.initializer if tensor.name in needed
    ]
    del graph.node[:]
    del graph.initializer[:]
    graph.node.extend(nodes)
    graph.initializer.extend(tensors)
    return model
