"""Whole embeddings in an adapter's folder: those of targets, and those of a changed vocabulary, as PEFT saves them."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel

from rankwise.adapters.base import AdapterLayer
from rankwise.adapters.config import LoraConfig
from rankwise.adapters.tokens import ROWS, TiedTokenRows
from rankwise.attach import peft_format
from rankwise.attach.attachment import Attachment, file_name, need_attachment
from rankwise.attach.targets import embedding_ends
from rankwise.errors import RequestError

log = logging.getLogger(__name__)


def _ends(model: nn.Module) -> dict[str, nn.Module]:
    """Input embedding and output head by name."""
    ends = embedding_ends(model)
    return {name: module for name, module in model.named_modules() if any(module is end for end in ends)}


def embedding_tensors(model: nn.Module, attachment: Attachment) -> list[str]:
    """Embedding weights that are saved whole: all of them when the vocabulary has changed, else those of targets.

    PEFT leaves one out when only the other is a target, and loses its new rows; it reads ours.
    """
    ends = _ends(model)
    if not (attachment.holds_embeddings or _vocabulary_changed(model, attachment.config)):
        if not peft_format.saves_embeddings(attachment.config, [name for name, _ in model.named_modules()]):
            return []
        ends = {name: end for name, end in ends.items() if isinstance(end, AdapterLayer)}
    return [f"{name}.weight" for name in ends]


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


def embedding_names(model: nn.Module) -> dict[str, str]:
    """Names that whole embeddings can have in the file, and the model's own name for them ("" for tied rows)."""
    names: dict[str, str] = {}
    for end_name, end in _ends(model).items():
        base = end.base if isinstance(end, AdapterLayer) else end
        for leaf in base._parameters:
            names[file_name(model, f"{end_name}.{leaf}")] = f"{end_name}.{leaf}"
        if isinstance(end, TiedTokenRows):
            names[f"{end_name}.{ROWS}"] = ""
    return names


def take_embedding(model: nn.Module, name: str, tensors: dict[str, Tensor]) -> None:
    """A whole embedding from the file: nothing to do where the base has it, else a frozen copy in its place."""
    attachment = need_attachment(model)
    own_name = embedding_names(model)[name]
    if not own_name:
        return
    attachment.holds_embeddings = attachment.holds_embeddings or not _of_target(model, attachment, own_name)
    current = attachment.current(model, own_name)
    if current.shape != tensors[name].shape:
        raise RequestError(f"'{name}' is {list(tensors[name].shape)}, the model's is {list(current.shape)}")
    if own_name not in attachment.exchanged and not torch.equal(current.cpu(), tensors[name].to(current.dtype)):
        for each in _names_of(model, current):
            attachment.exchange(model, each, trainable=False)
        with torch.no_grad():
            attachment.current(model, own_name).copy_(tensors[name])


def _names_of(model: nn.Module, weight: Tensor) -> list[str]:
    """The plain model's names of a weight that modules share."""
    wrapped = {module.base for module in model.modules() if isinstance(module, AdapterLayer)}
    return [
        f"{name}.weight"
        for name, module in model.named_modules()
        if module not in wrapped and not isinstance(module, Attachment)
        for own in [module.base if isinstance(module, AdapterLayer) else module]
        if own._parameters.get("weight") is weight
    ]


def _of_target(model: nn.Module, attachment: Attachment, own_name: str) -> bool:
    """Whether `own_name` is saved because it is a target, with a vocabulary that has not changed."""
    wrapped = isinstance(model.get_submodule(own_name.rpartition(".")[0]), AdapterLayer)
    names = [name for name, _ in model.named_modules()]
    return wrapped and peft_format.saves_embeddings(attachment.config, names)


def remember_vocabulary(model: nn.Module) -> Callable[[], None]:
    """A function that puts the embeddings back as they are now.

    transformers resizes inside the modules and parameters that are there, and may exchange modules (T5's).
    """
    if not isinstance(model, PreTrainedModel):
        return lambda: None
    children = [(module, dict(module._modules)) for module in model.modules()]
    holders = [module for module in model.modules() if isinstance(module, nn.Embedding)] + embedding_ends(model)
    holders.append(model)
    attributes = [(module, dict(module.__dict__)) for module in holders]
    parameters = [(module, dict(module._parameters)) for module in holders]
    values = [(p, p.data) for module in holders for p in module._parameters.values() if p is not None]
    config = model.config.get_text_config()
    size = getattr(config, "vocab_size", None)

    def put_back() -> None:
        for module, was in attributes:
            module.__dict__.clear()
            module.__dict__.update(was)
        for module, was in parameters:
            module._parameters.clear()
            module._parameters.update(was)
        for module, was in children:
            module._modules.clear()
            module._modules.update(was)
        for parameter, value in values:
            parameter.data = value
        if size is not None:
            config.vocab_size = size

    return put_back


def resize_vocabulary(model: nn.Module, tensors: dict[str, Tensor], where: str) -> None:
    """Resizes the plain model's embeddings to those in the file, which give the new rows; the base's own rows stay.

    Raises: RequestError when the file's embeddings differ in size, or when it lacks the new rows of one.
    """
    ends = embedding_ends(model)
    if not isinstance(model, PreTrainedModel) or not ends or not isinstance(ends[0], nn.Embedding):
        return
    rows = ends[0].num_embeddings
    found: dict[str, Tensor] = {}
    weights = {f"{name}.weight": end.weight for name, end in _ends(model).items()}
    for name in _ends(model):
        for inside in ("", "base_layer.", "token_adapter.base_layer."):
            if f"{name}.{inside}weight" in tensors:
                found[f"{name}.weight"] = tensors[f"{name}.{inside}weight"]
    sizes = {tensor.shape[0] for tensor in found.values()}
    if len(sizes) > 1:
        raise RequestError(f"'{where}' holds embeddings of different sizes: {sorted(sizes)}")
    if not sizes or sizes == {rows}:
        return
    size = sizes.pop()
    missing = [name for name, p in weights.items() if not any(weights[other] is p for other in found)]
    if missing:
        raise RequestError(
            f"'{where}' has {size} rows of {', '.join(found)} and none of {', '.join(missing)}, where the model has "
            f"{rows}: resize it as it was when the adapter was trained, then load"
        )
    log.info("the adapter's vocabulary has %d rows, the model's %d: resized", size, rows)
    model.resize_token_embeddings(size, mean_resizing=False)
    with torch.no_grad():
        for name, tensor in found.items():
            model.get_parameter(name)[rows:] = tensor[rows:]
