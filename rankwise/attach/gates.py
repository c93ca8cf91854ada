"""Gates: several adapters in one model, of which a task, learned shares or a classifier decide which take part.

    rw.attach_gate(model, {"movies": "runs/movies/adapter", "books": "runs/books/adapter"})   # hard: by task
    with rw.on_task(model, "movies"): model(...)                  # one task for all rows
    with rw.on_task(model, ["movies", "books"]): model(...)       # one for each row of the batch
    with rw.on_task(model, ids): model(...)                       # numbers: of rows [B], or of tokens [B, T] (packing)
    with rw.on_task(model, {"movies": 0.5, "books": 0.5}): ...    # fixed shares, whatever the gate would say
    set_task(model, ids)                                          # the same until the next call: for a training loop

A task's number is its place in `tasks_of(model)`. Rows that `generate` multiplies (beams) keep their task. With
gradient checkpointing the backward pass computes activations again and must find the same tasks: keep it inside the
block, or use `set_task`.

`attach_embedding` is one shared adapter whose rank space each task scales by a vector of its own. What is trained are
the parameters with `requires_grad`, of `adapter_parameters`; `train_parts` sets it by part: `adapters`, `gate`,
`embedding`, `heads`, or `adapters:movies` for one.
"""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from rankwise.adapters.base import AdapterLayer
from rankwise.adapters.config import LoraConfig, start_name
from rankwise.adapters.dora import DoraLayer
from rankwise.adapters.gate import ALWAYS, GateLayer, Member
from rankwise.adapters.gate_config import (
    GLOBAL,
    INFERRED,
    LAYER,
    LEARNED,
    SHARED,
    EmbeddingConfig,
    GateConfig,
    check_names,
)
from rankwise.adapters.head_gate import Head, HeadGate
from rankwise.adapters.layers import LayerKind
from rankwise.adapters.low_rank import LowRankLayer
from rankwise.adapters.mixture import Mixture
from rankwise.adapters.starts import TAKEN_FROM_BASE
from rankwise.attach.attachment import (
    ATTRIBUTE,
    Attachment,
    adapter_layers,
    attachment_of,
    need_attachment,
    replace_modules,
    unchanged_on_error,
)
from rankwise.attach.bases import base_record, check_bases, model_weight_hashes
from rankwise.attach.checkpoint import load_adapter
from rankwise.attach.guards import guard_methods
from rankwise.attach.inferring import infer_tasks_of
from rankwise.attach.inject import adapter_parameters, attach, detach
from rankwise.attach.targets import modules_to_save
from rankwise.errors import RequestError, did_you_mean
from rankwise.quantized import keep_unpacked

Model = TypeVar("Model", bound=nn.Module)
Source = str | os.PathLike[str] | LoraConfig
"""An adapter's folder, or the settings of a fresh adapter."""

EXPERTS = re.compile(r"(^|\.)experts?(\.|$)")
"""In a layer's name: it is given some of the tokens, in an order of the model's own."""


@dataclass
class Part:
    """One adapter taken out of a model: its configuration, and what it holds for each layer."""

    config: LoraConfig
    head: dict[str, Any] | None
    factors: dict[str, tuple[LayerKind, Tensor, Tensor, float]] = field(default_factory=dict)
    """A, B and scale by layer."""
    whole: dict[str, dict[str, Tensor]] = field(default_factory=dict)
    """Weight and bias by module that is trained whole."""
    base: dict[str, Any] | None = None
    """What the provenance of its folder says of its base."""


def attach_gate(
    model: Model,
    adapters: Mapping[str, Source],
    gate: GateConfig | None = None,
    shared: Source | None = None,
    generator: torch.Generator | None = None,
) -> Model:
    """Puts several adapters into `model`, in place, under a gate, and returns it. All of them can be trained.

    Args:
        model: in which nothing is attached.
        adapters: by task: a folder, or the settings of a fresh adapter. They may differ in ranks and targets.
        gate: `hard` by default.
        shared: an adapter that takes part whatever the task is.
        generator: draws the starts of fresh ones.

    Raises: RequestError, with the model as it was, for adapters that don't fit the model, are of another base (by the
        hashes in their runs' provenance.json) or can't be put together; for settings of the gate without effect.
    """
    gate = gate or GateConfig()
    check_names(adapters)
    gate.check_tasks(adapters)
    if shared is not None and SHARED in adapters:
        raise RequestError(f"a task can't be named '{SHARED}' beside a shared adapter; rename it")
    if gate.mode in LEARNED and len(adapters) == 1:
        raise RequestError(f"gate mode '{gate.mode}' has no effect with one adapter; name more, or attach it alone")
    with unchanged_on_error(model):
        parts = {name: taken_out(model, source, name, generator) for name, source in adapters.items()}
        common = {} if shared is None else {SHARED: taken_out(model, shared, SHARED, generator)}
        every = {**adapters, **({} if shared is None else {SHARED: shared})}
        check_bases(every, lambda: model_weight_hashes(model))
        return assemble(model, parts, common, gate)


