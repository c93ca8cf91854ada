"""An attached adapter on disk: PEFT's folder (for others) and the native state (for an exact resume).

Safetensors only. A folder that disagrees with its configuration or with the model is refused with names and shapes,
and the model stays as it was.
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
from collections.abc import Container, Iterable, Mapping
from copy import copy
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors.torch import save
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from rankwise.adapters.config import DATA_STARTS, LoraConfig, start_name
from rankwise.adapters.low_rank import LowRankLayer
from rankwise.adapters.starts import TAKEN_FROM_BASE
from rankwise.attach import peft_format
from rankwise.attach.attachment import (
    Attachment,
    adapter_layers,
    attachment_of,
    file_name,
    need_active,
    need_attachment,
    unchanged_on_error,
)
from rankwise.attach.inject import adapter_parameters, adapter_tensors, detach, inject
from rankwise.attach.targets import alpha_in, rank_in
from rankwise.attach.vocabulary import embedding_names, embedding_tensors, resize_vocabulary, take_embedding
from rankwise.attach.weights_file import read_weights
from rankwise.errors import RequestError, WorkError
from rankwise.files import replacing, replacing_folder
from rankwise.quantized import unpack

Model = TypeVar("Model", bound=nn.Module)
Path_ = str | os.PathLike[str]

HEAD_FILE = "head.json"
"""Beside PEFT's two files, for a head that is a riddle without it: names of classes, or an embedding's pooling."""

NESTED_FILE = "nested.json"
"""Beside them, for an adapter whose every prefix works (`ranks.policy: nested`): its `least` and `most` rank."""

TASKS_FILE = "tasks.json"
"""What makes a folder one of several adapters: a gate's, or that of task embeddings."""


# --- writing -------------------------------------------------------------------------------------------------------


def save_adapter(model: nn.Module, folder: Path_) -> None:
    """Writes PEFT's folder: `adapter_config.json` and `adapter_model.safetensors`. Other files in it stay.

    Where the attachment says what its head means, that goes into `head.json`; that it is nested, into `nested.json`.

    A gate, or a task embedding, is a folder of such folders (`rankwise.attach.gate_folder`).

    Raises: RequestError when nothing is attached; WorkError for weights that are not finite or a disk that is full.
    """
    if need_attachment(model).mixture is not None:
        from rankwise.attach.gate_folder import save_gate

        return save_gate(model, folder)
    tensors = peft_tensors(model)
    for name, tensor in tensors.items():
        if not torch.isfinite(tensor).all():
            raise WorkError(f"'{name}' holds values that are not finite; the adapter was not saved")
    attachment = need_attachment(model)
    weights = save(peft_format.to_file(tensors), metadata={"format": "pt"})
    texts = {peft_format.CONFIG_FILE: json.dumps(peft_config(model), indent=2, sort_keys=True)}
    for name, content in ((HEAD_FILE, attachment.head), (NESTED_FILE, attachment.nested)):
        if content is not None:
            texts[name] = json.dumps(content, indent=2, ensure_ascii=False)
    target, names = Path(folder), (peft_format.WEIGHTS_FILE, *texts)
    with contextlib.ExitStack() as stack:  # none is renamed before all are written
        if target.exists():
            places = {name: stack.enter_context(replacing(target / name)) for name in names}
        else:
            temporary = stack.enter_context(replacing_folder(target))
            places = {name: temporary / name for name in names}
        places[peft_format.WEIGHTS_FILE].write_bytes(weights)
        for name, text in texts.items():
            places[name].write_text(text, encoding="utf-8")


def peft_config(model: nn.Module) -> dict[str, object]:
    """The content of `adapter_config.json`."""
    config = need_attachment(model).config
    fields = peft_format.config_to_peft(_config_as_saved(model, config))
    fields["fan_in_fan_out"] = any(isinstance(layer.base, Conv1D) for layer in adapter_layers(model).values())
    if config.task_type is None:
        fields["auto_mapping"] = {"base_model_class": type(model).__name__, "parent_library": type(model).__module__}
    return fields


