"""The adapters of a run on several tasks, as its stages need them: one for each task, one for all, or both.

A layer is isolated (an adapter for each task) or shared (one for all). At the start of a stage a layer may change from
one to the other: the tasks' adapters begin as copies of the shared one, which changes nothing; the shared one begins as
the best approximation, of the adapter's own rank, of the mean of the tasks' changes (as a learned gate weighs them,
where there is one). Heads that are trained whole likewise: copies, or the mean.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from rankwise.adapters.config import LoraConfig
from rankwise.adapters.factored import truncated
from rankwise.adapters.gate import GateLayer
from rankwise.adapters.gate_config import HARD, SHARED, EmbeddingConfig, GateConfig
from rankwise.adapters.head_gate import HeadGate
from rankwise.adapters.layers import LayerKind
from rankwise.adapters.low_rank import LowRankLayer
from rankwise.attach.attachment import adapter_layers, need_attachment
from rankwise.attach.gates import Part, assemble
from rankwise.attach.inject import adapter_tensors, attach, detach
from rankwise.errors import RequestError

Factors = tuple[LayerKind, Tensor, Tensor, float]
Whole = dict[str, dict[str, Tensor]]


@dataclass(frozen=True)
class Layout:
    """Which adapters the model holds.

    Args:
        isolated: the layers with an adapter for each task; None: all.
        settings: of the gate, or of the tasks' vectors on a shared adapter; None: one plain adapter.
    """

    isolated: frozenset[str] | None
    settings: GateConfig | EmbeddingConfig | None

    def isolates(self, layer: str) -> bool:
        """Whether each task has an adapter in this layer."""
        return isinstance(self.settings, GateConfig) and (self.isolated is None or layer in self.isolated)


NOISE = 0.5
"""Of copies that have to differ, in relation to the root mean square of A's entries."""

PLAIN = Layout(frozenset(), None)
APART = Layout(None, GateConfig(HARD))


@dataclass(frozen=True)
class Beginning:
    """The adapter as it was attached: what shared layers are like. `ranks`, `scales`: by layer; `head`: its meaning."""

    config: LoraConfig
    ranks: dict[str, int]
    scales: dict[str, float]
    head: dict[str, Any] | None

    @staticmethod
    def of(model: PreTrainedModel) -> Beginning:
        """Of the plain adapter that is attached.

        Raises: RequestError for what can't be one of several adapters.
        """
        layers = adapter_layers(model)
        attachment = need_attachment(model)
        for name, layer in layers.items():
            if not isinstance(layer, LowRankLayer) or layer.start_A is not None:
                raise RequestError(
                    f"the adapter of '{name}' can't be one of several: tasks.gate, tasks.embedding and several stages "
                    "need plain LoRA layers with a start that takes nothing from the base (no trainable_token_indices, "
                    "pissa, olora)"
                )
        if attachment.config.bias != "none":
            raise RequestError(
                f"adapter.bias ({attachment.config.bias}) trains the base's own; with tasks set it to none"
            )
        lora = {name: layer for name, layer in layers.items() if isinstance(layer, LowRankLayer)}
        ranks = {name: layer.rank for name, layer in lora.items()}
        scales = {name: layer.scale for name, layer in lora.items()}
        return Beginning(attachment.config, ranks, scales, attachment.head)


def arrange(
    model: PreTrainedModel,
    layout: Layout,
    tasks: Sequence[str],
    beginning: Beginning,
    given: Mapping[str, Part] | None = None,
    generator: torch.Generator | None = None,
) -> float:
    """Makes the adapters those of `layout`, with what they have learned.

    `given`: an adapter for each task in place of what is attached. `generator`: copies of a shared adapter get A's that
    differ from it by noise whose mean over the tasks is zero, so that in equal shares they change nothing, and a gate
    that mixes them can tell them apart: equal ones would learn the same for ever.

    Returns the relative Frobenius error of what became shared; 0 where nothing did.
    """
    if given is None:
        of_tasks, common, shares = parts_in(model, tasks)
    else:
        of_tasks, common, shares = dict(given), None, {}
    detach(model)
    own_layers = [name for name in beginning.ranks if layout.isolates(name)]
    other_layers = [name for name in beginning.ranks if name not in own_layers]
    configs = {name: part.config for name, part in of_tasks.items()}
    parts = {n: Part(_narrowed(configs.get(n, beginning.config), own_layers, other_layers), None) for n in tasks}
    shared = Part(_narrowed(beginning.config, other_layers, own_layers), None)
    lost = whole = 0.0
    for name, rank in beginning.ranks.items():
        own = {task: part.factors[name] for task, part in of_tasks.items() if name in part.factors}
        one = None if common is None else common.factors.get(name)
        if layout.isolates(name):
            copies = own if one is None else _copies(one, tasks, generator) | own
            for task in tasks:
                parts[task].factors[name] = _copied(copies[task])
        elif one is not None:
            shared.factors[name] = _copied(one)
        else:
            weights = shares.get(name, {task: 1 / len(own) for task in own})
            shared.factors[name], gone, there = _mean(own, weights, rank, beginning.scales[name])
            lost, whole = lost + gone, whole + there
    _arrange_heads(parts, shared, of_tasks, common, isinstance(layout.settings, GateConfig))
    if layout.settings is None:
        _attach_plain(model, beginning, shared)
    elif isinstance(layout.settings, EmbeddingConfig):
        assemble(model, {}, {SHARED: shared}, layout.settings, list(tasks))
    else:
        assemble(model, parts, {SHARED: shared} if shared.factors else {}, layout.settings)
    need_attachment(model).head = beginning.head
    return math.sqrt(lost / whole) if whole else 0.0


