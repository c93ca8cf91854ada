"""Answers from a folder of `rankwise export --to onnx`: ONNX Runtime computes, prompts are rendered as elsewhere."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, final

from transformers import AutoTokenizer, PreTrainedTokenizerBase
from typing_extensions import override

from rankwise.data.config import TEMPLATE_SUFFIX, DataConfig
from rankwise.data.formats import Turn
from rankwise.data.templates import render_prompt, stop_token_ids
from rankwise.errors import RequestError
from rankwise.evaluate.generate import answer_text
from rankwise.export.onnx_folder import read_manifest
from rankwise.export.onnx_runtime import Decoding, OnnxModel, Sampling
from rankwise.export.onnx_seq2seq import OnnxSeq2Seq
from rankwise.models.quiet import quietly
from rankwise.recipes.session import Session

RUNTIMES: dict[str, type[OnnxModel] | type[OnnxSeq2Seq]] = {"causal-lm": OnnxModel, "seq2seq-lm": OnnxSeq2Seq}
"""For the tasks of models that write."""


@final
class OnnxSession(Session):
    """An export that answers, with one of its adapters."""

    def __init__(self, folder: str, adapter: str | None, chat_template: str | None, sampling: Sampling) -> None:
        """`adapter`: its name, `base` for none; None takes the only one. `chat_template` replaces the run's.

        Raises: RequestError for a folder or adapter that can't be used.
        """
        manifest = read_manifest(folder)
        if manifest.task not in RUNTIMES:
            raise RequestError(f"'{folder}' is a {manifest.task} export and writes no answers")
        self.adapter = manifest.choose(adapter)
        self.model = RUNTIMES[manifest.task](folder, adapters=[] if self.adapter is None else [self.adapter])
        self.sampling = sampling
        self._name = folder
        self._is_alone = False
        template = manifest.chat_template if chat_template is None else chat_template
        if chat_template is None and template.endswith(TEMPLATE_SUFFIX):
            template = str(self.model.folder / template)
        self.data = DataConfig(train="prompts", packing=False, chat_template=template)
        self.tokenizer = _tokenizer(self.model.folder)

    @property
    @override
    def name(self) -> str:
        return self._name

    @property
    @override
    def device(self) -> str:
        return "cpu (ONNX Runtime)"

    @property
    @override
    def has_adapter(self) -> bool:
        return self.adapter is not None

    @override
    @contextlib.contextmanager
    def base_alone(self) -> Iterator[None]:
        self._is_alone = True
        try:
            yield
        finally:
            self._is_alone = False

    @override
    def continue_all(self, conversations: Sequence[Sequence[Turn]], max_new_tokens: int, batch_size: int) -> list[str]:
        layout = self.model.manifest.layout
        rows = [render_prompt(self.tokenizer, turns, self.data, layout)[1] for turns in conversations]
        stops = stop_token_ids(self.tokenizer, self.data, layout)
        pad_id: Any = self.tokenizer.pad_token_id
        decoding = Decoding(max_new_tokens, stops, pad_id, self.sampling)
        adapter = None if self._is_alone else self.adapter
        answers: list[str] = []
        for first in range(0, len(rows), batch_size):
            written = self.model.generate(rows[first : first + batch_size], decoding, adapter)
            answers += [answer_text(self.tokenizer, ids, stops) for ids in written]
        return answers


def _tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    """Raises: RequestError for one that can't be loaded."""
    try:
        with quietly():
            tokenizer = AutoTokenizer.from_pretrained(folder)
    except (OSError, ValueError, ImportError) as error:
        raise RequestError(f"the tokenizer in '{folder}' cannot be loaded: {error}; copy the whole folder") from error
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token  # rows are padded behind the attention mask
    return tokenizer