def _config_as_saved(model: nn.Module, config: LoraConfig) -> LoraConfig:
    """`config` with patterns that say what is saved: where its own don't, every layer under its own name.

    The first pattern that fits decides, but the file sorts its keys; and layers that were resized may not have the rank
    of the configuration, or not twice that with a frozen start.
    """
    start = start_name(config.init_lora_weights)
    written = peft_format.doubled(config) if start in TAKEN_FROM_BASE else config
    if start in DATA_STARTS:  # PEFT would want to hear of the data
        written = written.with_(init_lora_weights=True)
    read = written.with_(
        rank_pattern=dict(sorted(written.rank_pattern.items())),
        alpha_pattern=dict(sorted(written.alpha_pattern.items())),
    )
    layers = {name: layer for name, layer in adapter_layers(model).items() if layer.rank}
    saved_ranks = {name: next(iter(layer.to_peft().values())).shape[0] for name, layer in layers.items()}
    alphas = dict[str, int | float]()
    for name, layer in layers.items():
        assert isinstance(layer, LowRankLayer)  # a gate's folder is another
        growth = saved_ranks[name] / layer.rank
        alphas[name] = layer.alpha * (growth**0.5 if config.use_rslora else growth)
    if any(rank_in(read, name) != rank for name, rank in saved_ranks.items()):
        written = written.with_(rank_pattern={f"^{name}": rank for name, rank in saved_ranks.items()})
    if any(alpha_in(read, name) != alpha for name, alpha in alphas.items()):
        written = written.with_(alpha_pattern={f"^{name}": alpha for name, alpha in alphas.items()})
    return written


def peft_tensors(model: nn.Module) -> dict[str, Tensor]:
    """The content of `adapter_model.safetensors`, under names relative to the model, contiguous and apart."""
    found = {**embedding_tensors(model), **file_tensors(model)}
    for name, layer in adapter_layers(model).items():
        found.update({f"{name}.{key}": tensor for key, tensor in layer.to_peft().items()})
    return {name: tensor.detach().cpu().contiguous().clone() for name, tensor in sorted(found.items())}


def file_tensors(model: nn.Module) -> dict[str, Tensor]:
    """The adapter's own tensors under the names that PEFT's file has for them, relative to the model. Not copies."""
    attachment = need_attachment(model)
    found = attachment.saved_parameters(model)
    for name in attachment.exchanged:
        found[file_name(model, name)] = attachment.current(model, name)
    return found


# --- reading -------------------------------------------------------------------------------------------------------


def read_config(folder: Path_) -> LoraConfig:
    """The configuration of the adapter in `folder`.

    Raises: RequestError when there is none, or it is not one that can be read.
    """
    text = _text(folder, peft_format.CONFIG_FILE)
    if text is None and (Path(folder) / TASKS_FILE).is_file():
        raise RequestError(
            f"'{folder}' holds several adapters under a gate, not one: give the folder of one of them, or fold them "
            f"into one by `rankwise fold {folder} --out DIR`"
        )
    if text is None:
        reason = f"has no {peft_format.CONFIG_FILE}"
        if not Path(folder).is_dir():
            reason = "is not a folder; fetch one of the Hub first, by `hf download NAME --local-dir FOLDER`"
        raise RequestError(f"'{folder}' is not an adapter: it {reason}")
    config = _config(text, str(folder))
    own = copy(config)  # with lists of the caller's own: what is remembered must not change with them
    for name, value in vars(config).items():
        if type(value) in (list, dict):
            object.__setattr__(own, name, copy(value))
    return own


@functools.lru_cache(maxsize=8)
def _config(text: str, folder: str) -> LoraConfig:
    """Remembered, since an adapter that is swapped back and forth says the same each time."""
    fields = _json_object(text, Path(folder) / peft_format.CONFIG_FILE)
    return peft_format.config_from_peft(fields, folder)


