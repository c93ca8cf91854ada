"""How `--to onnx` is written: adapters read off the model, the graph traced, quantised, given defaults, compared.

The model in torch is loaded once; each adapter is attached to it in turn, to be read and, in the end, to be compared
with.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from onnx import ModelProto
from onnx.external_data_helper import load_external_data_for_model
from torch import Tensor
from transformers import PreTrainedModel

from rankwise.attach.attachment import attachment_of
from rankwise.attach.checkpoint import load_adapter
from rankwise.attach.inject import detach, merge_in
from rankwise.data.chat_template import read_template
from rankwise.errors import WorkError
from rankwise.export.certificate import compare, trim_probes
from rankwise.export.onnx_adapters import write_adapter
from rankwise.export.onnx_defaults import add_defaults, check_inputs, save_graph
from rankwise.export.onnx_folder import (
    ADAPTER_SUFFIX,
    ADAPTERS_FOLDER,
    GRAPH_FILE,
    WEIGHTS_FILE,
    AdapterEntry,
    Manifest,
    describe_files,
    write_manifest,
)
from rankwise.export.onnx_graph import CAUSAL, export_graph
from rankwise.export.onnx_quantise import FULL, HEAD_KIND, MAX_KL, Graph, find_linears, quantise
from rankwise.export.onnx_runtime import OnnxModel, session_of
from rankwise.export.onnx_sensitivity import blame, leave_out
from rankwise.export.onnx_slots import AdapterTensors, base_sha256, read_adapter
from rankwise.export.onnx_verify import (
    compare_by_token,
    onnx_logits,
    onnx_steps,
    paired_ratio,
    torch_logits,
    torch_steps,
    written,
)
from rankwise.export.report import Row, compared_row, size_of
from rankwise.export.same_text import same_text
from rankwise.files import sha256_file, write_text
from rankwise.models.probing import num_positions
from rankwise.models.quiet import quietly
from rankwise.recipes.export_job import Job
from rankwise.recipes.target import Target, open_in, target_head
from rankwise.train.config import DEFAULT_POOLING

MAX_DIFFERENCE = 1e-3
"""In logits, of an fp32 graph from torch."""
NUM_PROMPTS, NUM_WRITTEN, PROMPT_TOKENS = 3, 16, 24
TIMED_TOKENS, TIMED_ROUNDS = 8, 3
TEMPLATE_FILE = "rendered_with.jinja"


@dataclass(frozen=True)
class _Made:
    """A graph on disk, and what is known of it."""

    inputs: list[str]
    left_out: frozenset[str]
    trial: _Trial | None
    """For a quantised graph: how others are made."""


def write_onnx(job: Job, targets: Mapping[str, Target], precision: str, folder: Path) -> Sequence[Row]:
    """Writes the folder, opens it again and compares; a row for the graph and one for each adapter.

    Raises: RequestError for an adapter that can't be an input of a graph; WorkError past `--max-kl`.
    """
    opened = open_in(job.target, torch.float32, "fp32")
    model, ids = opened.model, trim_probes(job.probes.ids)
    adapted = torch_logits(model, ids)
    adapters: dict[str, AdapterTensors] = {}
    if job.settings["merged"]:
        model = merge_in(model, torch.float32)
    else:
        for name, target in targets.items():
            adapters[name] = read_adapter(_with(model, target), name)
        model = _with(model, None)
    sha256 = base_sha256(dict(model.named_parameters()))
    made = _write_graph(job, model, adapters, precision, folder, (ids, adapted))
    manifest = _write_beside(job, model, adapters, precision, sha256, folder)
    export = OnnxModel(folder, torch.get_num_threads())
    if job.settings["merged"]:
        rows = [_row(job, model, export, None, GRAPH_FILE, made, (ids, adapted))]
    else:
        rows = [_row(job, model, export, None, GRAPH_FILE, made, (ids, torch_logits(model, ids)))]
        for name, target in targets.items():
            _with(model, target)
            file = manifest.adapters[name].file
            rows.append(_row(job, model, export, name, file, made, (ids, torch_logits(model, ids))))
    _check_drift(job, made, rows)
    for file in folder.glob(".fp32.onnx*"):
        file.unlink()
    return rows


def _with(model: PreTrainedModel, target: Target | None) -> PreTrainedModel:
    """The model with that target's adapter attached in place of any other; None: plain."""
    if attachment_of(model) is not None:
        detach(model)
    if target is not None:
        assert target.adapter is not None
        load_adapter(model, target.adapter)
    return model.eval()


# --- the graph -----------------------------------------------------------------------------------------------------


