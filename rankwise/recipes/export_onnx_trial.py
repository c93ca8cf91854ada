"""Quantised graphs on trial: made from the fp32 ones on disk, run, and held against torch, kind of layer by kind."""

from __future__ import annotations

import tempfile
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

from rankwise.export.certificate import compare
from rankwise.export.onnx_defaults import save_graph
from rankwise.export.onnx_quantise import FULL, HEAD_KIND, Graph, find_linears, quantise
from rankwise.export.onnx_runtime import CACHE, session_of
from rankwise.export.onnx_seq2seq import Cache, decode, empty_cache, encode
from rankwise.export.onnx_verify import as_logits


@dataclass(frozen=True)
class Case:
    """One adapter, or none, and torch's logits with it.

    Args:
        adapter: every adapter input.
        rows: token ids.
        wanted: torch's logits for each row.
        short, short_wanted: the same of rows that go through the cache, a token at a time; none of an encoder.
    """

    adapter: Mapping[str, np.ndarray]
    rows: Sequence[Sequence[int]]
    wanted: Sequence[Tensor]
    short: Sequence[Sequence[int]] = ()
    short_wanted: Sequence[Tensor] = ()


@dataclass(frozen=True)
class Trial:
    """How quantised graphs are made from those of one model, and how far they drift.

    Args:
        plain: the folder of the fp32 graphs.
        files: the graphs' names there: one, or an encoder's and a decoder's.
        precision: `int8`, `int8-full` or `int4`.
        inputs: names of the adapter's inputs.
        start_id: of a decoder of its own.
        problem_type: of a classifier.
    """

    plain: Path
    files: tuple[str, ...]
    precision: str
    inputs: list[str]
    start_id: int | None
    problem_type: str | None

    def _graphs(self) -> dict[str, Graph]:
        loaded = {file: onnx.load(str(self.plain / file), load_external_data=False) for file in self.files}
        return {file: Graph(proto, self.plain) for file, proto in loaded.items()}

    def kinds(self) -> list[str]:
        """Kinds of layers that may be left out, in the order of the graphs."""
        found = [linear.kind for graph in self._graphs().values() for linear in find_linears(graph, self.inputs)]
        return list(dict.fromkeys(kind for kind in found if kind != HEAD_KIND))

    def build(self, left_out: frozenset[str], plain: bool = False) -> dict[str, ModelProto]:
        """Graphs with these kinds left out: of int8 arithmetic, to 8-bit weights; else, or if `plain`, to fp32."""
        graphs = self._graphs()
        for graph in graphs.values():
            quantise(graph, self.precision, left_out, plain or self.precision != FULL, self.inputs)
        return {file: graph.model for file, graph in graphs.items()}

    def drift(self, left_out: frozenset[str], cases: Sequence[Case]) -> float:
        """The largest KL(torch || graph), nats a token, of any case, of whole rows or token by token."""
        return self._measured(self.build(left_out), cases)

    def drift_alone(self, left_out: frozenset[str], cases: Sequence[Case]) -> float:
        """As `drift`, with these kinds in fp32."""
        return self._measured(self.build(left_out, plain=True), cases)

    def _measured(self, protos: Mapping[str, ModelProto], cases: Sequence[Case]) -> float:
        with tempfile.TemporaryDirectory(dir=self.plain) as passing:
            sessions = []
            for file, proto in protos.items():
                load_external_data_for_model(proto, str(self.plain))
                save_graph(proto, Path(passing) / file)
                sessions.append(session_of(Path(passing) / file, torch.get_num_threads()))
            found = []
            for case in cases:
                whole = [self._whole(sessions, row, case.adapter) for row in case.rows]
                found.append(compare(case.wanted, whole).kl)
                if case.short:
                    stepped = [torch.from_numpy(self._stepped(sessions, row, case.adapter)) for row in case.short]
                    found.append(compare(case.short_wanted, stepped).kl)
        return max(found)

    def _whole(self, sessions: Sequence[Any], row: Sequence[int], adapter: Mapping[str, np.ndarray]) -> Tensor:
        """What `onnx_verify.torch_logits` gives of the model."""
        ids = np.array([list(row)], np.int64)
        if self.start_id is None:
            found = torch.from_numpy(_run(sessions[0], ids, np.ones_like(ids), {}, adapter)["first"])
            return as_logits(found, sessions[0].get_outputs()[0].name == "logits", self.problem_type)
        mask, cache, shifted = self._begun(sessions, ids, adapter)
        return torch.from_numpy(decode(sessions[1], shifted, mask, cache, **adapter)[0][0])

    def _stepped(self, sessions: Sequence[Any], row: Sequence[int], adapter: Mapping[str, np.ndarray]) -> np.ndarray:
        """Logits of each position of a row, a token at a time."""
        ids, found = np.array([list(row)], np.int64), []
        if self.start_id is None:
            cache: Cache = {}
            for place in range(ids.shape[1]):
                outputs = _run(
                    sessions[0], ids[:, place : place + 1], np.ones((1, place + 1), np.int64), cache, adapter
                )
                found.append(outputs["first"][0, -1])
                cache = {name.replace("present.", CACHE, 1): outputs[name] for name in outputs if name != "first"}
            return np.stack(found)
        mask, cache, shifted = self._begun(sessions, ids, adapter)
        for place in range(ids.shape[1]):
            logits, cache = decode(sessions[1], shifted[:, place : place + 1], mask, cache, **adapter)
            found.append(logits[0, -1])
        return np.stack(found)

    def _begun(
        self, sessions: Sequence[Any], ids: np.ndarray, adapter: Mapping[str, np.ndarray]
    ) -> tuple[np.ndarray, Cache, np.ndarray]:
        """Of an encoder-decoder model: the question's mask and cache, and the row as the decoder reads it."""
        mask = np.ones_like(ids)
        cache = {**empty_cache(sessions[1], 1), **encode(sessions[0], ids, mask, **adapter)}
        return mask, cache, np.concatenate([np.full((1, 1), self.start_id, np.int64), ids[:, :-1]], axis=1)


def _run(
    session: Any, ids: np.ndarray, mask: np.ndarray, cache: Cache, adapter: Mapping[str, np.ndarray]
) -> dict[str, np.ndarray]:
    """The graph's outputs, the first under that name; logits of all positions. Without `cache` it is empty."""
    feeds: dict[str, np.ndarray] = {"input_ids": ids, "attention_mask": mask, **adapter}
    for node in session.get_inputs():
        if node.name.startswith(CACHE):
            feeds[node.name] = cache.get(node.name, np.zeros((1, node.shape[1], 0, node.shape[3]), np.float32))
        if node.name == "token_type_ids":
            feeds[node.name] = np.zeros_like(ids)
        if node.name == "logit_positions":
            feeds[node.name] = np.arange(ids.shape[1])
    names = [node.name for node in session.get_outputs()]
    return dict(zip(["first", *names[1:]], session.run(names, feeds), strict=True))