def _narrowed(config: LoraConfig, layers: Sequence[str], others: Sequence[str]) -> LoraConfig:
    """The configuration of an adapter on these layers, where there are others."""
    if not others:
        return config
    return config.with_(
        target_modules=list(layers) or config.target_modules, exclude_modules=None, layers_to_transform=None,
        layers_pattern=None,
    )  # fmt: skip


def parts_in(
    model: PreTrainedModel, tasks: Sequence[str]
) -> tuple[dict[str, Part], Part | None, dict[str, dict[str, float]]]:
    """What the attached model holds: the part of each task, that of all, and the shares that a learned gate gives."""
    attachment = need_attachment(model)
    mixture = attachment.mixture
    if mixture is None:
        return {}, _plain_part(model), {}
    parts = {name: Part(config, attachment.head) for name, config in attachment.members.items()}
    shares: dict[str, dict[str, float]] = {}
    for name, layer in adapter_layers(model).items():
        if isinstance(layer, GateLayer):
            for place, member in enumerate(layer.names):
                A, B = layer.lora_A[place].detach(), layer.lora_B[place].detach()
                parts[member].factors[name] = layer.kind, A, B, layer.member_scales[place]
            if mixture.logits is not None:
                shares[name] = dict(zip(tasks, mixture.shares(layer.group).tolist(), strict=True))
        elif isinstance(layer, HeadGate):
            for place, member in enumerate(layer.names):
                parts[member].whole[name] = _head_of(layer, place)
    return {name: part for name, part in parts.items() if name in tasks}, parts.get(SHARED), shares


def _head_of(layer: HeadGate, place: int) -> dict[str, Tensor]:
    found = {"weight": layer.weights[place].detach()}
    return found | ({"bias": layer.biases[place].detach()} if len(layer.biases) else {})


def _plain_part(model: PreTrainedModel) -> Part:
    attachment = need_attachment(model)
    part = Part(attachment.config, attachment.head)
    for name, layer in adapter_layers(model).items():
        assert isinstance(layer, LowRankLayer), name
        part.factors[name] = layer.kind, layer.lora_A.detach(), layer.lora_B.detach(), layer.scale
    for full in attachment.exchanged:
        module, _, leaf = full.rpartition(".")
        part.whole.setdefault(module, {})[leaf] = attachment.current(model, full).detach()
    return part


def _copied(factors: Factors) -> Factors:
    kind, A, B, scale = factors
    return kind, A.clone(), B.clone(), scale


def _copies(factors: Factors, tasks: Sequence[str], generator: torch.Generator | None) -> dict[str, Factors]:
    """The same adapter for each task, or nearly the same (see `arrange`)."""
    kind, A, B, scale = factors
    if generator is None:
        return dict.fromkeys(tasks, factors)
    noise = torch.randn((len(tasks), *A.shape), generator=generator).to(A) * (NOISE * A.square().mean().sqrt())
    noise -= noise.mean(0)
    return {task: (kind, A + own, B, scale) for task, own in zip(tasks, noise, strict=True)}


@torch.no_grad()
def _mean(
    own: Mapping[str, Factors], weights: Mapping[str, float], rank: int, scale: float
) -> tuple[Factors, float, float]:
    """One adapter in place of several, and the squared norms of what is lost and of all there was."""
    kind, A, B, _ = next(iter(own.values()))
    every_A = torch.cat([A.flatten(1) for _, A, _, _ in own.values()])
    every_B = torch.cat([B.flatten(1) * (weights[task] * s / scale) for task, (_, _, B, s) in own.items()], dim=1)
    near = truncated(every_A, every_B, rank)
    A, B = near.A.reshape(rank, *A.shape[1:]).to(A), near.B.reshape(B.shape[0], rank, *B.shape[2:]).to(B)
    return (kind, A, B, scale), near.lost, near.whole


def _arrange_heads(
    parts: Mapping[str, Part], shared: Part, of_tasks: Mapping[str, Part], common: Part | None, apart: bool
) -> None:
    """Heads for each task under a gate, else one."""
    one: Whole = common.whole if common is not None else {}
    every = [part.whole for part in of_tasks.values() if part.whole]
    if apart:
        for task, part in parts.items():
            had = of_tasks[task].whole if task in of_tasks else {}
            part.whole.update(_cloned(had or one))
    elif one:
        shared.whole.update(_cloned(one))
    elif every:
        shared.whole.update(
            {
                module: {leaf: torch.stack([whole[module][leaf] for whole in every]).mean(0) for leaf in leaves}
                for module, leaves in every[0].items()
            }
        )


def _cloned(whole: Whole) -> Whole:
    return {module: {leaf: tensor.clone() for leaf, tensor in own.items()} for module, own in whole.items()}


@torch.no_grad()
def _attach_plain(model: PreTrainedModel, beginning: Beginning, shared: Part) -> None:
    """One plain adapter with these factors and heads."""
    attach(model, beginning.config, generator=torch.Generator().manual_seed(0))  # overwritten: nothing stays of it
    for name, layer in adapter_layers(model).items():
        assert isinstance(layer, LowRankLayer), name
        _, A, B, _ = shared.factors[name]
        layer.lora_A.copy_(A)
        layer.lora_B.copy_(B)
    attachment = need_attachment(model)
    tensors = adapter_tensors(model)
    for full in attachment.exchanged:
        module, _, leaf = full.rpartition(".")
        tensors[full].copy_(shared.whole[module][leaf])
