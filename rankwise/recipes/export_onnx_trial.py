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
from rankwise.export.onnx_runtime import session_of
from rankwise.export.onnx_seq2seq import decode, empty_cache, encode


@dataclass(frozen=True)
class Trial:
    """How quantised graphs are made from those of one model, and how far they drift.

    Args:
        plain: the folder of the fp32 graphs.
        files: the graphs' names there: one, or an encoder's and a decoder's.
        precision: `int8`, `int8-full` or `int4`.
        inputs: names of the adapter's inputs.
        probes: token ids, and torch's logits with `adapter`.
        adapter: every adapter input.
        start_id: of a decoder of its own.
    """

    plain: Path
    files: tuple[str, ...]
    precision: str
    inputs: list[str]
    probes: tuple[Sequence[Sequence[int]], Sequence[Tensor]]
    adapter: Mapping[str, np.ndarray]
    start_id: int | None

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

    def drift(self, left_out: frozenset[str]) -> float:
        """KL(torch || graph), nats a token, on the probes with the adapter."""
        return self._measured(self.build(left_out))

    def drift_alone(self, left_out: frozenset[str]) -> float:
        """As `drift`, with these kinds in fp32."""
        return self._measured(self.build(left_out, plain=True))

    def _measured(self, protos: Mapping[str, ModelProto]) -> float:
        ids, wanted = self.probes
        with tempfile.TemporaryDirectory(dir=self.plain) as passing:
            sessions = []
            for file, proto in protos.items():
                load_external_data_for_model(proto, str(self.plain))
                save_graph(proto, Path(passing) / file)
                sessions.append(session_of(Path(passing) / file, torch.get_num_threads()))
            found = [torch.from_numpy(self._output(sessions, row)) for row in ids]
        if found[0].shape[-1] != wanted[0].shape[-1] or found[0].ndim != wanted[0].ndim:
            found = [out.reshape(one.shape) for out, one in zip(found, wanted, strict=True)]
        return compare(wanted, found).kl

    def _output(self, sessions: Sequence[Any], row: Sequence[int]) -> np.ndarray:
        ids = np.array([list(row)], np.int64)
        mask = np.ones_like(ids)
        if self.start_id is None:
            return _first_output(sessions[0], ids, self.adapter)
        encoder, decoder = sessions
        cache = {**empty_cache(decoder, 1), **encode(encoder, ids, mask, **self.adapter)}
        shifted = np.concatenate([np.full((1, 1), self.start_id, np.int64), ids[:, :-1]], axis=1)
        return decode(decoder, shifted, mask, cache, **self.adapter)[0][0]


def _first_output(session: Any, ids: np.ndarray, adapter: Mapping[str, np.ndarray]) -> np.ndarray:
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
