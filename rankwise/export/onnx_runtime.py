"""Runs a folder of `rankwise export --to onnx` with ONNX Runtime alone: numpy in, numpy out, an adapter per request.

Runs go through `InferenceSession.run`: I/O binding leaves adapters out. Adapters are `onnx_adapter_files`'.

Legend: B rows, T new tokens, P tokens in the cache, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, final

import numpy as np

from rankwise.errors import RequestError
from rankwise.export.onnx_adapter_files import AdapterFiles
from rankwise.export.onnx_folder import (
    GRAPH_FILE,
    Manifest,
    check_files,
    need_packages,
    read_manifest,
)

CACHE = "past_key_values."
TYPES = {"tensor(float)": np.float32, "tensor(float16)": np.float16}


@dataclass(frozen=True)
class Sampling:
    """How a token is chosen.

    Args:
        temperature: 0 takes the most likely token each time.
        top_p: draws from the most likely tokens that hold this share of the probability.
        seed: of the draws.
    """

    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        if not (math.isfinite(self.temperature) and self.temperature >= 0):
            raise RequestError(f"temperature must be a number from 0, not {self.temperature}")
        if not 0 < self.top_p <= 1:
            raise RequestError(f"top_p must be above 0 and at most 1, not {self.top_p}")
        if self.temperature == 0 and self.top_p != 1.0:
            raise RequestError(f"top_p {self.top_p} has no effect without a temperature; give one above 0")
        if self.temperature == 0 and self.seed != 0:
            raise RequestError(f"seed {self.seed} has no effect without a temperature; give one above 0")


@dataclass(frozen=True)
class Decoding:
    """How answers are written.

    Args:
        max_new_tokens: the longest answer.
        stop_ids: tokens that end it.
        pad_id: fills rows of a batch on the left.
        sampling: how each token is chosen.
    """

    max_new_tokens: int
    stop_ids: tuple[int, ...]
    pad_id: int
    sampling: Sampling = Sampling()

    def __post_init__(self) -> None:
        if self.max_new_tokens < 1:
            raise RequestError(f"max_new_tokens must be at least 1, not {self.max_new_tokens}")


@final
class OnnxModel:
    """An export, opened. Its adapters are checked by then, and mapped into memory when they are first asked for."""

    def __init__(
        self, folder: str | Path, num_threads: int | None = None, adapters: Sequence[str] | None = None
    ) -> None:
        """`num_threads`: of one operator; None leaves it to ONNX Runtime. `adapters`: those to check now; None takes
        all. Others are checked when they are first used.

        Raises: RequestError for a folder that is no export or whose files have changed, an adapter that can't be used,
        and where the package is missing.
        """
        need_packages(("onnxruntime",))
        self.folder = Path(folder).expanduser()
        self.manifest: Manifest = read_manifest(self.folder)
        if self.manifest.start_id is not None:
            raise RequestError(
                f"'{folder}' is a {self.manifest.task} export, which has an encoder; open it as OnnxSeq2Seq"
            )
        check_files(self.folder, self.manifest)
        self.session = session_of(self.folder / GRAPH_FILE, num_threads)
        self.inputs: dict[str, Any] = {node.name: node for node in self.session.get_inputs()}
        self.outputs = [node.name for node in self.session.get_outputs()]
        # inputs that have a default are listed apart: the adapter's
        changed = {node.name: node for node in self.session.get_overridable_initializers()}
        self.adapters = AdapterFiles(self.folder, self.manifest, changed)
        self.adapters.check(list(self.manifest.adapters) if adapters is None else adapters)

    # --- runs ------------------------------------------------------------------------------------------------------

    def run(self, feeds: dict[str, np.ndarray], adapter: str | None = None) -> dict[str, np.ndarray]:
        """One pass through the graph; outputs by name."""
        options = self.adapters.options(() if adapter is None else (adapter,))
        return dict(zip(self.outputs, self.session.run(self.outputs, feeds, options), strict=True))

    def empty_cache(self, num_rows: int) -> dict[str, np.ndarray]:
        """The cache before the first token."""
        return {
            name: np.zeros((num_rows, node.shape[1], 0, node.shape[3]), TYPES[node.type])
            for name, node in self.inputs.items()
            if name.startswith(CACHE)
        }

    def step(
        self, ids: np.ndarray, mask: np.ndarray, cache: dict[str, np.ndarray], adapter: str | None,
        positions: Sequence[int] | None = None,
    ) -> tuple[np.ndarray, dict[str, np.ndarray]]:  # fmt: skip
        """Logits [B, K, V] of new tokens `ids` [B, T], and the cache with them; `mask` [B, P + T].

        `positions`: which of the T get logits; None takes the last.
        """
        feeds = {"input_ids": ids, "attention_mask": mask, **cache}
        feeds["logit_positions"] = np.array([ids.shape[1] - 1] if positions is None else positions, np.int64)
        found = self.run(feeds, adapter)
        grown = {name: found[name.replace(CACHE, "present.", 1)] for name in cache}
        return found["logits"], grown

    def logits(self, row: Sequence[int], adapter: str | None = None, by_token: bool = False) -> np.ndarray:
        """Logits [T, V] at every position of one row; `by_token`: through the cache, a token at a time."""
        ids = np.array([list(row)], np.int64)
        if not by_token:
            found, _ = self.step(ids, np.ones_like(ids), self.empty_cache(1), adapter, range(ids.shape[1]))
            return found[0]
        cache, found = self.empty_cache(1), []
        for place in range(ids.shape[1]):
            mask = np.ones((1, place + 1), np.int64)
            logits, cache = self.step(ids[:, place : place + 1], mask, cache, adapter)
            found.append(logits[0, 0])
        return np.stack(found)

    def encode(self, row: Sequence[int], adapter: str | None = None) -> np.ndarray:
        """What an encoder's graph gives for one row: logits [1, ...], or hidden states [1, T, H]."""
        ids = np.array([list(row)], np.int64)
        every = {"input_ids": ids, "attention_mask": np.ones_like(ids), "token_type_ids": np.zeros_like(ids)}
        (found,) = self.run({name: every[name] for name in self.inputs}, adapter).values()
        return found

    def generate(self, rows: Sequence[Sequence[int]], decoding: Decoding, adapter: str | None) -> list[list[int]]:
        """The new tokens of each row, up to and without its stop token.

        Raises: RequestError for an empty row, or one that does not fit into the model with its answer.
        """
        longest = max((len(row) for row in rows), default=0)
        check_rows(rows, decoding, longest + decoding.max_new_tokens, self.manifest.max_positions)
        ids = np.array([[decoding.pad_id] * (longest - len(row)) + list(row) for row in rows], np.int64)
        mask = np.array([[0] * (longest - len(row)) + [1] * len(row) for row in rows], np.int64)
        cache = self.empty_cache(len(rows))

        def behind(new: np.ndarray) -> np.ndarray:
            nonlocal cache, mask
            logits, cache = self.step(new, mask, cache, adapter)
            mask = np.concatenate([mask, np.ones((len(mask), 1), np.int64)], axis=1)
            return logits[:, 0]

        return write_answers(behind, ids, decoding)


