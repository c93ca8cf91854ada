"""How `--to onnx` is written: adapters read off the model, the graph traced, quantised, given defaults, compared.

The model in torch is loaded once; each adapter is attached to it in turn, to be read and, in the end, to be compared
with.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
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
    DATA_SUFFIX,
    GRAPH_FILE,
    GRAPH_FILES,
    AdapterEntry,
    Manifest,
    describe_files,
    write_manifest,
)
from rankwise.export.onnx_graph import CAUSAL, Traced, export_graph
from rankwise.export.onnx_quantise import FULL, MAX_KL
from rankwise.export.onnx_runtime import OnnxModel
from rankwise.export.onnx_sensitivity import blame, leave_out
from rankwise.export.onnx_seq2seq import OnnxSeq2Seq
from rankwise.export.onnx_seq2seq_graph import export_seq2seq
from rankwise.export.onnx_slots import AdapterTensors, base_sha256, read_adapter
from rankwise.export.onnx_verify import (
    Export,
    by_token_rows,
    compare_by_token,
    onnx_logits,
    onnx_run,
    torch_logits,
    written,
)
from rankwise.export.report import Row, compared_row, size_of
from rankwise.export.same_text import same_text
from rankwise.export.speed import paired_ratio, torch_run, what_is_timed
from rankwise.files import sha256_file, write_text
from rankwise.models.probing import num_positions
from rankwise.models.quiet import quietly
from rankwise.models.seq2seq import start_token_id, writes_apart
from rankwise.recipes.export_job import Job
from rankwise.recipes.export_onnx_trial import Case, Trial
from rankwise.recipes.target import Target, open_in, target_head
from rankwise.train.config import DEFAULT_POOLING

GENERATES = (CAUSAL, "seq2seq-lm")
"""Tasks of models that write."""
PLAIN = ".fp32"
"""The folder of the fp32 graphs, while quantised ones are made from them."""
MAX_DIFFERENCE = 1e-3
"""In logits, of an fp32 graph from torch."""
NUM_PROMPTS, NUM_WRITTEN, PROMPT_TOKENS = 3, 16, 24
TEMPLATE_FILE = "rendered_with.jinja"


@dataclass(frozen=True)
class _Made:
    """Graphs on disk, and what is known of them."""

    left_out: frozenset[str]
    trial: Trial | None
    """For quantised graphs: how others are made."""
    defaults: Mapping[str, np.ndarray]
    """Of the adapter's inputs."""


def write_onnx(job: Job, targets: Mapping[str, Target], precision: str, folder: Path) -> Sequence[Row]:
    """Writes the folder, opens it again and compares; a row for the graph and one for each adapter.

    Raises: RequestError for an adapter that can't be an input of a graph; WorkError past `--max-kl`.
    """
    opened = open_in(job.target, torch.float32, "fp32")
    model, ids = opened.model, trim_probes(job.probes.ids)
    adapted: list[Tensor] = []
    adapters: dict[str, AdapterTensors] = {}
    if job.settings["merged"]:
        adapted = torch_logits(model, ids)
        model = merge_in(model, torch.float32)
    else:
        for name, target in targets.items():
            adapters[name] = read_adapter(_with(model, target), name)
        model = _with(model, None)
    sha256 = base_sha256(dict(model.named_parameters()))
    shown = _Shown(job, model, adapters, targets, ids)
    made = _write_graphs(shown, precision, folder)
    manifest = _write_beside(job, model, adapters, precision, sha256, folder)
    export = (OnnxSeq2Seq if writes_apart(model) else OnnxModel)(folder, torch.get_num_threads())
    graphs = ", ".join(manifest.graphs)
    if job.settings["merged"]:
        rows = [_row(job, model, export, None, graphs, made, (ids, adapted))]
    else:
        rows = [_row(job, model, export, None, graphs, made, (ids, torch_logits(model, ids)))]
        for name, target in targets.items():
            _with(model, target)
            file = manifest.adapters[name].file
            rows.append(_row(job, model, export, name, file, made, (ids, torch_logits(model, ids))))
    _check_drift(shown, made, rows)
    if made.trial is not None:
        shutil.rmtree(folder / PLAIN)
    return rows


