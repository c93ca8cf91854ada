"""A model as one ONNX graph: prefill and decode in the same graph, adapters as inputs.

Inputs of a causal model: `input_ids` [B, T], `attention_mask` [B, P + T] (1 where there is a token; rows are padded on
the left), `logit_positions` [K] (which of the T positions get logits), `past_key_values.L.key` and `.value`
[B, heads, P, width], and the adapter's tensors. P may be 0. Outputs: `logits` [B, K, V], `present.L.key` and `.value`.
Positions are counted from the attention mask inside the graph. An encoder takes `input_ids`, `attention_mask` and
`token_type_ids` where the model has them, padded on the right; it gives `logits`, or `last_hidden_state`.

Adapter inputs have initializers of the same names as defaults, of rank 0 (or the base's own tensor), so that a run
without an adapter is the base. ONNX Runtime refuses adapter inputs that are required.

Attention is written out (`eager`): with rows that are wholly padded, sdpa's form gives NaN outside of torch.
Legend: B rows, T new tokens, P tokens in the cache, K positions, V vocabulary, L layer.
"""

from __future__ import annotations

import contextlib
import logging
import tempfile
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, final

import onnx
import torch
from onnx import ModelProto
from torch import Tensor, nn
from transformers import DynamicCache, PreTrainedModel

from rankwise.errors import RequestError
from rankwise.export.onnx_layers import copy_layers, cut_to_traced, equal_layers
from rankwise.export.onnx_slots import AdapterTensors, Slot, default_tensors, evened_out, slotted
from rankwise.models.kv_cache import cache_argument, cache_tensors, filled_cache
from rankwise.models.probing import takes
from rankwise.models.quiet import quietly

CAUSAL = "causal-lm"
ROOT = "model."
"""What the tracer puts before the model's own names."""
ROWS, NEW, PAST, POSITIONS, RANK = 2, 3, 5, 4, 6
"""Sizes of the example that is traced: all different, so that no two axes are taken for one."""


@dataclass(frozen=True)
class Traced:
    """A graph, the names of its adapter inputs, and what they hold where no adapter is active."""

    model: ModelProto
    adapter_inputs: list[str]
    defaults: dict[str, Tensor]


@final
class _Causal(nn.Module):
    """The model as a function of plain tensors."""

    def __init__(self, model: PreTrainedModel, places: Sequence[str]) -> None:
        super().__init__()
        self.model = model
        self.places = list(places)
        self.cache_argument = cache_argument(model)
        self.keeps = takes(model, "logits_to_keep")

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor, logit_positions: Tensor, past: list[Tensor],
        adapter: list[Tensor],
    ) -> tuple[Tensor, ...]:  # fmt: skip
        cache = filled_cache(past)
        positions = (attention_mask.cumsum(-1) - 1).clamp(min=0)[:, past[0].shape[2] :]
        arguments: dict[str, Any] = {
            "input_ids": input_ids, "attention_mask": attention_mask, "position_ids": positions,
            self.cache_argument: cache, "use_cache": True,
        }  # fmt: skip
        if self.keeps:
            arguments["logits_to_keep"] = logit_positions
        output = torch.func.functional_call(self.model, dict(zip(self.places, adapter, strict=True)), (), arguments)
        logits = output.logits if self.keeps else output.logits[:, logit_positions]
        return (logits, *cache_tensors(cache))


@final
class _Encoder(nn.Module):
    """An encoder or a classifier as a function of plain tensors."""

    def __init__(self, model: PreTrainedModel, places: Sequence[str], inputs: Sequence[str]) -> None:
        super().__init__()
        self.model = model
        self.places = list(places)
        self.inputs = list(inputs)

    def forward(self, inputs: list[Tensor], adapter: list[Tensor]) -> Tensor:
        arguments = dict(zip(self.inputs, inputs, strict=True))
        output = torch.func.functional_call(self.model, dict(zip(self.places, adapter, strict=True)), (), arguments)
        return output.logits if "logits" in output else output.last_hidden_state


