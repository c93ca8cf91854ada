"""`--to tensorrt`: an engine for RTX GPUs, built without one and said to be built, not run.

The ONNX graph that the engine is built from is run in ONNX Runtime in the engine's precision, and that is compared with
the model in torch: it is the most that a machine without such a GPU can tell.
"""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save
from torch import Tensor

from rankwise.attach.inject import detach, merge_in
from rankwise.errors import RequestError
from rankwise.export.certificate import Difference, compare, probe_logits, trim_probes
from rankwise.export.formats import need_module
from rankwise.export.onnx_sensitivity import leave_out
from rankwise.export.report import Row, size_of
from rankwise.files import write_json
from rankwise.models.load import load_config
from rankwise.recipes.export_job import Job, Writer, num_parameters
from rankwise.recipes.target import open_in

ENGINE, ADAPTER_FILE, MANIFEST = "model.engine", "adapter.safetensors", "rankwise_tensorrt.json"
GRAPH_BOUNDS = {"fp32": 1e-6, "fp16": 1e-3, "bf16": 2e-2, "int8": 0.1}
"""The most KL(torch || graph), nats a token, of the graph that an engine is built from."""
LEFT_OUT = ("down_proj", "lm_head")
"""Kinds of layers that are out of int8 from the start: one scale does not fit down_proj's inputs, where those of one
token are a hundred times larger than all others'."""


@dataclass(frozen=True)
class _Graph:
    """A traced graph, small constants folded, its adapter's inputs, and what stands for the cache."""

    model: Any
    adapter: dict[str, Tensor]
    cache: list[tuple[int, int]]

    def feeds(self, probes: Iterable[Sequence[int]]) -> list[dict[str, Any]]:
        """The graph's inputs for each probe alone, without a cache, logits of every position."""
        import numpy as np

        factors = {name: tensor.numpy() for name, tensor in self.adapter.items()}
        found = []
        for probe in probes:
            ids = np.array([list(probe)], np.int64)
            feed = {
                "input_ids": ids,
                "attention_mask": np.ones_like(ids),
                "logit_positions": np.arange(ids.shape[1]),
                **factors,
            }
            for layer, (heads, width) in enumerate(self.cache):
                name = f"past_key_values.{layer // 2}.{('key', 'value')[layer % 2]}"
                feed[name] = np.zeros((1, heads, 0, width), np.float32)
            found.append(feed)
        return found


def precision_of(job: Job) -> str:
    """`fp32`, `fp16`, `bf16` or `int8`."""
    return "int8" if job.settings["int8"] else str(job.settings["dtype"])


def check(job: Job) -> None:
    """Raises: RequestError for settings without effect, or a model that is no causal language model."""
    settings = job.settings
    need_module("onnxscript", "tensorrt", "pip install 'rankwise[onnx]'")
    if job.target.needs.task_type != "CAUSAL_LM":
        raise RequestError(
            f"--to tensorrt takes causal language models; '{job.target.name}' is for {job.target.objective}; --to onnx "
            "takes it"
        )
    if settings["int8"] and settings["dtype"] != "fp16":
        raise RequestError(f"--dtype {settings['dtype']} has no effect with --int8: what is not in int8 is in fp16")
    if settings["merged"] and settings["max_rank"] is not None:
        raise RequestError("--max-rank has no effect with --merged: the adapter has no rank there; leave one out")
    if settings["max_kl"] is not None and not float(settings["max_kl"]) > 0:
        raise RequestError(f"--max-kl must be above 0, not {settings['max_kl']}")
    for name in ("max_rows", "max_context", "max_rank"):
        if settings[name] is not None and int(settings[name]) < 1:
            raise RequestError(f"--{name.replace('_', '-')} must be at least 1, not {settings[name]}")
    longest = load_config(job.target.model).max_position_embeddings
    if settings["max_context"] is not None and settings["max_context"] > longest:
        raise RequestError(f"--max-context {settings['max_context']} is more than the model's {longest} positions")


def num_bytes(job: Job) -> int:
    """The fp32 graph and the engine, which lie beside each other for a while."""
    return int(num_parameters(job.target) * 4 * 2.5)


