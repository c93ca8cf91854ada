"""Adapters in memory combined into one: tensors and configuration of an ordinary PEFT folder.

Every layer gets the scale 1: `lora_alpha` is `r`, and patterns say so for layers of lower ranks. So a reader that knows
no patterns, such as vLLM, scales rightly. Written in fp32 at least: in bf16 a sum would be rounded once more.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from rankwise.attach import peft_format
from rankwise.errors import RequestError
from rankwise.recipes.combine_sources import Layer, Source, combined_whole, merged_modules, same_targets
from rankwise.tasks.methods import METHODS, Factors, Options, Part, distance


@dataclass(frozen=True)
class Recipe:
    """How adapters are combined: the part of the request that decides the result.

    Args:
        method: a key of `METHODS`.
        rank, energy, density: as in `rankwise.tasks.methods.Options`; None where the method takes none.
        seed: of what is drawn; None where nothing is.
    """

    method: str
    rank: int | None = None
    energy: float | None = None
    density: float | None = None
    seed: int | None = None

    def options(self) -> Options:
        """What methods take, with draws from the start."""
        generator = None if self.seed is None else torch.Generator().manual_seed(self.seed)
        return Options(self.rank, self.energy, 1.0 if self.density is None else self.density, generator)


@dataclass(frozen=True)
class Combined:
    """One layer: the adapters' ranks (0 where one has none there), its own, and norms: what is off the sum, the sum."""

    name: str
    ranks: tuple[int, ...]
    rank: int
    apart: float
    whole: float


@dataclass(frozen=True)
class Combination:
    """The result: tensors by names relative to the model, the configuration's fields, and what was done."""

    tensors: dict[str, Tensor]
    fields: dict[str, Any]
    modules: list[Combined]
    notes: list[str] = field(default_factory=list)

    @property
    def error(self) -> float:
        """Relative Frobenius error against the weighted sum of the updates, of all layers together."""
        return off(math.hypot(*(m.apart for m in self.modules)), math.hypot(*(m.whole for m in self.modules)))


def off(apart: float, whole: float) -> float:
    """Relative error of norms; infinite against nothing."""
    if whole:
        return apart / whole
    return math.inf if apart else 0.0


def combination(
    sources: Sequence[Source], weights: Sequence[float], recipe: Recipe, base: str | None = None
) -> Combination:
    """The adapter that `recipe` makes of the sources. `base`: what it names as its base, in place of theirs.

    Raises: RequestError for updates that cancel each other, or whole modules that can't be averaged.
    """
    whole, notes = combined_whole(sources, weights)
    tensors, modules = dict(whole), list[Combined]()
    for name, layers, parts, found in _each(sources, weights, recipe):
        written = _as_in_file(name, _some(layers), found)
        tensors |= written
        A, B = (tensor.flatten(1) for tensor in written.values())
        apart, norm = distance((A, B), parts)
        ranks = tuple(0 if layer is None else layer.A.shape[0] for layer in layers)
        modules.append(Combined(name, ranks, A.shape[0], apart, norm))
    if not any(module.whole for module in modules):
        raise RequestError(
            f"with the weights {' '.join(f'{weight:g}' for weight in weights)} the updates add up to nothing, in every "
            "layer; give other weights"
        )
    fields = fields_of(sources, {module.name: module.rank for module in modules}, base)
    return Combination(tensors, fields, modules, notes)


def tensors_at(
    sources: Sequence[Source], weights: Sequence[float], recipe: Recipe, ranks: Mapping[str, int]
) -> dict[str, Tensor]:
    """The tensors alone, with zeros up to these ranks, which are at least the layers' own: it means the same then."""
    tensors, _ = combined_whole(sources, weights)
    for name, layers, _, (A, B) in _each(sources, weights, recipe):
        missing = ranks[name] - A.shape[0]
        tensors |= _as_in_file(name, _some(layers), (F.pad(A, (0, 0, 0, missing)), F.pad(B, (0, missing))))
    return tensors


def _each(
    sources: Sequence[Source], weights: Sequence[float], recipe: Recipe
) -> Iterator[tuple[str, list[Layer | None], list[Part], Factors]]:
    """Each layer, what the sources have there, with their weights, and what becomes of it."""
    options, method = recipe.options(), METHODS[recipe.method]
    for name, layers in union(sources).items():
        parts = [layer.part(weight) for layer, weight in zip(layers, weights, strict=True) if layer is not None]
        yield name, layers, parts, method.combine(parts, options)


def _some(layers: Sequence[Layer | None]) -> Layer:
    return next(layer for layer in layers if layer is not None)


def union(sources: Sequence[Source]) -> dict[str, list[Layer | None]]:
    """Each layer that some source adapts, in the order of names, and what every source has there."""
    names = sorted({name for source in sources for name in source.layers})
    return {name: [source.layers.get(name) for source in sources] for name in names}


def _as_in_file(name: str, like: Layer, found: Factors) -> dict[str, Tensor]:
    """A and B under their names in the file, in the layer's shapes, in its dtype or fp32."""
    A, B = found
    rank = A.shape[0]
    dtype = torch.promote_types(like.A.dtype, torch.float32)
    return {
        name + like.ends[0]: A.reshape(rank, *like.A.shape[1:]).to(dtype).contiguous(),
        name + like.ends[1]: B.reshape(B.shape[0], rank, *like.B.shape[2:]).to(dtype).contiguous(),
    }


def fields_of(sources: Sequence[Source], ranks: Mapping[str, int], base: str | None) -> dict[str, Any]:
    """The content of `adapter_config.json`: scale 1 everywhere, the first source's where nothing else is said."""
    most = max(ranks.values())
    lower = {f"^{name}": rank for name, rank in ranks.items() if rank != most}
    first = sources[0].config
    named = next((s.config for s in sources if s.config.base_model_name_or_path), first)
    config = first.with_(
        r=most, lora_alpha=most, rank_pattern=lower, alpha_pattern=dict(lower), use_rslora=False,
        init_lora_weights=True, init_scale=1.0, modules_to_save=merged_modules([source.config for source in sources]),
        base_model_name_or_path=base or named.base_model_name_or_path, revision=None if base else named.revision,
        **same_targets(sources),
    )  # fmt: skip
    fields = peft_format.config_to_peft(config)
    fields["fan_in_fan_out"] = any(source.fields.get("fan_in_fan_out") for source in sources)
    if config.task_type is None:
        fields["auto_mapping"] = sources[0].fields.get("auto_mapping")
    return fields


def most_ranks(sources: Sequence[Source], recipe: Recipe) -> dict[str, int]:
    """The rank that each layer can have at most, whatever the weights."""
    options, method = recipe.options(), METHODS[recipe.method]
    return {
        name: method.most_rank([layer.A.shape[0] for layer in layers if layer is not None], options)
        for name, layers in union(sources).items()
    }
