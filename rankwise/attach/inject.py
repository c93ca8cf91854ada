"""Attach: put adapters into a model in place; detach or merge: take them out. The model keeps its class."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator, Mapping
from typing import Any, TypeVar

import torch
from torch import nn
from transformers import PreTrainedModel

from rankwise.adapters.base import AdapterLayer
from rankwise.adapters.config import LoraConfig, start_name
from rankwise.adapters.lora import LayerSettings
from rankwise.adapters.starts import TAKEN_FROM_BASE
from rankwise.adapters.table import ADAPTERS, adapter_name
from rankwise.adapters.tokens import TiedTokenRows, TokenRows
from rankwise.attach.attachment import (
    ATTRIBUTE,
    AdapterPusher,
    AdapterSaver,
    Attachment,
    TieGuard,
    VocabularyGuard,
    attachment_of,
    need_active,
    need_attachment,
)
from rankwise.attach.targets import (
    embedding_ends,
    find_targets,
    is_all_linear,
    modules_to_save,
    shortest_names,
    weight_share_left_out,
    with_task_heads,
)
from rankwise.errors import RequestError, did_you_mean

log = logging.getLogger(__name__)
Model = TypeVar("Model", bound=nn.Module)


def attach(model: Model, config: LoraConfig, generator: torch.Generator | None = None) -> Model:
    """Puts adapters into `model`, in place, and returns it. Everything but the adapters is frozen.

    `generator` draws the start (torch's global one by default).

    Raises: RequestError, with the model as it was, for targets that match nothing or can't be adapted, or a model that
        is attached already.
    """
    return inject(model, config, generator, start=True)


def inject(model: Model, config: LoraConfig, generator: torch.Generator | None, start: bool) -> Model:
    """As `attach`; with `start=False` the factors are left unfilled, for a checkpoint to fill."""
    _refuse_attached(model)
    config = with_task_heads(config)
    targets = find_targets(model, config, strict=start)
    whole = modules_to_save(model, config, strict=start)
    flags = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    try:
        layers: dict[str, AdapterLayer] = {}
        for target in targets:
            settings = LayerSettings.of(config, target.r, target.lora_alpha)
            layer = ADAPTERS[adapter_name(config)](target.module, target.kind, settings, target.name)
            if start or start_name(config.init_lora_weights) in TAKEN_FROM_BASE:
                layer.start_(settings, generator)
            layers[target.name] = layer
        layers.update(_token_rows(model, config, layers))
        _check_once(whole, layers)
        exchanged = _biases(model, config, [target.name for target in targets], strict=start)
        exchanged += [name for module_name in whole for name in _tensor_names(model, module_name)]
    except BaseException:
        _restore_flags(model, flags)
        raise
    attachment = Attachment(_settled(model, config, [t.name for t in targets]), flags)
    attachment.share_left_out, attachment.largest_left_out = weight_share_left_out(model, targets)
    model.requires_grad_(False)
    for layer in layers.values():
        layer.train(model.training)
        for parameter in _own_parameters(layer).values():
            parameter.requires_grad_(True)
    replace_modules(model, {layer.base: layer for layer in layers.values()})
    model.add_module(ATTRIBUTE, attachment)
    for name in dict.fromkeys(exchanged):
        attachment.exchange(model, name, trainable=True)
    if isinstance(model, PreTrainedModel):
        guard_methods(model)
    if attachment.share_left_out > 0.01:
        log.info(
            "adapters leave out %.0f %% of the layers' weights (%s)",
            100 * attachment.share_left_out, ", ".join(attachment.largest_left_out),
        )  # fmt: skip
    return model


def replace_modules(
    model: nn.Module, replacements: Mapping[nn.Module, AdapterLayer] | Mapping[AdapterLayer, nn.Module]
) -> None:
    """Puts the replacement wherever a module of `replacements` stands in the tree: a shared module has several."""
    for parent in list(model.modules()):
        if parent in replacements:
            continue  # a wrapper's own `base`
        for name, child in parent._modules.items():
            if child in replacements:
                parent._modules[name] = replacements[child]  # type: ignore[index]


def _refuse_attached(model: nn.Module) -> None:
    if attachment_of(model) is not None:
        raise RequestError(
            f"an adapter is attached to this {type(model).__name__} already; detach or merge it first, or load another "
            "in its place"
        )
    if any(type(module).__module__.startswith("peft.") for module in model.modules()):
        raise RequestError("this model holds PEFT layers; unload or merge them first (model.unload())")


def _settled(model: nn.Module, config: LoraConfig, names: list[str]) -> LoraConfig:
    """`config` as it will be saved: `all-linear` spelled out, the base's name filled in."""
    base = config.base_model_name_or_path
    if base is None and isinstance(model, PreTrainedModel):
        base = model.name_or_path or None
    targets = shortest_names(names, model) if is_all_linear(config) else config.target_modules
    return config.with_(target_modules=targets, base_model_name_or_path=base)


def _token_rows(model: nn.Module, config: LoraConfig, layers: dict[str, AdapterLayer]) -> dict[str, AdapterLayer]:
    """Layers for `trainable_token_indices`: a list means the input embedding; a tied head follows it."""
    if config.trainable_token_indices is None:
        return {}
    names = {module: name for name, module in model.named_modules()}
    modules = {name: module for module, name in names.items()}
    wanted = config.trainable_token_indices
    ends = embedding_ends(model)
    if isinstance(wanted, list):
        if not ends:
            raise RequestError(
                "trainable_token_indices as a list needs a model with an input embedding, which "
                f"{type(model).__name__} does not say it has; name the embedding instead"
            )
        wanted = {names[ends[0]]: wanted}
    found: dict[str, AdapterLayer] = {}
    for suffix, indices in wanted.items():
        matches = [name for name in modules if name == suffix or name.endswith(f".{suffix}")]
        if not matches:
            embeddings = [name for name, module in modules.items() if isinstance(module, nn.Embedding)]
            raise RequestError(
                f"trainable_token_indices names '{suffix}', which matches no module{did_you_mean(suffix, embeddings)}"
            )
        for name in matches:
            if name in layers:
                raise RequestError(f"'{name}' is in target_modules and in trainable_token_indices; choose one")
            rows = TokenRows(modules[name], indices, name)
            found[name] = rows
            if modules[name] is not next(iter(ends), None):
                continue  # as in PEFT, only the input embedding takes along what is tied to it
            for tied_name, tied in modules.items():
                if tied is modules[name] or tied._parameters.get("weight") is not rows.weight:
                    continue
                if tied_name in layers:
                    raise RequestError(
                        f"'{tied_name}' is tied to '{name}' with trainable rows and can't be a target too"
                    )
                found[tied_name] = TiedTokenRows(tied, rows, tied_name)
    return found


def _check_once(whole: list[str], layers: Mapping[str, AdapterLayer]) -> None:
    for module_name in whole:
        for name, layer in layers.items():
            if f"{name}.".startswith(f"{module_name}."):
                option = "trainable_token_indices" if isinstance(layer, TokenRows) else "target_modules"
                if isinstance(layer, TiedTokenRows):
                    option = "trainable_token_indices (tied to the embedding)"
                raise RequestError(f"'{name}' is in modules_to_save and in {option}; choose one")


def _biases(model: nn.Module, config: LoraConfig, adapted: list[str], strict: bool) -> list[str]:
    """Names of the biases that are trained."""
    names = [name for name, _ in model.named_parameters() if name == "bias" or name.endswith(".bias")]
    if config.bias == "lora_only":
        names = [name for name in names if name.rpartition(".")[0] in adapted]
    if config.bias != "none" and strict and not names:
        which = "adapted layer" if config.bias == "lora_only" else "layer"
        raise RequestError(f"bias='{config.bias}' has no effect: no {which} has a bias; set bias='none'")
    return names if config.bias != "none" else []


def _tensor_names(model: nn.Module, module_name: str) -> list[str]:
    """Parameters and persistent buffers inside a module, by their full names."""
    module = model.get_submodule(module_name)
    return [f"{module_name}.{name}" for name in module.state_dict()]


def guard_methods(model: PreTrainedModel) -> None:
    """Makes saving write the adapter, and vocabulary changes an error."""
    from rankwise.attach.checkpoint import save_adapter

    # Objects rather than closures, so that the attached model can be pickled and deep-copied.
    object.__setattr__(model, "save_pretrained", AdapterSaver(model, save_adapter))
    object.__setattr__(model, "push_to_hub", AdapterPusher(model, save_adapter))
    object.__setattr__(model, "resize_token_embeddings", VocabularyGuard(model))
    object.__setattr__(model, "tie_weights", TieGuard())


def _restore_flags(model: nn.Module, flags: dict[str, bool]) -> None:
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(flags.get(name, parameter.requires_grad))


def is_attached(model: nn.Module) -> bool:
    """Whether an adapter is attached to `model`."""
    return attachment_of(model) is not None


def adapter_layers(model: nn.Module) -> dict[str, AdapterLayer]:
    """The adapter layers by the name of the layer that they wrap, in the model's order."""
    return {name: module for name, module in model.named_modules() if isinstance(module, AdapterLayer)}


def _own_parameters(layer: AdapterLayer) -> dict[str, nn.Parameter]:
    return {name: p for name, p in layer.named_parameters() if name != "base" and not name.startswith("base.")}


def adapter_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """Everything that belongs to the adapter and can be trained, by full name, in a stable order.

    Raises: RequestError when nothing is attached.
    """
    attachment = need_attachment(model)
    found: dict[str, nn.Parameter] = {}
    for layer_name, layer in adapter_layers(model).items():
        if not isinstance(layer, TiedTokenRows):  # shares the embedding's
            found.update({f"{layer_name}.{name}": p for name, p in _own_parameters(layer).items()})
    for name, trainable in attachment.exchanged.items():
        tensor = attachment.current(model, name)
        if trainable and isinstance(tensor, nn.Parameter):
            found[name] = tensor
    return found


def ranks(model: nn.Module) -> dict[str, int]:
    """Rank of every adapted layer, by name. Raises: RequestError when nothing is attached."""
    need_attachment(model)
    return {name: layer.rank for name, layer in adapter_layers(model).items() if layer.rank}


@contextlib.contextmanager
def disabled(model: nn.Module) -> Iterator[None]:
    """The base alone, inside the block. Blocks nest. Raises: RequestError when nothing is attached."""
    attachment = need_attachment(model)
    layers = list(adapter_layers(model).values())
    before = [layer.active for layer in layers]
    was_active = attachment.active
    try:
        if was_active:
            attachment.swap(model)
            attachment.active = False
        for layer in layers:
            layer.active = False
        yield
    finally:
        for layer, active in zip(layers, before, strict=True):
            layer.active = active
        if was_active:
            attachment.swap(model)
            attachment.active = True


def detach(model: Model) -> Model:
    """Takes the adapter out: the plain model again, as it was.

    Raises: RequestError when nothing is attached, or inside `disabled`.
    """
    attachment = need_active(model, "detach")
    attachment.swap(model)
    replace_modules(model, {layer: layer.base for layer in adapter_layers(model).values()})
    _plain(model, attachment)
    return model


@torch.no_grad()
def merge_in(model: Model, dtype: torch.dtype | None = None, keep_tied: bool = False) -> Model:
    """Folds the adapter into the weights, in place: the plain model again, changed. Computed in fp32, rounded once.

    An adapted weight that another module shares (tied embeddings) is untied, and the configuration says so; with
    `keep_tied` that is refused instead. `dtype`: of the whole merged model (the base's own by default).

    Raises: RequestError when nothing is attached, when `keep_tied` can't be kept, or inside `disabled`.
    """
    attachment = need_active(model, "merge")
    layers = adapter_layers(model)
    shared = _parted(model, attachment)
    if shared and keep_tied:
        raise RequestError(
            f"'{shared[0]}' is tied to another module, and merging changes only one of them: merge without keep_tied"
        )
    merged_rows: dict[int, nn.Parameter] = {}
    for layer in layers.values():
        if isinstance(layer, (TokenRows, TiedTokenRows)) and id(layer.rows) in merged_rows:
            layer.base.weight = merged_rows[id(layer.rows)]
        else:
            layer.base.weight = nn.Parameter(layer.merged_weight(dtype), requires_grad=False)
            if isinstance(layer, (TokenRows, TiedTokenRows)):
                merged_rows[id(layer.rows)] = layer.base.weight
    replace_modules(model, {layer: layer.base for layer in layers.values()})
    _plain(model, attachment)
    if dtype is not None:
        model.to(dtype)
    if shared and isinstance(model, PreTrainedModel):
        _untie(model)
    return model


def _parted(model: nn.Module, attachment: Attachment) -> list[str]:
    """Names of weights that the plain model shares with others and that the adapter changes apart from them."""
    changes: dict[int, dict[str, object]] = {}
    wrapped = {layer.base for layer in adapter_layers(model).values()}
    for name, module in model.named_modules():
        if isinstance(module, Attachment) or module in wrapped:
            continue
        own = module.base if isinstance(module, AdapterLayer) else module
        for leaf, parameter in own._parameters.items():
            if parameter is None:
                continue
            full_name, change = f"{name}.{leaf}" if name else leaf, None
            original = parameter
            if full_name in attachment.exchanged:
                original, change = attachment.waiting(full_name), parameter
            if isinstance(module, (TokenRows, TiedTokenRows)):
                change = module.rows
            elif isinstance(module, AdapterLayer) and leaf == "weight":
                change = module
            changes.setdefault(id(original), {})[full_name] = change
    return [
        name
        for of_one in changes.values()
        if any(change is not next(iter(of_one.values())) for change in of_one.values())
        for name, change in of_one.items()
        if change is not None
    ]


def _untie(model: PreTrainedModel) -> None:
    model.config.tie_word_embeddings = False
    model.config.get_text_config().tie_word_embeddings = False


def _plain(model: nn.Module, attachment: Attachment) -> None:
    """Removes what `attach` added to the model itself."""
    del model._modules[ATTRIBUTE]
    for method in ("save_pretrained", "push_to_hub", "resize_token_embeddings", "tie_weights"):
        model.__dict__.pop(method, None)
    _restore_flags(model, attachment.requires_grad_before)


def describe(model: nn.Module) -> dict[str, Any]:
    """Counts for people and reports: `layers`, `parameters`, `share_of_model`, `share_left_out`, `largest_left_out`."""
    attachment = need_attachment(model)
    trainable = sum(parameter.numel() for parameter in adapter_parameters(model).values())
    whole = sum(parameter.numel() for parameter in model.parameters())
    return {
        "layers": len(ranks(model)),
        "parameters": trainable,
        "share_of_model": trainable / whole,
        "share_left_out": attachment.share_left_out,
        "largest_left_out": attachment.largest_left_out,
    }