def attach_embedding(
    model: Model,
    adapter: Source,
    tasks: Iterable[str],
    embedding: EmbeddingConfig | None = None,
    generator: torch.Generator | None = None,
) -> Model:
    """Puts one shared adapter with a vector for each task into `model`, in place. The vectors start as ones.

    Raises: RequestError, with the model as it was, for an adapter that doesn't fit or is of another base; for
        `per: shared` with layers of different ranks.
    """
    names = list(tasks)
    check_names(names)
    with unchanged_on_error(model):
        part = taken_out(model, adapter, SHARED, generator)
        check_bases({SHARED: adapter}, lambda: model_weight_hashes(model))
        return assemble(model, {}, {SHARED: part}, embedding or EmbeddingConfig(), names)


def taken_out(model: nn.Module, source: Source, name: str, generator: torch.Generator | None = None) -> Part:
    """What an adapter holds for this model: it is attached, read, and detached again.

    Raises: RequestError for one that does not fit the model, or that can't be part of a gate, with the reason.
    """
    where = f"adapter '{name}'" if isinstance(source, LoraConfig) else f"adapter '{name}' ('{os.fspath(source)}')"
    if isinstance(source, LoraConfig) and start_name(source.init_lora_weights) in TAKEN_FROM_BASE:
        raise RequestError(
            f"{where} can't start from init_lora_weights={source.init_lora_weights!r} in a gate, whose base is the "
            "true one for all adapters; train it alone first, or choose another start"
        )
    try:
        if isinstance(source, LoraConfig):
            attach(model, source, generator)
        else:
            load_adapter(model, source)
    except RequestError as error:
        raise RequestError(f"{where}: {error}") from error
    attachment = need_attachment(model)
    if attachment.mixture is not None:
        raise RequestError(f"{where} is a gate itself; name its adapters instead, or fold it into one")
    base = None if isinstance(source, LoraConfig) else base_record(Path(source))
    part = Part(attachment.config, attachment.head, base=base)
    for layer_name, layer in adapter_layers(model).items():
        if isinstance(layer, DoraLayer) or not isinstance(layer, LowRankLayer):
            raise RequestError(f"{where} can't be part of a gate: {_reason(layer, layer_name)}")
        A, B = (factor.detach().clone() for factor in layer.joined())
        part.factors[layer_name] = layer.kind, A, B, layer.scale
    if attachment.holds_embeddings or attachment.vocabulary_before is not None:
        raise RequestError(f"{where} can't be part of a gate: it brings embeddings of its own for the whole vocabulary")
    saved = modules_to_save(model, part.config, strict=False)
    for full in attachment.exchanged:
        module, _, leaf = full.rpartition(".")
        if not any(full.startswith(f"{name}.") for name in saved):
            raise RequestError(f"{where} can't be part of a gate: it trains the base's own '{full}' (bias=...)")
        part.whole.setdefault(module, {})[leaf] = attachment.current(model, full).detach().clone()
    detach(model)
    return part


def _reason(layer: AdapterLayer, name: str) -> str:
    if isinstance(layer, DoraLayer):
        return (
            f"DoRA's magnitudes in '{name}' rescale the base's own rows, so its change is no sum that a gate could "
            "weigh (use_dora); train it as plain LoRA"
        )
    return f"it replaces rows of the embedding '{name}' (trainable_token_indices)"