def cache_shapes(model: PreTrainedModel) -> list[tuple[int, int]]:
    """Heads and width of each tensor of the model's cache: key and value of each layer in turn.

    Raises: RequestError for a model whose cache is not keys and values.
    """
    cache = DynamicCache()
    with torch.no_grad():
        model(input_ids=torch.zeros(1, 2, dtype=torch.long), use_cache=True, **{cache_argument(model): cache})
    shapes: list[tuple[int, int]] = []
    for layer in cache.layers:
        for tensor in (getattr(layer, "keys", None), getattr(layer, "values", None)):
            if not isinstance(tensor, Tensor) or tensor.ndim != 4:
                raise RequestError(
                    f"{type(model).__name__} keeps more than keys and values between tokens, which this export can't "
                    "carry; export with --to merged"
                )
            shapes.append((tensor.shape[1], tensor.shape[3]))
    return shapes


@contextlib.contextmanager
def written_out(model: PreTrainedModel) -> Iterator[None]:
    """Attention as plain products inside the block."""
    before: Any = model.config._attn_implementation
    model.set_attn_implementation("eager")
    try:
        yield
    finally:
        model.set_attn_implementation(before)


def _place(model: nn.Module, name: str) -> str:
    """Where the slotted model has the tensor of this name."""
    path, _, leaf = name.rpartition(".")
    owner = model.get_submodule(path)
    return f"{path}.base.{leaf}" if isinstance(owner, Slot) and leaf not in owner._parameters else name


def export_graph(model: PreTrainedModel, task: str, adapters: Sequence[AdapterTensors], folder: Path) -> Traced:
    """The plain fp32 `model` with inputs for `adapters` as an ONNX graph in memory; `folder` is for passing files.

    The adapter inputs have no defaults in it yet: see `onnx_defaults.add_defaults`.

    Raises: RequestError for a model that can't be traced.
    """
    if (stack := equal_layers(model)) is not None:
        adapters = [*adapters, evened_out(dict(model.named_modules()), stack.name, stack.size, adapters)]
    with slotted(model, adapters, RANK) as names, written_out(model):
        proto = _copied(model, task, names, folder) or _trace(model, task, places_of(model, names), folder)
    return Traced(stripped(proto), names, default_tensors(model, names, adapters))


def places_of(model: nn.Module, names: Sequence[str]) -> dict[str, str]:
    """Inputs' names by where the slotted model has those tensors."""
    return {_place(model, name): name for name in names}


def _copied(model: PreTrainedModel, task: str, names: Sequence[str], folder: Path) -> ModelProto | None:
    """The graph from a trace of a few layers; None where that can't be."""
    stack = equal_layers(model)
    if stack is None:
        return None
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    places = places_of(model, names)
    with cut_to_traced(model, stack):
        there = {place: name for place, name in places.items() if _is_there(model, place)}
        proto = _trace(model, task, there, folder)
    return proto if copy_layers(proto.graph, stack, tensors, ROOT) else None


def _is_there(model: nn.Module, place: str) -> bool:
    path, _, leaf = place.rpartition(".")
    try:
        return hasattr(model.get_submodule(path), leaf)
    except AttributeError:
        return False


def _trace(model: PreTrainedModel, task: str, places: dict[str, str], folder: Path) -> ModelProto:
    """The graph of the model as it is now. `places`: tensors that are inputs, and the inputs' names."""
    example = [current(model, place) for place in places]
    dynamic = [rank_axis(name) for name in places.values()]
    if task == CAUSAL:
        call = _causal_call(model, list(places), cache_shapes(model), example, dynamic)
    else:
        call = _encoder_call(model, list(places), example, dynamic)
    return traced_call(type(model).__name__, call, list(places.values()), folder)


def traced_call(kind: str, call: Call, names: list[str], folder: Path) -> ModelProto:
    """The graph of a call, in memory. `kind`: what the model is called in messages; `names`: of the adapter's inputs.

    Raises: RequestError for a model that can't be traced.
    """
    with tempfile.TemporaryDirectory(dir=folder, prefix=".trace") as passing:
        file = Path(passing) / "traced.onnx"
        _run_exporter(kind, call, names, file)
        return onnx.load(str(file))


def stripped(proto: ModelProto) -> ModelProto:
    """Without the tracer's notes, which name folders of this machine."""
    del proto.graph.value_info[:]
    for node in proto.graph.node:
        del node.metadata_props[:]
        node.doc_string = ""
    for holder in (proto, proto.graph, *proto.graph.input, *proto.graph.output, *proto.graph.initializer):
        del holder.metadata_props[:]
        holder.doc_string = ""
    return proto