def _write_graph(
    job: Job, model: PreTrainedModel, adapters: Mapping[str, AdapterTensors], precision: str, folder: Path,
    probes: tuple[Sequence[Sequence[int]], Sequence[Tensor]],
) -> _Made:  # fmt: skip
    """Traces, quantises, gives defaults, writes. `probes`: token ids, and torch's logits with the first adapter."""
    task = job.target.needs.task
    traced = export_graph(model, task, list(adapters.values()), folder)
    defaults = {name: tensor.numpy() for name, tensor in traced.defaults.items()}
    if precision == "fp32":
        add_defaults(traced.model, defaults)
        check_inputs(traced.model, traced.adapter_inputs)
        save_graph(traced.model, folder / GRAPH_FILE)
        return _Made(traced.adapter_inputs, frozenset(), None)
    plain = folder / ".fp32.onnx"
    save_graph(traced.model, plain)
    del traced.model.graph.initializer[:]
    first = next(iter(adapters.values()), None)
    trial = _Trial(plain, precision, traced.adapter_inputs, probes, {} if first is None else _arrays(first, defaults))
    left_out = leave_out(trial.kinds(), _bound(job, precision), trial.drift) if precision == FULL else frozenset()
    final = trial.build(left_out)
    add_defaults(final, defaults)
    check_inputs(final, traced.adapter_inputs)
    load_external_data_for_model(final, str(folder))
    save_graph(final, folder / GRAPH_FILE)
    return _Made(traced.adapter_inputs, left_out, trial)


def _check_drift(job: Job, made: _Made, rows: Sequence[Row]) -> None:
    """Raises: WorkError for a quantised graph past its bound, naming the kinds of layers that it loses most by."""
    if made.trial is None:
        return
    precision, bound = made.trial.precision, _bound(job, made.trial.precision)
    figures = [row.to_dict().get(name) for row in rows for name in ("kl", "by_token_kl")]
    drift = max(figure for figure in figures if figure is not None)
    if not drift <= bound:
        raise WorkError(
            f"the graph in {precision} differs from torch by KL {drift:.3g} nats a token, above --max-kl {bound:g}; it "
            f"loses most by {blame(made.trial.kinds(), drift, made.trial.drift_alone)}; nothing was kept; export "
            "without --int8 or --int4, or allow more with --max-kl"
        )


def _bound(job: Job, precision: str) -> float:
    given = job.settings["max_kl"]
    return MAX_KL[precision] if given is None else float(given)