def assemble(
    model: Model,
    parts: Mapping[str, Part],
    common: Mapping[str, Part],
    settings: GateConfig | EmbeddingConfig,
    tasks: Sequence[str] = (),
) -> Model:
    """Attaches a gate of adapters that are in memory; those in `common` always take part. `tasks`: of an embedding.

    Raises: RequestError for parts that can't be together; the model may then be half changed.
    """
    every = {**parts, **common}
    tasks = list(parts) or list(tasks)
    _check_heads(every, common)
    names = [name for name, _ in model.named_modules() if any(name in part.factors for part in every.values())]
    mixture, groups, entries = _mixture(settings, tasks, names, every)
    owners = {name: tasks.index(name) if name in parts else ALWAYS for name in every}
    layers: dict[str, AdapterLayer] = {}
    for name in names:
        members = [
            Member(key, owners[key], *part.factors[name][1:], part.config.lora_dropout)
            for key, part in every.items()
            if name in part.factors
        ]
        kind = next(part.factors[name][0] for part in every.values() if name in part.factors)
        base = model.get_submodule(name)
        _check_tokens(name, mixture)
        layers[name] = GateLayer(base, kind, name, members, mixture, groups.get(name, 0), entries.get(name, 0))
    for name in dict.fromkeys(module for part in every.values() for module in part.whole):
        heads = [
            Head(key, owners[key], part.whole[name]["weight"], part.whole[name].get("bias"))
            for key, part in every.items()
            if name in part.whole and "weight" in part.whole[name]
        ]
        layers[name] = HeadGate(model.get_submodule(name), name, heads, mixture, groups.get(name, 0))
    _put(model, layers, mixture, every)
    return model


def _put(model: nn.Module, layers: Mapping[str, AdapterLayer], mixture: Mixture, every: Mapping[str, Part]) -> None:
    """As the end of `rankwise.attach.inject.inject`."""
    first = next(iter(every.values()))
    flags = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    attachment = Attachment(first.config, flags)
    attachment.unpacked = keep_unpacked(model)
    attachment.head = first.head
    attachment.members = {name: part.config for name, part in every.items()}
    attachment.bases = {name: part.base for name, part in every.items() if part.base is not None}
    model.requires_grad_(False)
    for layer in layers.values():
        layer.training = layer.base.training
        for parameter in layer.peft_parameters().values():
            parameter.requires_grad_(True)
    device = next(model.parameters()).device
    attachment.mixture = mixture.to(device).train(model.training)
    replace_modules(model, {layer.base: layer for layer in layers.values()})
    model.add_module(ATTRIBUTE, attachment)
    if mixture.gate is not None and mixture.gate.mode == INFERRED:
        infer_tasks_of(model, mixture)
    guard_methods(model)


def group_of(name: str, per: str) -> str:
    """The group of layer `name`, whose logits it shares: all, those of a transformer block, or itself alone."""
    if per == GLOBAL:
        return GLOBAL
    block = re.match(r"(.*?\.\d+)\.", name) if per == LAYER else None
    return block[1] if block else name


def _mixture(
    settings: GateConfig | EmbeddingConfig, tasks: Sequence[str], names: Sequence[str], every: Mapping[str, Part]
) -> tuple[Mixture, dict[str, int], dict[str, int]]:
    """The mixture, each layer's group, and where its part of the vectors begins."""
    if isinstance(settings, EmbeddingConfig):
        ranks = {name: len(every[SHARED].factors[name][1]) for name in names}
        if settings.per == SHARED:
            if len(set(ranks.values())) > 1:
                raise RequestError(
                    f"embedding per '{SHARED}' needs one rank for all layers, and these have "
                    f"{min(ranks.values())} to {max(ranks.values())}; choose per '{LAYER}'"
                )
            return (
                Mixture(tasks, embedding=settings, num_entries=next(iter(ranks.values()))),
                {},
                dict.fromkeys(names, 0),
            )
        entries, place = {}, 0
        for name, rank in ranks.items():
            entries[name] = place
            place += rank
        return Mixture(tasks, embedding=settings, num_entries=place), {}, entries
    heads = [module for part in every.values() for module in part.whole]
    found = {name: group_of(name, settings.per or GLOBAL) for name in dict.fromkeys((*names, *heads))}
    order = list(dict.fromkeys(found.values()))
    mixture = Mixture(tasks, settings, num_groups=len(order))
    mixture.groups = tuple(order)
    return mixture, {name: order.index(group) for name, group in found.items()}, {}