def _text(folder: Path_, name: str) -> str | None:
    """The content of a file of the folder, None where there is none. Raises: RequestError when it can't be read."""
    path = os.path.join(folder, name)  # noqa: PTH118 (pathlib takes ten times as long)
    try:
        with open(path, encoding="utf-8") as file:
            return file.read()
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (ValueError, OSError) as error:
        raise RequestError(f"'{path}' can't be read: {error}") from None


def _json_object(text: str, path: Path) -> dict[str, Any]:
    try:
        content = json.loads(text)
    except ValueError as error:
        raise RequestError(f"'{path}' can't be read: {error}") from None
    if not isinstance(content, dict):
        raise RequestError(f"'{path}' must hold a JSON object, not {type(content).__name__}")
    return content


def read_head(folder: Path_) -> dict[str, Any] | None:
    """The content of `head.json`; None where there is none.

    Raises: RequestError for one that can't be read.
    """
    text = _text(folder, HEAD_FILE)
    return None if text is None else _json_object(text, Path(folder) / HEAD_FILE)


def read_nested(folder: Path_) -> dict[str, Any] | None:
    """The content of `nested.json`; None where there is none.

    Raises: RequestError for one that can't be read.
    """
    text = _text(folder, NESTED_FILE)
    return None if text is None else _json_object(text, Path(folder) / NESTED_FILE)


def read_tensors(folder: Path_) -> dict[str, Tensor]:
    """The adapter's tensors, under names relative to the model.

    Raises: RequestError for a missing, torn or pickled file, and for values that are not finite.
    """
    path = Path(folder) / peft_format.WEIGHTS_FILE
    if not path.is_file():
        if (Path(folder) / "adapter_model.bin").exists():
            raise RequestError(
                f"'{folder}' holds a pickle file (adapter_model.bin), which could run code; "
                "have it saved as safetensors (PEFT's default)"
            )
        raise RequestError(f"'{folder}' has no {peft_format.WEIGHTS_FILE}")
    weights = read_weights(path)
    broken = weights.not_finite()
    if broken is not None:
        raise RequestError(f"'{broken}' in '{path}' holds values that are not finite; the adapter is broken")
    return peft_format.from_file(weights.tensors, str(path))


def load_adapter(model: Model, folder: Path_, trainable: bool = False) -> Model:
    """Attaches the adapter in `folder`; where one is attached already, it is replaced in place.

    `trainable`: whether its parameters take gradients (to go on training). A changed vocabulary is saved with the
    adapter, and the model's embeddings are resized to it until `detach`.

    A folder that holds a gate, or a task embedding, is attached as such.

    Raises: RequestError, with the model as it was, when the folder does not fit its configuration or the model.
    """
    if os.path.exists(os.path.join(folder, TASKS_FILE)):  # noqa: PTH118, PTH110 (as in `_text`)
        from rankwise.attach.gate_folder import load_gate

        return load_gate(model, folder, trainable)
    config, tensors, head = read_config(folder), read_tensors(folder), read_head(folder)
    attachment = need_active(model, "load an adapter") if attachment_of(model) is not None else None
    if attachment is not None and _same_layout(own := file_tensors(model), attachment, config, tensors):
        if config != attachment.config:
            attachment.config = config.with_(target_modules=attachment.config.target_modules)
        _copy(own, tensors)
        parameters: Iterable[Tensor] = attachment.saved_parameters(model).values()
        if attachment.exchanged:
            parameters = adapter_parameters(model).values()
    else:
        unpack(model)
        with unchanged_on_error(model):
            _attach_saved(model, config, tensors, str(folder))
        parameters = adapter_parameters(model).values()
    need_attachment(model).head, need_attachment(model).nested = head, read_nested(folder)
    for parameter in parameters:
        parameter.requires_grad_(trainable)
    return model