def _with(model: PreTrainedModel, target: Target | None) -> PreTrainedModel:
    """The model with that target's adapter attached in place of any other; None: plain."""
    if attachment_of(model) is not None:
        detach(model)
    if target is not None:
        assert target.adapter is not None
        load_adapter(model, target.adapter)
    return model.eval()


@dataclass(frozen=True)
class _Shown:
    """The plain model, its adapters by name with their targets, and rows to compare on."""

    job: Job
    model: PreTrainedModel
    adapters: Mapping[str, AdapterTensors]
    targets: Mapping[str, Target]
    ids: Sequence[Sequence[int]]

    def cases(self, defaults: Mapping[str, np.ndarray]) -> list[Case]:
        """What the report is going to compare: the graph alone, and with each adapter. Leaves the model plain."""
        found = [self._case(defaults)]
        for name, adapter in self.adapters.items():
            _with(self.model, self.targets[name])
            found.append(self._case(_arrays(adapter, defaults)))
        if self.adapters:
            _with(self.model, None)
        return found

    def _case(self, adapter: Mapping[str, np.ndarray]) -> Case:
        short = by_token_rows(self.ids) if self.job.target.needs.task in GENERATES else []
        return Case(adapter, self.ids, torch_logits(self.model, self.ids), short, torch_logits(self.model, short))


# --- the graph -----------------------------------------------------------------------------------------------------


def _write_graphs(shown: _Shown, precision: str, folder: Path) -> _Made:
    """Traces, quantises, gives defaults, writes."""
    model = shown.model
    traced = _traced(shown.job, model, list(shown.adapters.values()), folder)
    inputs, defaults = _inputs(traced)
    if precision == "fp32":
        _save_all({file: one.model for file, one in traced.items()}, inputs, defaults, folder)
        return _Made(frozenset(), None, defaults)
    plain = folder / PLAIN
    plain.mkdir()
    for file, one in traced.items():
        save_graph(one.model, plain / file)
        del one.model.graph.initializer[:]
    start = start_token_id(model) if writes_apart(model) else None
    trial = Trial(plain, tuple(traced), precision, inputs, start, model.config.problem_type)
    left_out: frozenset[str] = frozenset()
    if precision == FULL:
        cases = shown.cases(defaults)
        left_out = leave_out(trial.kinds(), _bound(shown.job, precision), lambda left: trial.drift(left, cases))
    final = trial.build(left_out)
    for proto in final.values():
        load_external_data_for_model(proto, str(plain))
    _save_all(final, inputs, defaults, folder)
    return _Made(left_out, trial, defaults)


def _traced(job: Job, model: PreTrainedModel, adapters: Sequence[AdapterTensors], folder: Path) -> dict[str, Traced]:
    """The model's graphs, by file."""
    if writes_apart(model):
        return export_seq2seq(model, adapters, folder)
    return {GRAPH_FILE: export_graph(model, job.target.needs.task, adapters, folder)}


def _inputs(traced: Mapping[str, Traced]) -> tuple[list[str], dict[str, np.ndarray]]:
    """The adapter's inputs, which all graphs have, and their defaults."""
    one = next(iter(traced.values()))
    return one.adapter_inputs, {name: tensor.numpy() for name, tensor in one.defaults.items()}


def _save_all(
    graphs: Mapping[str, ModelProto], inputs: Sequence[str], defaults: Mapping[str, np.ndarray], folder: Path
) -> None:
    for graph in graphs.values():
        add_defaults(graph, defaults)
    check_inputs(list(graphs.values()), inputs)
    for file, graph in graphs.items():
        save_graph(graph, folder / file)


def _check_drift(shown: _Shown, made: _Made, rows: Sequence[Row]) -> None:
    """Raises: WorkError for a quantised graph past its bound, naming the kinds of layers that it loses most by."""
    if made.trial is None:
        return
    trial, bound = made.trial, _bound(shown.job, made.trial.precision)
    figures = [row.to_dict().get(name) for row in rows for name in ("kl", "by_token_kl")]
    drift = max(figure for figure in figures if figure is not None)
    if not drift <= bound:
        if shown.adapters:
            _with(shown.model, None)
        cases = shown.cases(made.defaults)
        blamed = blame(trial.kinds(), drift, lambda left: trial.drift_alone(left, cases))
        raise WorkError(
            f"the graph in {trial.precision} differs from torch by KL {drift:.3g} nats a token, above --max-kl "
            f"{bound:g}; it loses most by {blamed}; nothing was kept; export without --int8 or --int4, or allow more "
            "with --max-kl"
        )