def check_rows(rows: Sequence[Sequence[int]], decoding: Decoding, together: int, positions: int | None) -> None:
    """Raises: RequestError for an empty row, or where `together`, what has to fit, is more than `positions`."""
    if any(not row for row in rows):
        raise RequestError(f"prompt {[len(row) for row in rows].index(0) + 1} is empty; give at least one token")
    if positions is not None and together > positions:
        raise RequestError(
            f"a prompt of {max(len(row) for row in rows)} tokens with max_new_tokens={decoding.max_new_tokens} does "
            f"not fit into the model's {positions} positions; shorten the prompt or lower max_new_tokens"
        )


def write_answers(
    behind: Callable[[np.ndarray], np.ndarray], ids: np.ndarray, decoding: Decoding, first_id: int | None = None
) -> list[list[int]]:
    """An answer for each row of `ids` [B, T], up to and without its stop token.

    `behind` gives the logits [B, V] behind new tokens, and remembers those. `first_id`: what each answer begins with.
    """
    generator = np.random.default_rng(decoding.sampling.seed)
    answers: list[list[int]] = [[] for _ in ids]
    going = [True] * len(ids)
    for number in range(decoding.max_new_tokens):
        chosen = choose_tokens(behind(ids), decoding.sampling, generator)
        if number == 0 and first_id is not None:
            chosen = np.full_like(chosen, first_id)
        for place, token in enumerate(chosen.tolist()):
            going[place] = going[place] and token not in decoding.stop_ids
            if going[place]:
                answers[place].append(token)
        if not any(going):
            break
        ids = chosen[:, None].astype(np.int64)
    return answers


def session_of(file: Path, num_threads: int | None = None) -> Any:
    """The graph, ready to run on the CPU, without the library's warnings.

    Raises: RequestError for a graph that ONNX Runtime can't read.
    """
    import onnxruntime

    settings = onnxruntime.SessionOptions()
    # threads that spin while they wait take the cores from whoever else is at work
    settings.add_session_config_entry("session.intra_op.allow_spinning", "0")
    settings.log_severity_level = 3  # it warns of every input that has a default: hundreds, and meant so
    if num_threads is not None:
        settings.intra_op_num_threads = num_threads
    try:
        return onnxruntime.InferenceSession(str(file), settings, providers=["CPUExecutionProvider"])
    except Exception as error:
        raise RequestError(f"ONNX Runtime can't read '{file}': {error}") from error


def choose_tokens(logits: np.ndarray, sampling: Sampling, generator: np.random.Generator) -> np.ndarray:
    """A token for each row of `logits` [B, V]: the likeliest, or a draw (Holtzman et al. 2019, arXiv 1904.09751)."""
    if sampling.temperature == 0:
        return logits.argmax(-1)
    scaled = logits.astype(np.float64) / sampling.temperature
    weights = np.exp(scaled - scaled.max(-1, keepdims=True))
    weights /= weights.sum(-1, keepdims=True)
    order = np.argsort(-weights, axis=-1, kind="stable")
    drawn = np.empty(len(logits), np.int64)
    for row, places in enumerate(order):
        sums = np.cumsum(weights[row, places])
        # the first token that reaches top_p is in; rounding may leave the sum below 1
        kept = places[: int(np.searchsorted(sums, sampling.top_p)) + 1]
        share = weights[row, kept] / weights[row, kept].sum()
        drawn[row] = generator.choice(kept, p=share)
    return drawn
