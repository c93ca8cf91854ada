"""An attached adapter on disk: PEFT's folder (for others) and the native state (for an exact resume).

Safetensors only. A folder that disagrees with its configuration or with the model is refused with names and shapes,
and the model stays as it was.
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Iterable
from pathlib import Path
from typing import TypeVar

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from rankwise.adapters.base import AdapterLayer
from rankwise.adapters.config import LoraConfig
from rankwise.adapters.tokens import ROWS, TiedTokenRows, TokenRows
from rankwise.attach import peft_format
from rankwise.attach.attachment import ATTRIBUTE, Attachment, attachment_of, need_attachment
from rankwise.attach.inject import adapter_layers, adapter_parameters, detach, guard_methods, inject, replace_modules
from rankwise.attach.targets import embedding_ends, rank_in, alpha_in
from rankwise.errors import RequestError, WorkError
from rankwise.files import replacing, replacing_folder

log = logging.getLogger(__name__)
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
        _write_pair(target, weights, config, replace=True)
    else:
        with replacing_folder(target) as temporary:
            _write_pair(temporary, weights, config, replace=False)


def _write_pair(folder: Path, weights: bytes, config: str, replace: bool) -> None:
    for name, data in ((peft_format.WEIGHTS_FILE, weights), (peft_format.CONFIG_FILE, config.encode())):
        if replace:
            with replacing(folder / name) as temporary:
                temporary.write_bytes(data)
        else:
            (folder / name).write_bytes(data)


def peft_config(model: nn.Module) -> dict[str, object]:
    """The content of `adapter_config.json`."""
    layers = adapter_layers(model)
    config = _order_free(need_attachment(model).config, [name for name, layer in layers.items() if layer.rank])
    doubled = any(layer.holds_start for layer in layers.values())
    fields = peft_format.config_to_peft(config, doubled)
    fields["fan_in_fan_out"] = any(isinstance(layer.base, Conv1D) for layer in layers.values())
    if config.task_type is None:
        fields["auto_mapping"] = {"base_model_class": type(model).__name__, "parent_library": type(model).__module__}
    return fields


def _order_free(config: LoraConfig, names: list[str]) -> LoraConfig:
    """The first pattern that fits decides, but the file sorts its keys: where that matters, every layer is named."""
    ranks, alphas = dict(sorted(config.rank_pattern.items())), dict(sorted(config.alpha_pattern.items()))
    by_file = config.with_(rank_pattern=ranks, alpha_pattern=alphas)
    if any(rank_in(config, n) != rank_in(by_file, n) for n in names):
        config = config.with_(rank_pattern={name: rank_in(config, name) for name in names})
    if any(alpha_in(config, n) != alpha_in(by_file, n) for n in names):
        config = config.with_(alpha_pattern={name: alpha_in(config, name) for name in names})
    return config


def peft_tensors(model: nn.Module) -> dict[str, Tensor]:
    """The content of `adapter_model.safetensors`, under names relative to the model, contiguous and apart."""
    attachment = need_attachment(model)
    found: dict[str, Tensor] = {}
    for name, layer in adapter_layers(model).items():
        found.update({f"{name}.{key}": tensor for key, tensor in layer.to_peft().items()})
    for name in attachment.exchanged:
        found[_file_name(model, name)] = attachment.current(model, name)
    for name in _embedding_tensors(model, attachment):
        owner = model.get_submodule(name.rpartition(".")[0])
        base = owner.base if isinstance(owner, AdapterLayer) else owner
        found[_file_name(model, name)] = base.weight  # type: ignore[assignment]
        if isinstance(owner, TiedTokenRows):
            found[f"{name.rpartition('.')[0]}.{ROWS}"] = owner.rows
    return {name: tensor.detach().cpu().contiguous().clone() for name, tensor in sorted(found.items())}


def _file_name(model: nn.Module, name: str) -> str:
    """A base tensor's name in PEFT's file: inside a wrapped layer it moves below `base_layer`."""
    path, _, leaf = name.rpartition(".")
    owner = model.get_submodule(path)
    if isinstance(owner, (TokenRows, TiedTokenRows)):
        return f"{path}.token_adapter.base_layer.{leaf}"
    return f"{path}.base_layer.{leaf}" if isinstance(owner, AdapterLayer) else name


def _ends(model: nn.Module) -> dict[str, nn.Module]:
    """Input embedding and output head by name."""
    ends = embedding_ends(model)
    return {name: module for name, module in model.named_modules() if any(module is end for end in ends)}


def _embedding_tensors(model: nn.Module, attachment: Attachment) -> list[str]:
    """Embedding weights that PEFT saves whole: of targets, or all of them when the vocabulary has changed."""
    ends = _ends(model)
    if peft_format.saves_embeddings(attachment.config, [name for name, _ in model.named_modules()]):
        ends = {name: end for name, end in ends.items() if isinstance(end, AdapterLayer)}
    elif not (attachment.holds_embeddings or _vocabulary_changed(model, attachment.config)):
        return []
    return [f"{name}.weight" for name in ends if f"{name}.weight" not in attachment.exchanged]


def _vocabulary_changed(model: nn.Module, config: LoraConfig) -> bool:
    """Whether the vocabulary differs from that of the base on disk (or in the Hub's cache). Unknown counts as no."""
    base = config.base_model_name_or_path
    if not base or not isinstance(model, PreTrainedModel):
        return False
    if not (Path(base) / "config.json").exists() and Path(base).exists():
        return False
    try:
        fields, _ = PreTrainedConfig.get_config_dict(base, local_files_only=True)
    except (OSError, ValueError):
        return False  # as PEFT: a base that can't be looked up is taken to be unchanged
    size = fields.get("vocab_size", fields.get("text_config", {}).get("vocab_size"))
    return size is not None and size != model.config.get_text_config().vocab_size


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
    attachment = attachment_of(model)
    if attachment is not None and _same_layout(attachment, config) and not attachment.holds_embeddings:
        extra = _check_names(model, tensors, str(folder))
        if not extra:
            _fill(model, tensors)
            attachment.config = config.with_(target_modules=attachment.config.target_modules)
            return _set_trainable(model, trainable)
    previous = _take_out(model)
    rows_before = _vocabulary_rows(model)
    try:
        _resize_vocabulary(model, tensors, str(folder))
        inject(model, config, generator=None, start=False)
        for name in _check_names(model, tensors, str(folder)):
            _take_embedding(model, name, tensors)
        _fill(model, tensors)
    except BaseException:
        _take_out(model)
        if isinstance(model, PreTrainedModel) and rows_before not in (None, _vocabulary_rows(model)):
            model.resize_token_embeddings(rows_before, mean_resizing=False)
        _put_back(model, previous)
        raise
    return _set_trainable(model, trainable)


def _set_trainable(model: Model, trainable: bool) -> Model:
    for parameter in adapter_parameters(model).values():
        parameter.requires_grad_(trainable)
    return model


def _same_layout(attachment: Attachment, config: LoraConfig) -> bool:
    """Whether the attached layers are those of `config`: then its tensors can be copied in.

    A start that is subtracted (PiSSA) belongs to the layers, so both must have none.
    """
    fields = (
        "r", "exclude_modules", "bias", "use_dora", "rank_pattern", "layers_to_transform", "layers_pattern",
        "modules_to_save", "trainable_token_indices", "lora_alpha", "alpha_pattern", "use_rslora", "lora_dropout",
    )  # fmt: skip
    mine = attachment.config
    if any(getattr(mine, name) != getattr(config, name) for name in fields):
        return False
    if "pissa" in f"{mine.init_lora_weights} {config.init_lora_weights}" or "olora" in str(mine.init_lora_weights):
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
        shapes[_file_name(model, name)] = tuple(attachment.current(model, name).shape)
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
    known = _embedding_names(model)
    strange = [name for name in extra if name not in known]
    if strange:
        raise RequestError(f"'{where}' holds {_some(strange)}, which its configuration has no place for in this model")
    return extra


def _some(names: Iterable[str], most: int = 3) -> str:
    listed = list(names)
    rest = f" and {len(listed) - most} more" if len(listed) > most else ""
    return ", ".join(listed[:most]) + rest


def _embedding_names(model: nn.Module) -> dict[str, str]:
    """Names that whole embeddings can have in the file, and the model's own name for them ("" for tied rows)."""
    names: dict[str, str] = {}
    for end_name, end in _ends(model).items():
        base = end.base if isinstance(end, AdapterLayer) else end
        for leaf in base._parameters:
            names[_file_name(model, f"{end_name}.{leaf}")] = f"{end_name}.{leaf}"
        if isinstance(end, TiedTokenRows):
            names[f"{end_name}.{ROWS}"] = ""
    return names


def _take_embedding(model: nn.Module, name: str, tensors: dict[str, Tensor]) -> None:
    """A whole embedding from the file: nothing to do where the base has it, else a frozen copy in its place."""
    attachment = need_attachment(model)
    own_name = _embedding_names(model)[name]
    if not own_name:
        return
    attachment.holds_embeddings = True
    current = attachment.current(model, own_name)
    if current.shape != tensors[name].shape:
        raise RequestError(f"'{name}' is {list(tensors[name].shape)}, the model's is {list(current.shape)}")
    if not torch.equal(current.detach().cpu(), tensors[name].to(current.dtype)):
        attachment.exchange(model, own_name, trainable=False)


def _vocabulary_rows(model: nn.Module) -> int | None:
    ends = embedding_ends(model)
    return ends[0].num_embeddings if ends and isinstance(ends[0], nn.Embedding) else None


def _resize_vocabulary(model: nn.Module, tensors: dict[str, Tensor], where: str) -> None:
    """Resizes the plain model's embeddings to those in the file, and takes their values over into the resized base."""
    rows = _vocabulary_rows(model)
    if rows is None or not isinstance(model, PreTrainedModel):
        return
    candidates: dict[str, Tensor] = {}
    for name in _ends(model):
        for key in (f"{name}.weight", f"{name}.base_layer.weight", f"{name}.token_adapter.base_layer.weight"):
            if key in tensors:
                candidates[f"{name}.weight"] = tensors[key]
    sizes = {tensor.shape[0] for tensor in candidates.values()}
    if not sizes or sizes == {rows}:
        return
    if len(sizes) > 1:
        raise RequestError(f"'{where}' holds embeddings of different sizes: {sorted(sizes)}")
    size = sizes.pop()
    log.info("the adapter's vocabulary has %d rows, the model's %d: resized", size, rows)
    model.resize_token_embeddings(size, mean_resizing=False)
    with torch.no_grad():
        for name, tensor in candidates.items():
            model.get_parameter(name).copy_(tensor)


def _fill(model: nn.Module, tensors: dict[str, Tensor]) -> None:
    attachment = need_attachment(model)
    for name, layer in adapter_layers(model).items():
        layer.from_peft({key: tensors[f"{name}.{key}"] for key in layer.peft_shapes()})
    with torch.no_grad():
        for name in attachment.exchanged:
            attachment.current(model, name).copy_(tensors[_file_name(model, name)])


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
    wrong = [f"{name} {list(state[name].shape)} and {list(own[name].shape)}" for name in own if own[name].shape != state[name].shape]
    if wrong:
        raise RequestError(f"the saved state and the attached adapter differ in shape: {_some(wrong)}")
    with torch.no_grad():
        for name, tensor in own.items():
            tensor.copy_(state[name])
