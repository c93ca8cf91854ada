"""An attached adapter on disk: PEFT's folder (for others) and the native state (for an exact resume).

Safetensors only. A folder that disagrees with its configuration or with the model is refused with names and shapes,
and the model stays as it was.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import TypeVar

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from rankwise.adapters.base import AdapterLayer
from rankwise.adapters.config import LoraConfig, start_name
from rankwise.adapters.starts import TAKEN_FROM_BASE
from rankwise.adapters.tokens import ROWS, TiedTokenRows
from rankwise.attach import peft_format
from rankwise.attach.attachment import (
    ATTRIBUTE,
    Attachment,
    attachment_of,
    file_name,
    need_active,
    need_attachment,
)
from rankwise.attach.inject import (
    adapter_layers,
    adapter_parameters,
    detach,
    guard_methods,
    inject,
    ranks,
    replace_modules,
)
from rankwise.attach.targets import alpha_in, rank_in
from rankwise.attach.vocabulary import (
    embedding_names,
    embedding_tensors,
    remember_vocabulary,
    resize_vocabulary,
    take_embedding,
)
from rankwise.errors import RequestError, WorkError
from rankwise.files import replacing, replacing_folder

Model = TypeVar("Model", bound=nn.Module)
Path_ = str | os.PathLike[str]


# --- writing -------------------------------------------------------------------------------------------------------


def save_adapter(model: nn.Module, folder: Path_) -> None:
    """Writes PEFT's folder: `adapter_config.json` and `adapter_model.safetensors`. Other files in it stay.

    Raises: RequestError when nothing is attached; WorkError for weights that are not finite or a disk that is full.
    """
    tensors = peft_tensors(model)
    for name, tensor in tensors.items():
        if not torch.isfinite(tensor).all():
            raise WorkError(f"'{name}' holds values that are not finite; the adapter was not saved")
    config = json.dumps(peft_config(model), indent=2, sort_keys=True)
    weights = save(peft_format.to_file(tensors), metadata={"format": "pt"})
    target = Path(folder)
    if target.exists():
        with (
            replacing(target / peft_format.WEIGHTS_FILE) as weights_file,
            replacing(target / peft_format.CONFIG_FILE) as config_file,
        ):  # neither is renamed before both are written
            weights_file.write_bytes(weights)
            config_file.write_text(config, encoding="utf-8")
    else:
        with replacing_folder(target) as temporary:
            (temporary / peft_format.WEIGHTS_FILE).write_bytes(weights)
            (temporary / peft_format.CONFIG_FILE).write_text(config, encoding="utf-8")


def peft_config(model: nn.Module) -> dict[str, object]:
    """The content of `adapter_config.json`."""
    layers = adapter_layers(model)
    config = need_attachment(model).config
    doubled = any(layer.holds_start for layer in layers.values())
    fields = peft_format.config_to_peft(config, doubled)
    fields.update(_patterns_as_saved(model, config, fields))
    fields["fan_in_fan_out"] = any(isinstance(layer.base, Conv1D) for layer in layers.values())
    if config.task_type is None:
        fields["auto_mapping"] = {"base_model_class": type(model).__name__, "parent_library": type(model).__module__}
    return fields


def _patterns_as_saved(model: nn.Module, config: LoraConfig, fields: dict[str, object]) -> dict[str, object]:
    """Patterns that say what is saved, where those in `fields` don't: every layer under its own name.

    The first pattern that fits decides, but the file sorts its keys; and layers that were resized may not have the rank
    of the configuration, or not twice that with a frozen start.
    """
    written = config.with_(
        r=fields["r"],
        lora_alpha=fields["lora_alpha"],
        rank_pattern=dict(sorted(fields["rank_pattern"].items())),  # type: ignore[attr-defined]
        alpha_pattern=dict(sorted(fields["alpha_pattern"].items())),  # type: ignore[attr-defined]
    )
    saved_ranks: dict[str, int] = {}
    saved_alphas: dict[str, float] = {}
    for name, layer in adapter_layers(model).items():
        if layer.rank:
            rank = next(iter(layer.to_peft().values())).shape[0]
            growth = rank / layer.rank
            saved_ranks[name] = rank
            saved_alphas[name] = alpha_in(config, name) * (growth**0.5 if config.use_rslora else growth)
    patterns: dict[str, object] = {}
    if any(rank_in(written, name) != rank for name, rank in saved_ranks.items()):
        patterns["rank_pattern"] = {f"^{name}": rank for name, rank in saved_ranks.items()}
    if any(alpha_in(written, name) != alpha for name, alpha in saved_alphas.items()):
        patterns["alpha_pattern"] = {f"^{name}": alpha for name, alpha in saved_alphas.items()}
    return patterns


def peft_tensors(model: nn.Module) -> dict[str, Tensor]:
    """The content of `adapter_model.safetensors`, under names relative to the model, contiguous and apart."""
    attachment = need_attachment(model)
    found: dict[str, Tensor] = {}
    for name, layer in adapter_layers(model).items():
        found.update({f"{name}.{key}": tensor for key, tensor in layer.to_peft().items()})
    for name in attachment.exchanged:
        found[file_name(model, name)] = attachment.current(model, name)
    for name in embedding_tensors(model, attachment):
        owner = model.get_submodule(name.rpartition(".")[0])
        base = owner.base if isinstance(owner, AdapterLayer) else owner
        found.setdefault(file_name(model, name), base.weight)  # type: ignore[arg-type]
        if isinstance(owner, TiedTokenRows):
            found[f"{name.rpartition('.')[0]}.{ROWS}"] = owner.rows
    return {name: tensor.detach().cpu().contiguous().clone() for name, tensor in sorted(found.items())}


# --- reading -------------------------------------------------------------------------------------------------------


def read_config(folder: Path_) -> LoraConfig:
    """The configuration of the adapter in `folder`.

    Raises: RequestError when there is none, or it is not one that can be read.
    """
    path = Path(folder) / peft_format.CONFIG_FILE
    if not path.is_file():
        reason = "is not a folder" if not Path(folder).is_dir() else f"has no {peft_format.CONFIG_FILE}"
        raise RequestError(f"'{folder}' is not an adapter: it {reason}")
    try:
        fields = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, OSError) as error:
        raise RequestError(f"'{path}' can't be read: {error}") from None
    if not isinstance(fields, dict):
        raise RequestError(f"'{path}' must hold a JSON object, not {type(fields).__name__}")
    return peft_format.config_from_peft(fields, str(folder))


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
    try:
        tensors = load_file(path)
    except (SafetensorError, OSError) as error:
        raise RequestError(f"'{path}' is torn or not a safetensors file: {error}") from None
    for name, tensor in tensors.items():
        if not torch.isfinite(tensor).all():
            raise RequestError(f"'{name}' in '{path}' holds values that are not finite; the adapter is broken")
    return peft_format.from_file(tensors, str(path))


def load_adapter(model: Model, folder: Path_, trainable: bool = False) -> Model:
    """Attaches the adapter in `folder`; where one is attached already, it is replaced in place.

    `trainable`: whether its parameters take gradients (to go on training). A changed vocabulary is saved with the
    adapter, and the model's embeddings are resized to it.

    Raises: RequestError, with the model as it was, when the folder does not fit its configuration or the model.
    """
    config, tensors = read_config(folder), read_tensors(folder)
    attachment = need_active(model, "load an adapter") if attachment_of(model) is not None else None
    if attachment is not None and _same_layout(model, attachment, config):
        extra = _check_names(model, tensors, str(folder))
        if not extra:
            _fill(model, tensors)
            attachment.config = config.with_(target_modules=attachment.config.target_modules)
            return _set_trainable(model, trainable)
    previous = _take_out(model)
    unresize = remember_vocabulary(model)
    try:
        resize_vocabulary(model, tensors, str(folder))
        inject(model, config, generator=None, start=False)
        for name in _check_names(model, tensors, str(folder)):
            take_embedding(model, name, tensors)
        _fill(model, tensors)
    except BaseException:
        _take_out(model)
        unresize()
        _put_back(model, previous)
        raise
    return _set_trainable(model, trainable)


def _set_trainable(model: Model, trainable: bool) -> Model:
    for parameter in adapter_parameters(model).values():
        parameter.requires_grad_(trainable)
    return model


def _same_layout(model: nn.Module, attachment: Attachment, config: LoraConfig) -> bool:
    """Whether the attached layers are those of `config`: then its tensors can be copied in.

    A start that is subtracted (PiSSA) belongs to the layers, so both must have none; whole embeddings and grown ranks
    are looked at anew.
    """
    fields = (
        "r", "exclude_modules", "bias", "use_dora", "rank_pattern", "layers_to_transform", "layers_pattern",
        "modules_to_save", "trainable_token_indices", "lora_alpha", "alpha_pattern", "use_rslora", "lora_dropout",
    )  # fmt: skip
    mine = attachment.config
    if any(getattr(mine, name) != getattr(config, name) for name in fields):
        return False
    if {start_name(mine.init_lora_weights), start_name(config.init_lora_weights)} & TAKEN_FROM_BASE:
        return False
    if attachment.holds_embeddings or any(rank_in(mine, name) != rank for name, rank in ranks(model).items()):
        return False
    return _as_set(mine.target_modules) == _as_set(config.target_modules)


def _as_set(names: str | list[str]) -> str | set[str]:
    return names if isinstance(names, str) else set(names)


Previous = tuple[Attachment, dict[str, AdapterLayer]] | None


def _take_out(model: nn.Module) -> Previous:
    attachment = attachment_of(model)
    if attachment is None:
        return None
    layers = adapter_layers(model)
    detach(model)
    return attachment, layers


def _put_back(model: nn.Module, previous: Previous) -> None:
    """The inverse of `_take_out`."""
    if previous is None:
        return
    attachment, layers = previous
    model.requires_grad_(False)
    replace_modules(model, {layer.base: layer for layer in layers.values()})
    model.add_module(ATTRIBUTE, attachment)
    attachment.swap(model)
    if isinstance(model, PreTrainedModel):
        guard_methods(model)


def _expected(model: nn.Module) -> dict[str, tuple[int, ...]]:
    attachment = need_attachment(model)
    shapes: dict[str, tuple[int, ...]] = {}
    for name, layer in adapter_layers(model).items():
        shapes.update({f"{name}.{key}": shape for key, shape in layer.peft_shapes().items()})
    for name in attachment.exchanged:
        shapes[file_name(model, name)] = tuple(attachment.current(model, name).shape)
    return shapes


def _check_names(model: nn.Module, tensors: dict[str, Tensor], where: str) -> list[str]:
    """Names in the file that are whole embeddings beside the adapter; anything else that differs is an error."""
    expected = _expected(model)
    missing = [name for name in expected if name not in tensors]
    if missing:
        raise RequestError(f"'{where}' lacks {_some(missing)}, which its configuration asks for in this model")
    wrong = [
        f"{name} {list(tensors[name].shape)} where the model has {list(shape)}"
        for name, shape in expected.items()
        if tuple(tensors[name].shape) != shape
    ]
    if wrong:
        raise RequestError(f"'{where}' disagrees with its configuration or this model: {_some(wrong)}")
    extra = [name for name in tensors if name not in expected]
    known = embedding_names(model)
    strange = [name for name in extra if name not in known]
    if strange:
        raise RequestError(f"'{where}' holds {_some(strange)}, which its configuration has no place for in this model")
    return extra


def _some(names: Iterable[str], most: int = 3) -> str:
    listed = list(names)
    rest = f" and {len(listed) - most} more" if len(listed) > most else ""
    return ", ".join(listed[:most]) + rest


def _fill(model: nn.Module, tensors: dict[str, Tensor]) -> None:
    attachment = need_attachment(model)
    for name, layer in adapter_layers(model).items():
        layer.from_peft({key: tensors[f"{name}.{key}"] for key in layer.peft_shapes()})
    with torch.no_grad():
        for name in attachment.exchanged:
            attachment.current(model, name).copy_(tensors[file_name(model, name)])


# --- native state --------------------------------------------------------------------------------------------------


def native_state(model: nn.Module) -> dict[str, Tensor]:
    """Everything that the adapter is, by full name: parameters, frozen starts, exchanged tensors. Not copies.

    Raises: RequestError when nothing is attached.
    """
    attachment = need_attachment(model)
    found: dict[str, Tensor] = {}
    for name, layer in adapter_layers(model).items():
        if isinstance(layer, TiedTokenRows):
            continue
        for key, tensor in layer.state_dict(keep_vars=True).items():
            if not key.startswith("base."):
                found[f"{name}.{key}"] = tensor
    for name in attachment.exchanged:
        found[name] = attachment.current(model, name)
    return found


def load_native_state(model: nn.Module, state: dict[str, Tensor]) -> None:
    """Copies a state from `native_state` into a model attached the same way.

    Raises: RequestError, with nothing copied, when names or shapes differ.
    """
    own = native_state(model)
    if own.keys() != state.keys():
        different = sorted(own.keys() ^ state.keys())
        raise RequestError(f"the saved state and the attached adapter differ in {_some(different)}")
    wrong = [
        f"{name} {list(state[name].shape)} and {list(own[name].shape)}"
        for name in own
        if own[name].shape != state[name].shape
    ]
    if wrong:
        raise RequestError(f"the saved state and the attached adapter differ in shape: {_some(wrong)}")
    with torch.no_grad():
        for name, tensor in own.items():
            tensor.copy_(state[name])