def current(model: nn.Module, place: str) -> Tensor:
    """A copy of the tensor there."""
    path, _, leaf = place.rpartition(".")
    tensor = getattr(model.get_submodule(path), leaf)
    return tensor.detach().clone()


def rank_axis(name: str) -> dict[int, Any]:
    """All ranks are one axis here, or the solver of shapes takes minutes; `add_defaults` tells them apart again.

    Nothing but products reads the factors, so no shape in the graph depends on their rank.
    """
    if name.endswith(".lora_A"):
        return {1: torch.export.Dim("rank")}
    return {0: torch.export.Dim("rank")} if name.endswith(".lora_B") else {}


@dataclass(frozen=True)
class Call:
    """What the exporter is given."""

    module: nn.Module
    arguments: tuple[Any, ...]
    dynamic: tuple[Any, ...]
    inputs: list[str]
    outputs: list[str]


def _causal_call(
    model: PreTrainedModel, places: list[str], shapes: list[tuple[int, int]], example: list[Tensor],
    dynamic: list[dict[int, Any]],
) -> Call:  # fmt: skip
    rows, new, past_length = (torch.export.Dim(name) for name in ("rows", "new", "past"))
    total = torch.export.Dim.AUTO  # past + new, which the tracer finds out
    ids = torch.zeros(ROWS, NEW, dtype=torch.long)
    mask = torch.ones(ROWS, PAST + NEW, dtype=torch.long)
    positions = torch.tensor([0, 1, 2, 2][:POSITIONS])
    past = [torch.zeros(ROWS, heads, PAST, width) for heads, width in shapes]
    layers = range(len(shapes) // 2)
    return Call(
        _Causal(model, places),
        (ids, mask, positions, past, example),
        (
            {0: rows, 1: new},
            {0: rows, 1: total},
            {0: torch.export.Dim("positions")},
            [{0: rows, 2: past_length} for _ in past],
            dynamic,
        ),
        ["input_ids", "attention_mask", "logit_positions"]
        + [f"past_key_values.{i}.{which}" for i in layers for which in ("key", "value")],
        ["logits", *(f"present.{i}.{which}" for i in layers for which in ("key", "value"))],
    )


def _encoder_call(
    model: PreTrainedModel, places: list[str], example: list[Tensor], dynamic: list[dict[int, Any]]
) -> Call:
    rows_axis, new = torch.export.Dim("rows"), torch.export.Dim("new")
    inputs = [name for name in ("input_ids", "attention_mask", "token_type_ids") if takes(model, name)]
    rows = [torch.zeros(ROWS, NEW, dtype=torch.long) for _ in inputs]
    rows[1] = torch.ones(ROWS, NEW, dtype=torch.long)
    has_logits = model.get_output_embeddings() is not None or hasattr(model, "num_labels")
    return Call(
        _Encoder(model, places, inputs), (rows, example), ([{0: rows_axis, 1: new} for _ in rows], dynamic), inputs,
        ["logits" if has_logits else "last_hidden_state"],
    )  # fmt: skip


def _run_exporter(kind: str, call: Call, names: list[str], file: Path) -> None:
    """Raises: RequestError for a model that can't be traced."""
    levels = {name: logging.getLogger(name).level for name in ("torch.onnx", "onnxscript", "onnx_ir")}
    for name in levels:
        logging.getLogger(name).setLevel(logging.ERROR)
    try:
        with quietly(), warnings.catch_warnings(), torch.no_grad():
            warnings.simplefilter("ignore")
            program = torch.onnx.export(
                call.module, call.arguments, dynamo=True, input_names=[*call.inputs, *names],
                output_names=call.outputs, dynamic_shapes=call.dynamic, verbose=False, external_data=True,
                optimize=False,
            )  # fmt: skip
            assert program is not None
            program.save(str(file), external_data=True)
    except torch.onnx.errors.OnnxExporterError as error:
        reason = str(error).strip().splitlines()[0]
        raise RequestError(f"{kind} can't be exported to ONNX: {reason}; export with --to merged or gguf") from error
    finally:
        for name, level in levels.items():
            logging.getLogger(name).setLevel(level)
