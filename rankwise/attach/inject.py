"""Attach: put adapters into a model in place; detach or merge: take them out. The model keeps its class."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator, Mapping
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from rankwise.adapters.base import AdapterLayer
from rankwise.adapters.config import LoraConfig, start_name
from rankwise.adapters.gate import GateLayer
from rankwise.adapters.low_rank import LowRankLayer
from rankwise.adapters.starts import TAKEN_FROM_BASE, Directions
from rankwise.adapters.table import adapter_class
from rankwise.adapters.tokens import TokenRows
from rankwise.attach.attachment import (
    ATTRIBUTE,
    Attachment,
    adapter_layers,
    attachment_of,
    need_active,
    need_attachment,
    plain_parameters,
    refuse_wrapper,
    replace_modules,
    unchanged_on_error,
)
from rankwise.attach.guards import guard_methods, unguard_methods
from rankwise.attach.inferring import forget_inferring
from rankwise.attach.readers import join_readers
from rankwise.attach.swiglu import split_mlps
from rankwise.attach.targets import (
    HEADS,
    find_targets,
    is_all_linear,
    modules_to_save,
    shortest_names,
    weight_share_left_out,
    with_task_heads,
)
from rankwise.attach.token_rows import refuse_quantized, refuse_twice, token_rows
from rankwise.attach.vocabulary import restore_vocabulary
from rankwise.attach.wide import compute_as_before, compute_wide, is_narrow
from rankwise.errors import RequestError
from rankwise.quantized import (
    allow_packing,
    dense_weight,
    forget_quantization,
    is_quantized,
    keep_unpacked,
    num_weights,
    plain_layer,
    unpack,
)

log = logging.getLogger(__name__)
Model = TypeVar("Model", bound=nn.Module)


def attach(
    model: Model,
    config: LoraConfig,
    generator: torch.Generator | None = None,
    directions: Mapping[str, Directions] | None = None,
) -> Model:
    """Puts adapters into `model`, in place, and returns it. Everything but the adapters is frozen.

    `generator` draws the start (torch's global one by default). `directions`: what data say about each layer, for the
    starts `eva` and `lora_ga`.

    Raises: RequestError, with the model as it was, for targets that match nothing or can't be adapted, a model that is
        attached already, or a wrapper around one (`torch.compile`'s).
    """
    _check_kinds(model, config)
    unpack(model)
    with unchanged_on_error(model):
        return inject(model, config, generator, start=True, directions=directions or {})


def _check_kinds(model: object, config: object) -> None:
    if not isinstance(model, nn.Module):
        raise RequestError(f"attach takes a model, not {model!r}; load it first, by transformers' from_pretrained")
    if not isinstance(config, LoraConfig):
        kind = f"{type(config).__module__}.{type(config).__qualname__}".removeprefix("builtins.")
        raise RequestError(
            f"attach takes rankwise's own LoraConfig, not {kind}; its fields have PEFT's names: "
            "rankwise.LoraConfig(r=16, lora_alpha=32)"
        )


def inject(
    model: Model,
    config: LoraConfig,
    generator: torch.Generator | None,
    start: bool,
    directions: Mapping[str, Directions] | None = None,
) -> Model:
    """As `attach`, but an error leaves the model half changed; with `start=False` a checkpoint fills the factors."""
    _refuse_attached(model)
    config = with_task_heads(config)
    targets = find_targets(model, config, strict=start)
    whole = modules_to_save(model, config, strict=start)
    refuse_quantized(model, whole, "modules_to_save")
    flags = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    layers: dict[str, AdapterLayer] = {}
    for target in targets:
        own = config.with_(r=target.r, lora_alpha=target.lora_alpha)
        layer = adapter_class(config)(target.module, target.kind, own, target.name)
        if start or start_name(config.init_lora_weights) in TAKEN_FROM_BASE:
            layer.start_(own, generator, (directions or {}).get(target.name))
        layers[target.name] = layer
    layers.update(token_rows(model, config, layers))
    refuse_twice(whole, layers)
    exchanged = _biases(model, config, [target.name for target in targets], strict=start)
    inside = [f"{name}.{part}" for name in whole for part in model.get_submodule(name).state_dict()]
    exchanged += inside
    attachment = Attachment(_settled(model, config, [t.name for t in targets]), flags)
    attachment.unpacked = keep_unpacked(model)
    attachment.share_left_out, attachment.largest_left_out = weight_share_left_out(model, targets)
    model.requires_grad_(False)
    for layer in layers.values():
        layer.training = layer.base.training  # a part of the model may be in another mode than the whole
        for parameter in layer.peft_parameters().values():
            parameter.requires_grad_(True)
    join_readers(model, layers)
    replace_modules(model, {layer.base: layer for layer in layers.values()})
    model.add_module(ATTRIBUTE, attachment)
    heads = HEADS.get(config.task_type or "", ())
    for name in dict.fromkeys(exchanged):
        attachment.exchange(model, name, trainable=True, widen=bool(heads) and name in inside)
    if heads and any(is_narrow(attachment.waiting(name)) for name in inside):
        compute_wide(model, whole, heads)
    guard_methods(model)
    if attachment.share_left_out > 0.01:
        # with all-linear nobody expects it: experts, for one, are no linear layers
        log.log(
            logging.WARNING if is_all_linear(config) else logging.INFO,
            "adapters leave out %.0f %% of the layers' weights (%s)",
            100 * attachment.share_left_out, ", ".join(attachment.largest_left_out),
        )  # fmt: skip
    return model


def _refuse_attached(model: nn.Module) -> None:
    refuse_wrapper(model)
    if attachment_of(model) is not None:
        raise RequestError(
            f"an adapter is attached to this {type(model).__name__} already; detach or merge it first, or load another "
            "in its place"
        )
    inside = [name for name, module in model.named_modules() if isinstance(module, (AdapterLayer, Attachment))]
    if inside:
        raise RequestError(
            f"an adapter is attached to a part of this {type(model).__name__} already ('{inside[0]}'); "
            "detach it there first"
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


def _biases(model: nn.Module, config: LoraConfig, adapted: list[str], strict: bool) -> list[str]:
    """Names of the biases that are trained."""
    names = [name for name, _ in model.named_parameters() if name == "bias" or name.endswith(".bias")]
    if config.bias == "lora_only":
        names = [name for name in names if name.rpartition(".")[0] in adapted]
    if config.bias != "none" and strict and not names:
        which = "adapted layer" if config.bias == "lora_only" else "layer"
        raise RequestError(f"bias='{config.bias}' has no effect: no {which} has a bias; set bias='none'")
    return names if config.bias != "none" else []


def is_attached(model: nn.Module) -> bool:
    """Whether an adapter is attached to `model`."""
    return attachment_of(model) is not None


def adapter_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Everything that the adapter is, by full name: parameters, frozen starts, exchanged tensors. Not copies.

    Raises: RequestError when nothing is attached.
    """
    attachment = need_attachment(model)
    found: dict[str, Tensor] = {}
    for name, layer in adapter_layers(model).items():
        if layer.peft_parameters():  # tied token rows have none of their own
            own = layer.state_dict(keep_vars=True).items()
            found.update({f"{name}.{key}": tensor for key, tensor in own if not key.startswith("base.")})
    if attachment.mixture is not None:
        own = attachment.mixture.state_dict(keep_vars=True).items()
        found.update({f"{ATTRIBUTE}.mixture.{key}": tensor for key, tensor in own})
    return found | {name: attachment.current(model, name) for name in attachment.exchanged}


def adapter_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """Those of `adapter_tensors` that can be trained, in a stable order."""
    exchanged = need_attachment(model).exchanged
    trained = {name: tensor for name, tensor in adapter_tensors(model).items() if exchanged.get(name, True)}
    return {name: tensor for name, tensor in trained.items() if isinstance(tensor, nn.Parameter)}


def output_factors(model: nn.Module) -> set[str]:
    """Names, as in `adapter_parameters`, of the B of every layer that LoRA+ speaks of: an embedding's B is none.

    There A is the table, which takes no hidden state in, and learns as fast as B.
    """
    layers = adapter_layers(model).items()
    found = {f"{n}.lora_B" for n, layer in layers if isinstance(layer, LowRankLayer) and layer.kind.drops_input}
    gates = [(n, layer) for n, layer in layers if isinstance(layer, GateLayer) and layer.kind.drops_input]
    return found | {f"{n}.lora_B.{place}" for n, layer in gates for place in range(len(layer.names))}


def ranks(model: nn.Module) -> dict[str, int]:
    """Rank of every adapted layer, by name. Raises: RequestError when nothing is attached."""
    need_attachment(model)
    return {name: layer.rank for name, layer in adapter_layers(model).items() if layer.rank}


@contextlib.contextmanager
def disabled(model: nn.Module) -> Iterator[None]:
    """The base alone, inside the block. Blocks nest. Raises: RequestError when nothing is attached."""
    attachment = need_attachment(model)
    switched = [part for part in (attachment, *adapter_layers(model).values()) if part.active]

    def switch(active: bool) -> None:
        if attachment in switched:  # not in a block inside a block
            attachment.swap(model)
        for part in switched:
            part.active = active

    switch(False)
    try:
        yield
    finally:
        switch(True)


def detach(model: Model) -> Model:
    """Takes the adapter out: the plain model again, as it was, with the vocabulary that it had.

    Raises: RequestError when nothing is attached, or inside `disabled`.
    """
    attachment = need_active(model, "detach")
    attachment.swap(model)
    replace_modules(model, {layer: layer.base for layer in adapter_layers(model).values()})
    _plain(model, attachment)
    allow_packing(attachment.unpacked)
    restore_vocabulary(model, attachment)
    return model


@torch.no_grad()
def merge_in(model: Model, dtype: torch.dtype | None = None, keep_tied: bool = False) -> Model:
    """Folds the adapter into the weights, in place: the plain model again, changed. Computed in fp32, rounded once.

    An adapted weight that another module shares (tied embeddings) is untied, and the configuration says so; with
    `keep_tied` that is refused instead. `dtype`: of the whole merged model (the base's own by default). A base in 8 or
    4 bits becomes an ordinary model of dequantised layers, the adapted ones and the others.

    Raises: RequestError when nothing is attached, when `keep_tied` can't be kept, inside `disabled`, or for a dtype
        that is none of floating-point numbers.
    """
    attachment = need_active(model, "merge")
    if dtype is not None and not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
        raise RequestError(f"a model can't be merged into dtype {dtype!r}; give one such as torch.bfloat16")
    layers = adapter_layers(model)
    shared = _parted(model, attachment)
    if shared and keep_tied:
        raise RequestError(
            f"'{shared[0]}' is tied to another module, and merging changes only one of them: merge without keep_tied"
        )
    merged: dict[nn.Module | nn.Parameter, nn.Parameter] = {}
    plain: dict[Any, nn.Module] = {}
    for layer in layers.values():
        if is_quantized(layer.base):
            plain[layer] = plain_layer(layer.base, layer.merged_weight(dtype or _float_dtype(model)))
            continue
        change = _change_of(layer)
        if change not in merged:
            merged[change] = nn.Parameter(layer.merged_weight(dtype), requires_grad=False)
        layer.base.weight = merged[change]
        if (bias := layer.merged_bias()) is not None:
            layer.base.bias = nn.Parameter(bias.detach().to(dtype or layer.weight.dtype), requires_grad=False)
        plain[layer] = layer.base
    wrapped = {layer.base for layer in layers.values()}
    for module in model.modules():
        if is_quantized(module) and module not in wrapped:
            plain[module] = plain_layer(module, dense_weight(module, dtype or _float_dtype(model)))
    replace_modules(model, plain)
    for name in attachment.exchanged:  # an fp32 head on a narrower base becomes one of its parts
        tensor = attachment.current(model, name)
        tensor.data = tensor.data.to(attachment.waiting(name).dtype)
    forget_quantization(model)
    _plain(model, attachment)
    if dtype is not None:
        model.to(dtype)
    if shared and isinstance(model, PreTrainedModel):
        model.config.tie_word_embeddings = False
        model.config.get_text_config().tie_word_embeddings = False
    return model


def _float_dtype(model: nn.Module) -> torch.dtype:
    """The dtype of a quantised model's weights that are plain numbers; fp32 where there are none."""
    found = [p.dtype for _, module, p in plain_parameters(model) if p.dtype.is_floating_point and p.dim() > 1]
    return found[0] if found else torch.float32


def _change_of(layer: AdapterLayer) -> nn.Module | nn.Parameter:
    """What is the same for layers that are changed alike: the rows that tied embeddings share."""
    return layer.rows if isinstance(layer, TokenRows) else layer


def _parted(model: nn.Module, attachment: Attachment) -> list[str]:
    """Names of weights that the plain model shares with others and that the adapter changes apart from them."""
    changes: dict[int, dict[str, object]] = {}
    for name, module, parameter in plain_parameters(model):
        original, change = parameter, None
        if name in attachment.exchanged:
            original, change = attachment.waiting(name), parameter
        if isinstance(module, AdapterLayer) and name.endswith("weight"):
            change = _change_of(module)
        changes.setdefault(id(original), {})[name] = change
    return [
        name
        for of_one in changes.values()
        if any(change is not next(iter(of_one.values())) for change in of_one.values())
        for name, change in of_one.items()
        if change is not None
    ]


def _plain(model: nn.Module, attachment: Attachment) -> None:
    """Removes what `attach` added to the model itself."""
    del model._modules[ATTRIBUTE]
    unguard_methods(model)
    split_mlps(model)
    compute_as_before(model)
    forget_inferring(model)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(attachment.requires_grad_before.get(name, parameter.requires_grad))


def describe(model: nn.Module) -> dict[str, Any]:
    """Counts for people and reports: `layers`, `parameters`, `share_of_model`, `share_left_out`, `largest_left_out`."""
    attachment = need_attachment(model)
    trainable = sum(parameter.numel() for parameter in adapter_parameters(model).values())
    whole = sum(num_weights(parameter) for parameter in model.parameters())
    return {
        "layers": len(ranks(model)),
        "parameters": trainable,
        "share_of_model": trainable / whole,
        "share_left_out": attachment.share_left_out,
        "largest_left_out": attachment.largest_left_out,
    }
