"""The Modelfile beside an exported GGUF: training's own template, stops, and the model's own generation settings."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path

from transformers import PreTrainedModel

from rankwise.data.chat_template import special_tokens
from rankwise.data.formats import Turn
from rankwise.data.templates import render_prompt, stop_token_ids
from rankwise.export.gguf_metadata import context_length
from rankwise.export.ollama import Message, Turns, modelfile, turns_of
from rankwise.files import write_text
from rankwise.recipes.export_job import Job

MODELFILE = "Modelfile"
PARAMETERS = {"temperature": "temperature", "top_p": "top_p", "top_k": "top_k", "repetition_penalty": "repeat_penalty"}
"""transformers' name of a generation setting, and Ollama's."""
LONGEST_CONTEXT = 8192
"""A longer one would take memory that few conversations need."""


def write_modelfile(job: Job, folder: Path, model: PreTrainedModel, source: str, adapter: str | None = None) -> str:
    """Writes it, and returns the report's sentence on it. `source`: what FROM names."""
    turns = _turns(job)
    data, layout = job.target.data_config(), job.target.needs.layout
    stops = [str(job.tokenizer.convert_ids_to_tokens(i)) for i in stop_token_ids(job.tokenizer, data, layout)]
    write_text(folder / MODELFILE, modelfile(source, turns, stops, parameters(model), adapter))
    if isinstance(turns, str):
        return f"{MODELFILE} has no TEMPLATE: {turns}"
    return f"{MODELFILE}'s TEMPLATE was compared with training's template by rendering both; not run in Ollama"


def _turns(job: Job) -> Turns | str:
    data, layout = job.target.data_config(), job.target.needs.layout

    def render(messages: Sequence[Message]) -> str:
        return render_prompt(job.tokenizer, [Turn(role, content) for role, content in messages], data, layout)[0]

    turns = turns_of(render, special_tokens(job.tokenizer))
    if isinstance(turns, str) or not _adds_bos(job):
        return turns
    # llama.cpp puts the bos token there itself
    bos = str(job.tokenizer.bos_token)
    system = turns.system
    if system is not None and not turns.in_first_user:
        system = (system[0].removeprefix(bos), system[1])
    return dataclasses.replace(turns, begin=turns.begin.removeprefix(bos), system=system)


def _adds_bos(job: Job) -> bool:
    return job.tokenizer("a")["input_ids"][:1] == [job.tokenizer.bos_token_id]


def parameters(model: PreTrainedModel) -> dict[str, object]:
    """Ollama's parameters: the context, and what the model's generation config says of sampling."""
    found: dict[str, object] = {"num_ctx": min(context_length(model.config), LONGEST_CONTEXT)}
    config = model.generation_config
    if config is None:
        return found
    if config.do_sample is False:
        found["temperature"] = 0
    for name, theirs in PARAMETERS.items():
        value = getattr(config, name, None)
        if value is not None and theirs not in found:
            found[theirs] = value
    return found