def set_tensors(model: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Copies the tensors of an adapter of the same layout, under `file_tensors`' names, into the one attached.

    Raises: RequestError, with nothing copied, when names or shapes differ.
    """
    own = file_tensors(model)
    _check(own, tensors, "the adapter", beside=embedding_names(model))
    _copy(own, tensors)


def _attach_saved(model: nn.Module, config: LoraConfig, tensors: dict[str, Tensor], where: str) -> None:
    if attachment_of(model) is not None:
        detach(model)
    resized = resize_vocabulary(model, tensors, where)
    inject(model, config, generator=None, start=False)
    if resized is not None:
        attachment = need_attachment(model)
        attachment.vocabulary_before, cut = resized
        for name, rows in cut.items():
            attachment.keep(f"cut:{name}", rows)
    own, whole = file_tensors(model), embedding_names(model)
    _check(own, tensors, f"'{where}'", beside=whole)
    for name in tensors.keys() - own.keys():
        take_embedding(model, name, tensors[name])
    _copy(own, tensors)


def _same_layout(
    own: Mapping[str, Tensor], attachment: Attachment, config: LoraConfig, tensors: Mapping[str, Tensor]
) -> bool:
    """Whether the attached layers are those of `config`, by what they save and compute: its tensors can be copied in.

    A start that is subtracted (PiSSA) belongs to the layers, so both must have none; whole embeddings are looked at
    anew.
    """
    mine = attachment.config
    if {start_name(mine.init_lora_weights), start_name(config.init_lora_weights)} & TAKEN_FROM_BASE:
        return False
    shapes = {name: tensor.shape for name, tensor in own.items()}
    if attachment.holds_embeddings or shapes != {name: tensor.shape for name, tensor in tensors.items()}:
        return False
    return mine == config or _layout(mine) == _layout(config)


def _layout(config: LoraConfig) -> dict[str, object]:
    """The settings that decide which layers there are and what they compute."""
    targets = config.target_modules
    ordered = targets if isinstance(targets, str) else sorted(set(targets))
    no_say = ("init_lora_weights", "init_scale", "task_type", "base_model_name_or_path", "revision")
    return {**vars(config), "target_modules": ordered, **dict.fromkeys(no_say)}


def _check(own: Mapping[str, Tensor], given: Mapping[str, Tensor], what: str, beside: Container[str] = ()) -> None:
    """Raises: RequestError when `given` does not have the names and shapes of `own`; names in `beside` may be more."""
    missing = [name for name in own if name not in given]
    if missing:
        raise RequestError(f"{what} lacks {_some(missing)}, which its configuration asks for in this model")
    wrong = [
        f"{name} {list(given[name].shape)} where the model has {list(tensor.shape)}"
        for name, tensor in own.items()
        if given[name].shape != tensor.shape
    ]
    if wrong:
        raise RequestError(f"{what} disagrees with its configuration or this model: {_some(wrong)}")
    strange = [name for name in given if name not in own and name not in beside]
    if strange:
        raise RequestError(f"{what} holds {_some(strange)}, which its configuration has no place for in this model")


def _some(names: Iterable[str], most: int = 3) -> str:
    listed = list(names)
    rest = f" and {len(listed) - most} more" if len(listed) > most else ""
    return ", ".join(listed[:most]) + rest


@torch.no_grad()
def _copy(own: Mapping[str, Tensor], given: Mapping[str, Tensor]) -> None:
    # one call for all: a loop in Python costs as much again as the copying
    torch._foreach_copy_(list(own.values()), [given[name] for name in own])


# --- native state --------------------------------------------------------------------------------------------------


def native_state(model: nn.Module) -> dict[str, Tensor]:
    """The adapter as it is, by full name (see `adapter_tensors`). Not copies."""
    return adapter_tensors(model)


def load_native_state(model: nn.Module, state: dict[str, Tensor]) -> None:
    """Copies a state from `native_state` into a model attached the same way.

    Raises: RequestError, with nothing copied, when names or shapes differ.
    """
    own = native_state(model)
    _check(own, state, "the saved state")
    _copy(own, state)
