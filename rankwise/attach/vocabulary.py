"""Whole embeddings in an adapter's folder: those of targets, and those of a changed vocabulary, as PEFT saves them."""

from __future__ import annotations

import logging
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel

from rankwise.adapters.config import LoraConfig
from rankwise.adapters.tokens import ROWS, TokenRows
from rankwise.attach import peft_format
from rankwise.attach.attachment import Attachment, base_of, file_name, need_attachment, plain_parameters
from rankwise.attach.targets import embedding_ends
from rankwise.errors import RequestError

log = logging.getLogger(__name__)


def _ends(model: nn.Module) -> dict[str, nn.Module]:
    """Input embedding and output head by name."""
    ends = embedding_ends(model)
    return {name: module for name, module in model.named_modules() if any(module is end for end in ends)}


def embedding_names(model: nn.Module) -> dict[str, str]:
    """Names that whole embeddings can have in the file, and the plain model's for them ("" for tied rows)."""
    names: dict[str, str] = {}
    for end_name, end in _ends(model).items():
        own = [f"{end_name}.{leaf}" for leaf, parameter in base_of(end)._parameters.items() if parameter is not None]
        names.update({file_name(model, name): name for name in own})
        if isinstance(end, TokenRows) and end.is_tied:
            names[f"{end_name}.{ROWS}"] = ""
    return names


def embedding_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Embeddings that are saved whole: all of them when the vocabulary has changed, else those of targets.

    PEFT leaves one out when only the other is a target, and loses its new rows; it reads ours.
    """
    attachment = need_attachment(model)
    names = embedding_names(model)
    if not (attachment.holds_embeddings or _vocabulary_changed(model, attachment.config)):
        wrapped = {name: own for name, own in names.items() if name != own}
        names = wrapped if _targets_saved(model, attachment.config) else {}
    found = {name: attachment.current(model, own) for name, own in names.items() if own}
    for name in names.keys() - found.keys():
        rows = model.get_submodule(name.removesuffix(f".{ROWS}"))
        assert isinstance(rows, TokenRows)
        found[name] = rows.rows
    return found


def _targets_saved(model: nn.Module, config: LoraConfig) -> bool:
    return peft_format.saves_embeddings(config, [name for name, _ in model.named_modules()])


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


def take_embedding(model: nn.Module, name: str, tensor: Tensor) -> None:
    """A whole embedding from the file: nothing to do where the base has it, else a frozen copy in its place."""
    attachment = need_attachment(model)
    own_name = embedding_names(model)[name]
    if not own_name:
        return
    if own_name == name or not _targets_saved(model, attachment.config):
        attachment.holds_embeddings = True
    current = attachment.current(model, own_name)
    if current.shape != tensor.shape:
        raise RequestError(f"'{name}' is {list(tensor.shape)}, the model's is {list(current.shape)}")
    if own_name not in attachment.exchanged and not torch.equal(current.cpu(), tensor.to(current.dtype)):
        for each in [each for each, _, parameter in plain_parameters(model) if parameter is current]:
            attachment.exchange(model, each, trainable=False)
        with torch.no_grad():
            attachment.current(model, own_name).copy_(tensor)


def resize_vocabulary(model: nn.Module, tensors: dict[str, Tensor], where: str) -> tuple[int, dict[str, Tensor]] | None:
    """Resizes the plain model's embeddings to those in the file, which give the new rows; the base's own rows stay.

    Returns the number of rows before and, by parameter, those that were cut off; None when nothing changed.

    Raises: RequestError when the file's embeddings differ in size, or when it lacks the new rows of one.
    """
    ends = _ends(model)
    embedding = next(iter(embedding_ends(model)), None)
    if not isinstance(model, PreTrainedModel) or not isinstance(embedding, nn.Embedding):
        return None
    rows = embedding.num_embeddings
    found: dict[str, Tensor] = {}
    for name in ends:
        for inside in ("", "base_layer.", "token_adapter.base_layer."):
            if f"{name}.{inside}weight" in tensors:
                found[f"{name}.weight"] = tensors[f"{name}.{inside}weight"]
    sizes = {tensor.shape[0] for tensor in found.values()}
    if len(sizes) > 1:
        raise RequestError(f"'{where}' holds embeddings of different sizes: {sorted(sizes)}")
    if not sizes or sizes == {rows}:
        return None
    size = sizes.pop()
    given = [model.get_parameter(name) for name in found]
    missing = [f"{name}.weight" for name, end in ends.items() if not any(end.weight is weight for weight in given)]
    if missing:
        raise RequestError(
            f"'{where}' has {size} rows of {', '.join(found)} and none of {', '.join(missing)}, where the model has "
            f"{rows}: resize it as it was when the adapter was trained, then load"
        )
    log.info("the adapter's vocabulary has %d rows, the model's %d: resized", size, rows)
    cut = {own: model.get_parameter(own).detach()[size:].clone() for own in embedding_names(model).values()}
    model.resize_token_embeddings(size, mean_resizing=False)
    with torch.no_grad():
        for name, tensor in found.items():
            model.get_parameter(name)[rows:] = tensor[rows:]
    return rows, cut


def restore_vocabulary(model: nn.Module, attachment: Attachment) -> None:
    """Undoes `resize_vocabulary` on a model that `attachment` was taken out of."""
    if attachment.vocabulary_before is None:
        return
    assert isinstance(model, PreTrainedModel)
    model.resize_token_embeddings(attachment.vocabulary_before, mean_resizing=False)
    with torch.no_grad():
        for name in embedding_names(model).values():
            cut = attachment.kept(f"cut:{name}")
            parameter = model.get_parameter(name)
            parameter[len(parameter) - len(cut) :] = cut