def _check_heads(every: Mapping[str, Part], common: Mapping[str, Part]) -> None:
    """Raises: RequestError when heads mean different classes, or some adapters have one and others don't."""
    having = {name: part for name, part in every.items() if part.whole}
    if not having:
        return
    lacking = [name for name in every if name not in having and name not in common]
    shared = [name for name in common if name in having]
    if shared and len(having) > 1:
        raise RequestError(
            f"'{shared[0]}' always takes part and has a head ({', '.join(every[shared[0]].whole)}), and so have tasks' "
            "adapters: leave task_type and modules_to_save out of one of them"
        )
    if lacking and not shared:
        raise RequestError(
            f"adapter '{lacking[0]}' has no head, where '{next(iter(having))}' has one; train them for one objective"
        )
    (first, part), *others = having.items()
    for name, other in others:
        shapes = [
            {f"{module}.{leaf}": tuple(t.shape) for module, own in p.whole.items() for leaf, t in own.items()}
            for p in (part, other)
        ]
        if shapes[0] != shapes[1] or other.head != part.head:
            raise RequestError(
                f"the heads of '{first}' and '{name}' mean different classes ({part.head or shapes[0]}; "
                f"{other.head or shapes[1]}); a gate needs the same classes in the same order"
            )


def _check_tokens(name: str, mixture: Mixture) -> None:
    """Raises: RequestError for experts where tasks differ by row."""
    if EXPERTS.search(name) and not mixture.is_static:
        raise RequestError(
            f"'{name}' is in an expert, which is given tokens without their rows, so that their tasks can't be known; "
            "exclude experts, or choose a soft gate"
        )


# --- in use ----------------------------------------------------------------------------------------------------------


def mixture_of(model: nn.Module) -> Mixture:
    """The model's mixture. Raises: RequestError when no gate and no task embedding is attached."""
    attachment = attachment_of(model)
    if attachment is None or attachment.mixture is None:
        raise RequestError(f"this {type(model).__name__} has no gate and no task embedding; attach one first")
    return attachment.mixture


def tasks_of(model: nn.Module) -> tuple[str, ...]:
    """Names of the tasks, in the order of their numbers. Raises: as `mixture_of`."""
    return mixture_of(model).tasks


Tasks = str | int | Tensor | Sequence[str] | Mapping[str, float]


@contextlib.contextmanager
def on_task(model: nn.Module, task: Tasks) -> Iterator[None]:
    """In the block, what the model reads is of this task: see the module. Blocks nest; the inner one holds.

    Raises: RequestError for an unknown task, or a model without a gate.
    """
    mixture = mixture_of(model)
    with mixture.routed(mixture.one(task)):
        yield


def set_task(model: nn.Module, task: Tasks | None) -> None:
    """As `on_task`, until the next call; None: no task is given. Raises: as `on_task`."""
    mixture = mixture_of(model)
    mixture.routing.given = None if task is None else mixture.one(task)


PARTS = ("adapters", "gate", "embedding", "heads")


def parts_of(model: nn.Module) -> dict[str, list[str]]:
    """Names of the parameters (as in `adapter_parameters`) of each part that the model has: `adapters:NAME`, `gate`,
    `embedding:TASK`, `heads:NAME`.

    Raises: RequestError for a model without a gate.
    """
    mixture = mixture_of(model)
    found: dict[str, list[str]] = {}
    for layer_name, layer in adapter_layers(model).items():
        if isinstance(layer, (GateLayer, HeadGate)):
            part, lists = (
                ("adapters", ("lora_A", "lora_B")) if isinstance(layer, GateLayer) else ("heads", ("weights", "biases"))
            )
            for place, name in enumerate(layer.names):
                own = [f"{layer_name}.{kind}.{place}" for kind in lists if len(getattr(layer, kind)) > place]
                found.setdefault(f"{part}:{name}", []).extend(own)
    if mixture.logits is not None:
        found["gate"] = [f"{ATTRIBUTE}.mixture.logits"]
    for place in range(len(mixture.vectors)):
        found[f"embedding:{mixture.tasks[place]}"] = [f"{ATTRIBUTE}.mixture.vectors.{place}"]
    return found


def train_parts(model: nn.Module, parts: Iterable[str]) -> None:
    """Only these parts take gradients from now on: names of `parts_of`, or `adapters` for all of a kind.

    Raises: RequestError for a part that the model doesn't have.
    """
    known = parts_of(model)
    chosen: set[str] = set()
    for part in parts:
        own = [name for key, names in known.items() if key == part or key.startswith(f"{part}:") for name in names]
        if not own:
            kinds = dict.fromkeys([*(key.split(":")[0] for key in known), *known])
            raise RequestError(f"this model has no part '{part}' to train{did_you_mean(part, kinds)}")
        chosen.update(own)
    for name, parameter in adapter_parameters(model).items():
        parameter.requires_grad_(name in chosen)
