"""Heads in recipes: whose labels count, what of a head is new, and what is written beside the adapter."""

from __future__ import annotations

from pathlib import Path

from torch import nn
from transformers import PreTrainedModel

from rankwise.adapters.config import ALL_LINEAR, LoraConfig
from rankwise.attach.checkpoint import HEAD_FILE, read_head, read_tensors
from rankwise.attach.targets import HEADS
from rankwise.data.config import DataConfig
from rankwise.data.head_encoder import CLASSES, TAGS
from rankwise.data.labels import find_labels
from rankwise.errors import RequestError
from rankwise.models.labels import Head, Labels, head_from_dict
from rankwise.models.load import new_modules
from rankwise.train.config import TrainConfig

HEAD_WEIGHTS = ("score.weight", "classifier.weight", "classifier.out_proj.weight")
"""Ends of the names of the weights that give logits, a row for each label."""
UNREAD_MODULES = ("pooler",)
"""Parts of an encoder after its hidden states, which an embedding is pooled from without them."""


def saved_head(folder: str | Path) -> Head | None:
    """What the `head.json` of an adapter's folder says; None where there is none.

    Raises: RequestError for one that can't be read.
    """
    fields = read_head(folder)
    return None if fields is None else head_from_dict(fields, str(Path(folder) / HEAD_FILE))


def num_labels_saved(folder: Path) -> int:
    """How many labels the head in an adapter's folder has.

    Raises: RequestError when there is no head in it.
    """
    for name, tensor in read_tensors(folder).items():
        if name.endswith(HEAD_WEIGHTS):
            return tensor.shape[0]
    raise RequestError(f"'{folder}' holds no head: its labels can't be counted; add a {HEAD_FILE} that names them")


def training_labels(config: DataConfig, layout: str, start: str | None) -> Labels | None:
    """The labels of a run: those that the adapter `start` was trained on, else those of the training rows.

    None of a layout without classes, and of rows without labels. Raises: RequestError when the rows are of another kind
    than the adapter's labels.
    """
    if layout not in (CLASSES, TAGS):
        return None
    found = find_labels(config)
    before = saved_head(start) if start is not None else None
    if found is None or before is None or before.labels is None:
        return found
    if before.labels.is_multi != found.is_multi:
        kinds = ("several labels each", "one label each")
        raise RequestError(
            f"the adapter '{start}' was trained on rows with {kinds[not before.labels.is_multi]}, data.train holds "
            f"rows with {kinds[not found.is_multi]}; write them alike, or start a new adapter"
        )
    return before.labels


def head_of(train: TrainConfig, labels: Labels | None) -> Head | None:
    """What is written beside the adapter of a run."""
    if labels is not None:
        return Head(labels=labels)
    return Head(pooling=train.pooling_name) if train.objective == "embedding" else None


def with_new_modules(model: PreTrainedModel, config: LoraConfig) -> LoraConfig:
    """`config` that trains and saves whole what the base's files do not hold, beside the heads that PEFT names.

    Left to chance they would be others when the adapter is loaded. Of an encoder without a head, the parts that its
    embedding is not pooled from are left out of `all-linear`.
    """
    heads = HEADS.get(config.task_type or "", ())
    if config.task_type == "FEATURE_EXTRACTION" and config.target_modules == ALL_LINEAR:
        unread = [name for name in _linear_names(model) if any(part in UNREAD_MODULES for part in name.split("."))]
        excluded = config.exclude_modules
        if unread and (excluded is None or isinstance(excluded, list)):
            return config.with_(exclude_modules=[*(excluded or []), *unread])
    if not heads:
        return config
    known = (*heads, *(config.modules_to_save or ()))
    new = [name for name in new_modules(model) if not any(f".{entry}." in f".{name}." for entry in known)]
    return config.with_(modules_to_save=[*(config.modules_to_save or ()), *new]) if new else config


def _linear_names(model: nn.Module) -> list[str]:
    return [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
