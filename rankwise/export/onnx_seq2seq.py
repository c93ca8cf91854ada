"""Runs the two graphs of an encoder-decoder export with ONNX Runtime alone, an adapter per request.

The question goes through the encoder once; what the decoder attends to of it stands in the cache, beside the answer so
far. What the graphs take and give is `onnx_seq2seq_graph`'s to say; decoding and sampling are `onnx_runtime`'s.

Legend: B rows, S tokens of the question, T new tokens, P tokens of the answer in the cache, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, final

import numpy as np

from rankwise.errors import RequestError
from rankwise.export.onnx_adapter_files import AdapterFiles
from rankwise.export.onnx_folder import DECODER_FILE, ENCODER_FILE, check_files, need_packages, read_manifest
from rankwise.export.onnx_runtime import CACHE, TYPES, Decoding, check_rows, session_of, write_answers

OWN, SOURCE = ".decoder.", ".encoder."
"""In the name of a tensor of the cache: of the answer, of the question."""
Cache = dict[str, np.ndarray]


def empty_cache(decoder: Any, num_rows: int) -> Cache:
    """The answers' cache before the first token; `decoder` is a session."""
    return {
        node.name: np.zeros((num_rows, node.shape[1], 0, node.shape[3]), TYPES[node.type])
        for node in decoder.get_inputs()
        if OWN in node.name and node.name.startswith(CACHE)
    }


def encode(encoder: Any, ids: np.ndarray, mask: np.ndarray, options: Any = None, **adapter: np.ndarray) -> Cache:
    """The questions' cache; `encoder` is a session, `adapter` inputs that are given by hand."""
    names = [node.name for node in encoder.get_outputs()]
    found = encoder.run(names, {"input_ids": ids, "attention_mask": mask, **adapter}, options)
    return {name.replace("present.", CACHE, 1): tensor for name, tensor in zip(names, found, strict=True)}


def decode(
    decoder: Any, ids: np.ndarray, mask: np.ndarray, cache: Cache, options: Any = None, **adapter: np.ndarray
) -> tuple[np.ndarray, Cache]:
    """Logits [B, T, V] behind `ids` [B, T], and the cache with them; `mask` [B, S] is the questions'."""
    names = [node.name for node in decoder.get_outputs()]
    feeds = {"input_ids": ids, "encoder_attention_mask": mask, **cache, **adapter}
    found = dict(zip(names, decoder.run(names, feeds, options), strict=True))
    grown = {name: found[name.replace(CACHE, "present.", 1)] if OWN in name else cache[name] for name in cache}
    return found["logits"], grown


@final
class OnnxSeq2Seq:
    """An export of an encoder-decoder model, opened. Its adapters are checked by then, as `OnnxModel`'s."""

    def __init__(
        self, folder: str | Path, num_threads: int | None = None, adapters: Sequence[str] | None = None
    ) -> None:
        """As `OnnxModel`.

        Raises: RequestError, as `OnnxModel`.
        """
        need_packages(("onnxruntime",))
        self.folder = Path(folder).expanduser()
        self.manifest = read_manifest(self.folder)
        if self.manifest.start_id is None:
            raise RequestError(
                f"'{folder}' is a {self.manifest.task} export, which has no encoder; open it as OnnxModel"
            )
        check_files(self.folder, self.manifest)
        self.encoder = session_of(self.folder / ENCODER_FILE, num_threads)
        self.decoder = session_of(self.folder / DECODER_FILE, num_threads)
        inputs = {node.name: node for node in self.decoder.get_overridable_initializers()}
        self.adapters = AdapterFiles(self.folder, self.manifest, inputs)
        self.adapters.check(list(self.manifest.adapters) if adapters is None else adapters)

    def encode(self, ids: np.ndarray, mask: np.ndarray, adapter: str | None) -> Cache:
        """The cache of questions `ids` [B, S], and of answers that have not begun."""
        options = self.adapters.options(() if adapter is None else (adapter,))
        return {**empty_cache(self.decoder, len(ids)), **encode(self.encoder, ids, mask, options)}

    def step(self, ids: np.ndarray, mask: np.ndarray, cache: Cache, adapter: str | None) -> tuple[np.ndarray, Cache]:
        """Logits [B, T, V] of new tokens `ids` [B, T], and the cache with them; `mask` [B, S] is the questions'."""
        return decode(self.decoder, ids, mask, cache, self.adapters.options(() if adapter is None else (adapter,)))

    def logits(
        self, question: Sequence[int], answer: Sequence[int], adapter: str | None = None, by_token: bool = False
    ) -> np.ndarray:
        """Logits [T, V] from which each token of `answer` would be chosen; `by_token`: one at a time."""
        ids, shifted = np.array([list(question)], np.int64), np.array([self.shifted(answer)], np.int64)
        mask = np.ones_like(ids)
        cache = self.encode(ids, mask, adapter)
        if not by_token:
            return self.step(shifted, mask, cache, adapter)[0][0]
        found = []
        for place in range(shifted.shape[1]):
            logits, cache = self.step(shifted[:, place : place + 1], mask, cache, adapter)
            found.append(logits[0, 0])
        return np.stack(found)

    def shifted(self, answer: Sequence[int]) -> list[int]:
        """What the decoder reads to choose each token of `answer`."""
        start: Any = self.manifest.start_id
        return [start, *answer[:-1]]

    def generate(self, rows: Sequence[Sequence[int]], decoding: Decoding, adapter: str | None) -> list[list[int]]:
        """The answer to each row, up to and without its stop token.

        Raises: RequestError for an empty row, or one that does not fit into the model.
        """
        longest = max((len(row) for row in rows), default=0)
        check_rows(rows, decoding, max(longest, decoding.max_new_tokens + 1), self.manifest.max_positions)
        ids = np.array([list(row) + [decoding.pad_id] * (longest - len(row)) for row in rows], np.int64)
        mask = np.array([[1] * len(row) + [0] * (longest - len(row)) for row in rows], np.int64)
        cache = self.encode(ids, mask, adapter)

        def behind(new: np.ndarray) -> np.ndarray:
            nonlocal cache
            logits, cache = self.step(new, mask, cache, adapter)
            return logits[:, -1]

        begin = np.full((len(rows), 1), self.manifest.start_id, np.int64)
        return write_answers(behind, begin, decoding, self.manifest.first_id)
