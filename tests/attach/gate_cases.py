"""Adapters of several tasks, saved, for tests of gates."""

from __future__ import annotations

from pathlib import Path

import torch

import rankwise as rw
from rankwise.attach.inject import adapter_parameters
from tests import tiny

TASKS = ("movies", "books", "games")
SETTINGS = {
    "movies": dict(r=4, lora_alpha=8, target_modules="all-linear"),
    "books": dict(r=1, lora_alpha=3, target_modules="all-linear", use_rslora=True),
    "games": dict(r=6, lora_alpha=6, target_modules=["q_proj", "v_proj"], rank_pattern={"v_proj": 2}),
}
GPT2 = {"games": dict(r=6, lora_alpha=6, target_modules=["c_attn"])}


def disturbed(model, seed: int, by: float = 0.1):
    """Random numbers onto every adapter parameter."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in adapter_parameters(model).values():
            parameter.add_(torch.empty_like(parameter).normal_(generator=generator) * by)
    return model


def saved_adapters(folder: Path, build=tiny.llama, tasks=TASKS, **more) -> dict[str, str]:
    """One folder for each task, each with an adapter of its own kind."""
    settings = SETTINGS | (GPT2 if build is tiny.gpt2 else {})
    for seed, task in enumerate(tasks):
        model = build()
        rw.attach(model, rw.LoraConfig(**{**settings[task], **more}))
        rw.save_adapter(disturbed(model, seed), folder / task)
    return {task: str(folder / task) for task in tasks}


def alone(folders: dict[str, str], task: str, build=tiny.llama):
    """The model with one adapter."""
    return rw.load_adapter(build(), folders[task])