def write(job: Job, folder: Path) -> Sequence[Row]:
    """Traces, compares the graph in ONNX Runtime, builds. Raises: WorkError for what TensorRT can't build."""
    from rankwise.export.onnx_folding import fold_constants
    from rankwise.export.onnx_graph import cache_shapes, export_graph
    from rankwise.export.onnx_slots import read_adapter
    from rankwise.export.tensorrt_engine import build_engine
    from rankwise.export.tensorrt_graph import input_shapes, save_graph

    opened = open_in(job.target, torch.float32, "fp32")
    ids = trim_probes(job.probes.ids)
    adapted = probe_logits(opened.model, ids)
    adapter = None if job.settings["merged"] else read_adapter(opened.model, job.target.name)
    model = merge_in(opened.model, torch.float32) if adapter is None else detach(opened.model).eval()
    precision = precision_of(job)
    bound = job.settings["max_kl"] or GRAPH_BOUNDS[precision]
    with tempfile.TemporaryDirectory(dir=folder, prefix=".graph") as passing:
        place = Path(passing)
        traced = export_graph(model, "causal-lm", [] if adapter is None else [adapter], place)
        fold_constants(traced.model)
        graph = _Graph(traced.model, {} if adapter is None else adapter.named(), cache_shapes(model))
        calibration, held_out = ids[: len(ids) // 2] or ids, range(len(ids) // 2, len(ids))
        largest = _largest(graph, place, calibration) if precision == "int8" else {}
        measured = _Measured(
            graph, place, precision, largest, [ids[i] for i in held_out], [adapted[i] for i in held_out]
        )
        left_out = _left_out(measured, bound)
        difference = measured.difference(left_out)
        built = _in_precision(graph, place, precision, _kept(largest, left_out), emulated=False)
        shapes = input_shapes(built, _limits(job, adapter is not None))
        save_graph(built, place / "built.onnx")
        engine = build_engine(place / "built.onnx", folder / ENGINE, shapes)
    _write_beside(job, folder, graph, shapes, precision, engine.capabilities)
    notes = [
        "built, not run, and so not timed: no GPU that it is for is used here",
        f"for {', '.join(engine.capabilities)}",
        "graph_kl is of the graph it was built from, its products rounded alike, in ONNX Runtime",
    ]
    if precision == "int8":
        kept = len(_kept(largest, left_out))
        notes.append(
            f"{kept} products in int8, smoothed and calibrated on {len(calibration)} rows; "
            f"{', '.join([*LEFT_OUT, *sorted(left_out)])} not"
        )
    more = {
        "graph_kl": difference.kl, "graph_max_abs_diff": difference.max_abs_diff,
        "graph_top1_agreement": difference.top1_agreement, "engine_layers": engine.num_layers,
        "open_inputs": len(engine.open_inputs), "left_out": sorted(left_out),
    }  # fmt: skip
    return [
        Row(ENGINE, size_of(folder / ENGINE), ran=False, note="; ".join(notes), bounds={"graph_kl": bound}, more=more)
    ]


def _in_precision(graph: _Graph, place: Path, precision: str, largest: Mapping[str, Any], emulated: bool) -> Any:
    from rankwise.export.tensorrt_graph import in_precision

    model = copy.deepcopy(graph.model)
    if precision != "fp32":
        dtype = "fp16" if precision == "int8" else precision
        in_precision(model, place, dtype, list(graph.adapter), largest, emulated)
    return model


@dataclass(frozen=True)
class _Measured:
    """How far the graph drifts from torch where kinds of layers are left out of int8; each choice is run once."""

    graph: _Graph
    place: Path
    precision: str
    largest: Mapping[str, Any]
    rows: Sequence[Sequence[int]]
    wanted: Sequence[Tensor]
    found: dict[frozenset[str], Difference] = field(default_factory=dict)

    def difference(self, left_out: frozenset[str]) -> Difference:
        """Of logits on rows that nothing was calibrated on."""
        if left_out not in self.found:
            kept = _kept(self.largest, left_out)
            model = _in_precision(self.graph, self.place, self.precision, kept, emulated=True)
            self.found[left_out] = compare(self.wanted, _run(model, self.place, self.graph.feeds(self.rows)))
        return self.found[left_out]


def _left_out(measured: _Measured, bound: float) -> frozenset[str]:
    """Kinds to leave out besides LEFT_OUT, those that gain most first, so that the drift is within its bound."""
    from rankwise.export.onnx_quantise import kind_of

    kinds = list(dict.fromkeys(kind_of(weight) for weight in measured.largest))
    return leave_out(kinds, bound, lambda left: measured.difference(left).kl)


def _kept(largest: Mapping[str, Any], left_out: frozenset[str]) -> dict[str, Any]:
    """The products that are in int8: of the other kinds."""
    from rankwise.export.onnx_quantise import kind_of

    return {weight: values for weight, values in largest.items() if kind_of(weight) not in left_out}


def _largest(graph: _Graph, place: Path, probes: Sequence[Sequence[int]]) -> dict[str, Any]:
    from rankwise.export.tensorrt_graph import largest_inputs

    return largest_inputs(graph.model, place, graph.feeds(probes), list(graph.adapter), LEFT_OUT)


def _run(model: Any, place: Path, feeds: Sequence[dict[str, Any]]) -> list[Tensor]:
    from rankwise.export.tensorrt_graph import open_session

    session = open_session(model, place / "compared.onnx")
    return [torch.from_numpy(session.run(["logits"], feed)[0][0]) for feed in feeds]


def _limits(job: Job, has_adapter: bool) -> Any:
    from rankwise.export.tensorrt_graph import Limits

    settings = job.settings
    longest = min(2048, load_config(job.target.model).max_position_embeddings)
    rank = (settings["max_rank"] or 64) if has_adapter else 0
    return Limits(settings["max_rows"], settings["max_context"] or longest, rank)


def _write_beside(
    job: Job, folder: Path, graph: _Graph, shapes: dict[str, Any], precision: str, capabilities: Sequence[str]
) -> None:
    """The adapter's inputs, the tokenizer, and what a runner has to know."""
    if graph.adapter:
        tensors = {name: tensor.contiguous() for name, tensor in graph.adapter.items()}
        (folder / ADAPTER_FILE).write_bytes(save(tensors))
    job.tokenizer.save_pretrained(folder)
    write_json(
        folder / MANIFEST,
        {
            "engine": ENGINE, "adapter": ADAPTER_FILE if graph.adapter else None, "base": job.target.model.name,
            "precision": precision, "capabilities": list(capabilities), "cache": [list(pair) for pair in graph.cache],
            "shapes": shapes,
        },
    )  # fmt: skip


TENSORRT = Writer(check, num_bytes, write, remedy="export with --dtype fp32, or allow more with --max-kl")
