"""What the writers of the export formats are given, and what a writer is."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from rankwise.export.merged import Probes
from rankwise.export.report import Row
from rankwise.models.load import TASKS, load_config
from rankwise.models.quiet import quietly
from rankwise.recipes.target import Target


@dataclass(frozen=True)
class Job:
    """What is to be exported.

    Args:
        target: the adapter and its base, not loaded yet.
        tokenizer: the target's.
        probes: token ids of texts to compare on.
        settings: every setting of the format, by name.
        out: the folder's final name, for messages; what is written goes into the folder that the writer is given.
    """

    target: Target
    tokenizer: PreTrainedTokenizerBase
    probes: Probes
    settings: Mapping[str, Any]
    out: Path


@dataclass(frozen=True)
class Writer:
    """How a format is written.

    Args:
        check: raises RequestError for a target or settings that the format can't take, before weights are loaded.
        num_bytes: about how large the artefact will be, before weights are loaded.
        write: writes the artefact into a folder, which is there and empty, loads it again, and compares.
        remedy: what to do where the artefact differs from the model in torch by more than its bounds.
    """

    check: Callable[[Job], None]
    num_bytes: Callable[[Job], int]
    write: Callable[[Job, Path], Sequence[Row]]
    remedy: str


def num_parameters(target: Target) -> int:
    """How many numbers the base has, by its configuration, tied ones once; nothing is loaded.

    Raises: RequestError when the configuration can't be read.
    """
    config = load_config(target.model)
    with torch.device("meta"), quietly():
        model = TASKS[target.needs.task].from_config(config, trust_remote_code=target.model.trust_remote_code)
    return sum(parameter.numel() for parameter in model.parameters())