def _arrays(adapter: AdapterTensors, defaults: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The adapter's tensors for every adapter input: what it does not hold has its default."""
    return {**defaults, **{name: tensor.numpy() for name, tensor in adapter.named().items()}}


@dataclass(frozen=True)
class _Trial:
    """Quantised graphs made from the fp32 one on disk, and how far each drifts from torch."""

    plain: Path
    precision: str
    inputs: list[str]
    probes: tuple[Sequence[Sequence[int]], Sequence[Tensor]]
    adapter: Mapping[str, np.ndarray]

    def _graph(self) -> tuple[ModelProto, Graph]:
        proto = onnx.load(str(self.plain), load_external_data=False)
        return proto, Graph(proto, self.plain.parent)

    def kinds(self) -> list[str]:
        """Kinds of layers that may be left out, in the order of the graph."""
        _, graph = self._graph()
        return list(
            dict.fromkeys(linear.kind for linear in find_linears(graph, self.inputs) if linear.kind != HEAD_KIND)
        )

    def build(self, left_out: frozenset[str], plain: bool = False) -> ModelProto:
        """The graph with these kinds left out: of int8 arithmetic, to 8-bit weights; else, or if `plain`, to fp32."""
        proto, graph = self._graph()
        quantise(graph, self.precision, left_out, plain or self.precision != FULL, self.inputs)
        return proto

    def drift(self, left_out: frozenset[str]) -> float:
        """KL(torch || graph), nats a token, on the probes with the first adapter."""
        return self._measured(self.build(left_out))

    def drift_alone(self, left_out: frozenset[str]) -> float:
        """As `drift`, with these kinds in fp32."""
        return self._measured(self.build(left_out, plain=True))

    def _measured(self, proto: ModelProto) -> float:
        place = self.plain.with_name(".fp32.onnx_trial")
        load_external_data_for_model(proto, str(self.plain.parent))
        save_graph(proto, place)
        ids, wanted = self.probes
        session = session_of(place, torch.get_num_threads())
        found = [torch.from_numpy(_first_output(session, row, self.adapter)) for row in ids]
        for file in self.plain.parent.glob(f"{place.name}*"):
            file.unlink()
        if found[0].shape[-1] != wanted[0].shape[-1] or found[0].ndim != wanted[0].ndim:
            found = [out.reshape(one.shape) for out, one in zip(found, wanted, strict=True)]
        return compare(wanted, found).kl


def _first_output(session: Any, row: Sequence[int], adapter: Mapping[str, np.ndarray]) -> np.ndarray:
    ids = np.array([list(row)], np.int64)
    feeds: dict[str, np.ndarray] = {"input_ids": ids, "attention_mask": np.ones_like(ids), **adapter}
    for node in session.get_inputs():
        if node.name.startswith("past_key_values."):
            feeds[node.name] = np.zeros((1, node.shape[1], 0, node.shape[3]), np.float32)
        if node.name == "token_type_ids":
            feeds[node.name] = np.zeros_like(ids)
        if node.name == "logit_positions":
            feeds[node.name] = np.arange(ids.shape[1])
    (output, *_) = session.run(None, feeds)
    return output[0]


# --- beside it -----------------------------------------------------------------------------------------------------


def _write_beside(
    job: Job, model: PreTrainedModel, adapters: Mapping[str, AdapterTensors], precision: str, sha256: str, folder: Path
) -> Manifest:
    """Adapters, tokenizer, configuration, manifest."""
    entries: dict[str, AdapterEntry] = {}
    head = target_head(job.target)
    data = job.target.data_config()
    template = data.chat_template
    if data.has_template_file:
        template = TEMPLATE_FILE
        write_text(folder / template, read_template(data.chat_template))
    with quietly():
        model.config.save_pretrained(folder)
        if model.can_generate() and model.generation_config is not None:
            model.generation_config.save_pretrained(folder)
        job.tokenizer.save_pretrained(folder)
    manifest = Manifest(
        task=job.target.needs.task, base=job.target.model.name, base_sha256=sha256, precision=precision,
        is_merged=bool(job.settings["merged"]),
        files=describe_files(folder, [name for name in (GRAPH_FILE, WEIGHTS_FILE) if (folder / name).exists()]),
        adapters=entries, chat_template=template, layout=job.target.needs.layout,
        pooling=_pooling(job),
        labels=None if head is None or head.labels is None else list(head.labels.names),
        max_positions=num_positions(model),
    )  # fmt: skip
    for name, adapter in adapters.items():
        file = f"{ADAPTERS_FOLDER}/{name}{ADAPTER_SUFFIX}"
        write_adapter(adapter, folder / file, manifest.version)
        ranks = adapter.ranks or [0]
        entries[name] = AdapterEntry(file, sha256_file(folder / file), min(ranks), max(ranks))
    write_manifest(folder, manifest)
    return manifest


def _pooling(job: Job) -> str | None:
    """Of an embedding model."""
    if job.target.needs.task != "encoder":
        return None
    head = target_head(job.target)
    return DEFAULT_POOLING if head is None or head.pooling is None else head.pooling


# --- the comparison ------------------------------------------------------------------------------------------------


def _row(
    job: Job, model: PreTrainedModel, export: OnnxModel, adapter: str | None, artifact: str, made: _Made,
    probes: tuple[Sequence[Sequence[int]], Sequence[Tensor]],
) -> Row:  # fmt: skip
    """The graph with one adapter, or none, against the model in torch as it is now."""
    ids, wanted = probes
    precision = export.manifest.precision
    found = onnx_logits(export, ids, adapter, model.config.problem_type)
    difference = compare(wanted, found)
    more: dict[str, Any] = {"precision": precision, "left_out": sorted(made.left_out)}
    notes = [f"run by ONNX Runtime on {torch.get_num_threads()} thread(s)"]
    speedup = None
    if job.target.needs.task == CAUSAL:
        stepped = compare_by_token(model, export, ids, adapter)
        prompts = [list(probe[:PROMPT_TOKENS]) for probe in ids[:NUM_PROMPTS]]
        texts = written(export, prompts, adapter, NUM_WRITTEN)
        more |= {
            "by_token_max_abs_diff": stepped.max_abs_diff, "by_token_kl": stepped.kl,
            "same_text": same_text(model, prompts, texts), "threads": torch.get_num_threads(),
        }  # fmt: skip
        if artifact == GRAPH_FILE:
            pair = (torch_steps(model, prompts[0], TIMED_TOKENS), onnx_steps(export, prompts[0], TIMED_TOKENS, adapter))
            speedup = paired_ratio(*pair, TIMED_ROUNDS)
            notes.append(f"speed: {TIMED_TOKENS} tokens behind {len(prompts[0])}, in turns with torch fp32")
    size = size_of(export.folder / artifact)
    if artifact == GRAPH_FILE:
        size += size_of(export.folder / WEIGHTS_FILE) if (export.folder / WEIGHTS_FILE).exists() else 0
        notes.append("the base alone" if adapter is None and not export.manifest.is_merged else "the adapter folded in")
    return compared_row(
        artifact, size, difference, speedup=speedup, note="; ".join(notes), more=more,
        bounds=_bounds(job, precision, more),
    )  # fmt: skip


def _bounds(job: Job, precision: str, more: Mapping[str, Any]) -> dict[str, float]:
    if precision == "fp32":
        return {
            name: MAX_DIFFERENCE
            for name in ("max_abs_diff", "by_token_max_abs_diff")
            if name in (*more, "max_abs_diff")
        }
    return {name: _bound(job, precision) for name in ("kl", "by_token_kl") if name in (*more, "kl")}