def _bound(job: Job, precision: str) -> float:
    given = job.settings["max_kl"]
    return MAX_KL[precision] if given is None else float(given)


def _arrays(adapter: AdapterTensors, defaults: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The adapter's tensors for every adapter input: what it does not hold has its default."""
    return {**defaults, **{name: tensor.numpy() for name, tensor in adapter.named().items()}}


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
    start_id, first_id = _beginning(model)
    manifest = Manifest(
        task=job.target.needs.task, base=job.target.model.name, base_sha256=sha256, precision=precision,
        is_merged=bool(job.settings["merged"]),
        files=describe_files(folder, _graph_files(folder, GRAPH_FILES.get(job.target.needs.task, (GRAPH_FILE,)))),
        adapters=entries, chat_template=template, layout=job.target.needs.layout,
        pooling=_pooling(job),
        labels=None if head is None or head.labels is None else list(head.labels.names),
        max_positions=num_positions(model), start_id=start_id, first_id=first_id,
    )  # fmt: skip
    for name, adapter in adapters.items():
        file = f"{ADAPTERS_FOLDER}/{name}{ADAPTER_SUFFIX}"
        write_adapter(adapter, folder / file, manifest.version)
        ranks = adapter.ranks or [0]
        entries[name] = AdapterEntry(file, sha256_file(folder / file), min(ranks), max(ranks))
    write_manifest(folder, manifest)
    return manifest


def _graph_files(folder: Path, graphs: Sequence[str]) -> list[str]:
    """The graphs, and their large weights."""
    names = [name for graph in graphs for name in (graph, f"{graph}{DATA_SUFFIX}")]
    return [name for name in names if (folder / name).exists()]


def _beginning(model: PreTrainedModel) -> tuple[int | None, int | None]:
    """What a decoder of its own starts from, and what it has to write first."""
    if not writes_apart(model) or model.generation_config is None:
        return None, None
    return start_token_id(model), model.generation_config.forced_bos_token_id


def _pooling(job: Job) -> str | None:
    """Of an embedding model."""
    if job.target.needs.task != "encoder":
        return None
    head = target_head(job.target)
    return DEFAULT_POOLING if head is None or head.pooling is None else head.pooling


# --- the comparison ------------------------------------------------------------------------------------------------


def _row(
    job: Job, model: PreTrainedModel, export: Export, adapter: str | None, artifact: str, made: _Made,
    probes: tuple[Sequence[Sequence[int]], Sequence[Tensor]],
) -> Row:  # fmt: skip
    """The graph with one adapter, or none, against the model in torch as it is now."""
    ids, wanted = probes
    precision = export.manifest.precision
    found = onnx_logits(export, ids, adapter, model.config.problem_type)
    difference = compare(wanted, found)
    more: dict[str, Any] = {"precision": precision, "left_out": sorted(made.left_out)}
    prompts = [list(probe[:PROMPT_TOKENS]) for probe in ids[:NUM_PROMPTS]]
    speedup = paired_ratio(torch_run(model, prompts[0]), onnx_run(export, prompts[0], adapter))
    notes = [
        f"run by ONNX Runtime on {torch.get_num_threads()} thread(s)",
        f"speed: {what_is_timed(model, prompts[0])}, in turns with torch fp32",
    ]
    if job.target.needs.task in GENERATES:
        stepped = compare_by_token(model, export, ids, adapter)
        texts = written(export, prompts, adapter, NUM_WRITTEN)
        more |= {
            "by_token_max_abs_diff": stepped.max_abs_diff, "by_token_kl": stepped.kl,
            "same_text": same_text(model, prompts, texts), "threads": torch.get_num_threads(),
        }  # fmt: skip
    size = size_of(export.folder / artifact) if adapter is not None else 0
    if adapter is None:
        size = sum(size_of(export.folder / name) for name in _graph_files(export.folder, export.manifest.graphs))
        notes.append("the adapter folded in" if export.manifest.is_merged else "the base alone")
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
