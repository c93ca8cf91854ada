"""`--to gguf` and `--to gguf-lora`: files for llama.cpp and Ollama, read back and compared with the model in torch."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from rankwise.attach.inject import merge_in
from rankwise.data.chat_template import read_template
from rankwise.data.config import COMPLETION, PLAIN
from rankwise.data.templates import own_template
from rankwise.errors import RequestError
from rankwise.evaluate.generate import greedy
from rankwise.export.certificate import compare, probe_logits, trim_probes
from rankwise.export.gguf_file import BITS, check_tokenizer, read_model, write_gguf
from rankwise.export.gguf_lora import largest_weight_error, low_rank_layers, read_lora, using, write_lora
from rankwise.export.gguf_metadata import architecture_of, notes_of
from rankwise.export.gguf_tokenizer import Vocabulary, vocabulary_of
from rankwise.export.report import Row, compared_row, size_of
from rankwise.export.same_text import same_text
from rankwise.models.load import load_config
from rankwise.recipes.export_job import Job, Writer, num_parameters
from rankwise.recipes.export_ollama import write_modelfile
from rankwise.recipes.target import open_in

MODEL, LORA, BASE = "model.gguf", "adapter.gguf", "./base.gguf"
BOUNDS = {"f32": {"max_abs_diff": 1e-3}, "f16": {"kl": 1e-3}, "q8_0": {"kl": 1e-2}}
"""The most that the file of a dtype, read back, may differ from the model in torch."""
NOT_RUN = "not run in llama.cpp, and so not timed"
LORA_BOUNDS = {"max_abs_diff": 1e-3, "weight_error": 1e-6}
NUM_PROMPTS, NUM_WRITTEN = 4, 16
"""Prompts that are continued, and tokens written to each."""


def _check(job: Job, to: str) -> None:
    """Raises: RequestError for a target that is no causal language model, or of an unknown architecture."""
    if job.target.needs.task_type != "CAUSAL_LM":
        raise RequestError(
            f"--to {to} holds causal language models; '{job.target.name}' is for {job.target.objective}; --to merged "
            "takes any"
        )
    architecture_of(load_config(job.target.model), to)


def check_model(job: Job) -> None:
    """Raises: RequestError, as `_check`, and for a tokenizer that the file can't hold."""
    _check(job, "gguf")
    rows = max(load_config(job.target.model).vocab_size, len(job.tokenizer))
    vocabulary_of(job.tokenizer, rows, None)


def num_bytes(job: Job) -> int:
    """All of the base's numbers in the dtype."""
    return int(num_parameters(job.target) * BITS[str(job.settings["dtype"])] / 8)


def chat_template(job: Job) -> str | None:
    """The Jinja template that the run rendered its rows with; None where that is none that can be written down."""
    data = job.target.data_config()
    if data.has_template_file:
        return read_template(data.chat_template)
    if data.chat_template in (PLAIN, COMPLETION) or job.tokenizer.chat_template is None:
        return None
    return own_template(job.tokenizer)


def vocabulary(job: Job, model: PreTrainedModel) -> Vocabulary:
    """The tokenizer's, for the model's embedding."""
    embedding: Any = model.get_input_embeddings()
    return vocabulary_of(job.tokenizer, embedding.weight.shape[0], chat_template(job))


def file_name(job: Job) -> str:
    """What the file calls itself."""
    return f"{Path(job.target.model.name).name}-{job.out.name}"


def write_model(job: Job, folder: Path) -> Sequence[Row]:
    """Folds the adapter in, writes the file, reads it back through transformers, and compares."""
    opened = open_in(job.target, torch.float32, "fp32")
    dtype = str(job.settings["dtype"])
    ids = trim_probes(job.probes.ids)
    adapted = probe_logits(opened.model, ids)
    model = merge_in(opened.model, torch.float32)
    told = vocabulary(job, model)
    path = folder / MODEL
    written = write_gguf(model, told, path, dtype, file_name(job))
    num_texts = check_tokenizer(path, job.tokenizer, told.normalises)
    again = read_model(path, model.config)
    difference = compare(adapted, probe_logits(again, ids))
    kinds = ", ".join(f"{count} {kind}" for kind, count in written.types.items())
    notes = [f"read back by transformers; {NOT_RUN}", f"tensors: {kinds}", *notes_of(model.config)]
    notes.append(write_modelfile(job, folder, model, f"./{MODEL}"))
    notes.extend(told.notes)
    if told.num_padded:
        notes.append(f"{told.num_padded} rows of the embedding have no token")
    row = compared_row(
        MODEL, size_of(path), difference, note="; ".join(notes), bounds=BOUNDS[dtype],
        more={"same_text": _same_text(model, again, ids), "tokenizer_texts": num_texts, "pre_tokenizer": told.pre},
    )  # fmt: skip
    return [row]


def _same_text(model: PreTrainedModel, again: PreTrainedModel, ids: Sequence[Sequence[int]]) -> float:
    """Share of greedy tokens of `again` that are `model`'s too."""
    prompts = [list(probe) for probe in ids[:NUM_PROMPTS]]
    settings = greedy(NUM_WRITTEN, (), 0)
    written = []
    for prompt in prompts:
        row = torch.tensor([prompt])
        generate: Any = again.generate
        output = generate(input_ids=row, attention_mask=torch.ones_like(row), generation_config=settings)
        written.append(output[0, len(prompt) :].tolist())
    return same_text(model, prompts, written)


def check_lora(job: Job) -> None:
    """Raises: RequestError, as `_check`."""
    _check(job, "gguf-lora")


def write_adapter(job: Job, folder: Path) -> Sequence[Row]:
    """Writes the factors, reads them back, and compares weights in float64 and logits in torch."""
    opened = open_in(job.target, torch.float32, "fp32")
    model, path = opened.model, folder / LORA
    ids = trim_probes(job.probes.ids)
    ours = low_rank_layers(model)
    adapted = probe_logits(model, ids)
    written = write_lora(model, path, file_name(job))
    theirs = read_lora(path, model.config, ours)
    with using(model, theirs):
        difference = compare(adapted, probe_logits(model, ids))
    notes = [f"factors read back and computed in torch; {NOT_RUN}; alpha {written.alpha:g}"]
    notes.append(write_modelfile(job, folder, model, BASE, f"./{LORA}"))
    if written.num_folded:
        notes.append(f"{written.num_folded} of {written.num_layers} layers have another scale, folded into B")
    return [
        compared_row(
            LORA, size_of(path), difference, note="; ".join(notes), bounds=LORA_BOUNDS,
            more={"weight_error": largest_weight_error(ours, theirs), "layers": written.num_layers},
        )
    ]  # fmt: skip


def num_lora_bytes(job: Job) -> int:
    """The size of the adapter's own weights in fp32."""
    assert job.target.adapter is not None
    return 2 * size_of(job.target.adapter)


GGUF = Writer(check_model, num_bytes, write_model, remedy="export with --dtype f32, or --to merged")
GGUF_LORA = Writer(check_lora, num_lora_bytes, write_adapter, remedy="report this: the factors should be exact")
