"""The adapters that are combined: read from their folders, and whether they can be; no base is loaded."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import Any

from torch import Tensor

from rankwise.adapters.config import LoraConfig, start_name
from rankwise.adapters.low_rank import scale_of
from rankwise.adapters.starts import TAKEN_FROM_BASE
from rankwise.attach.bases import base_record, weight_hashes
from rankwise.attach.checkpoint import read_config, read_head, read_tensors
from rankwise.attach.peft_format import CONFIG_FILE
from rankwise.attach.targets import alpha_in, rank_in
from rankwise.errors import RequestError
from rankwise.recipes.inspect import FACTOR_NAMES, factors, is_trained
from rankwise.recipes.target import adapter_folder
from rankwise.tasks.methods import Part

SHOWN_DIGITS = 8
"""Of a hash, in a message."""


@dataclass(frozen=True)
class Layer:
    """One adapted layer as its file has it: factors in their own shapes, and its scale."""

    A: Tensor
    B: Tensor
    scale: float
    ends: tuple[str, str]
    """Of the names of A and B in the file."""

    def part(self, weight: float) -> Part:
        """As matrices, in fp64."""
        return Part(self.A.flatten(1).double(), self.B.flatten(1).double(), self.scale, weight)


@dataclass(frozen=True)
class Source:
    """An adapter that is combined with others.

    Args:
        name: as the user wrote it.
        folder: with PEFT's two files.
        config: its configuration.
        layers: the adapted layers, by name.
        whole: everything else in its file, by name: heads, biases, embeddings.
        head: its `head.json`, or None.
        base: what is known of its base: `name` and `files` with their hashes; None where nothing is.
        fields: the content of its `adapter_config.json`.
    """

    name: str
    folder: Path
    config: LoraConfig
    layers: dict[str, Layer]
    whole: dict[str, Tensor]
    head: dict[str, Any] | None
    base: dict[str, Any] | None
    fields: dict[str, Any]


def read_source(name: str) -> Source:
    """The adapter in a run folder or an adapter folder.

    Raises: RequestError for a folder that is neither or can't be read, and for an adapter whose file is no sum of
        low-rank updates: DoRA, or one that counts from a changed base.
    """
    folder = adapter_folder(name)
    config, tensors = read_config(folder), read_tensors(folder)
    if config.use_dora:
        raise RequestError(
            f"'{name}' is a DoRA adapter: its magnitudes are of the base and its update together, so it is no update "
            "that could be added to others; merge it (`rankwise merge`) and combine adapters of the merged model"
        )
    if start_name(config.init_lora_weights) in TAKEN_FROM_BASE:
        raise RequestError(
            f"'{name}' was saved with init_lora_weights={config.init_lora_weights!r}: its factors count from a base "
            "that was changed by them, and are no update; save it from PEFT with "
            "path_initial_model_for_weight_conversion"
        )
    fields = json.loads((folder / CONFIG_FILE).read_text(encoding="utf-8"))
    layers: dict[str, Layer] = {}
    for module, (A, B) in factors(tensors, str(folder)).items():
        rank = rank_in(config, module)
        if A.shape[0] != rank or B.shape[1] != rank:
            raise RequestError(
                f"'{name}' disagrees with its configuration: '{module}' has A {list(A.shape)} and B {list(B.shape)}, "
                f"and should have rank {rank}"
            )
        ends = next(ends for ends in FACTOR_NAMES if module + ends[0] in tensors)
        layers[module] = Layer(A, B, scale_of(alpha_in(config, module), rank, config.use_rslora), ends)
    used = {module + end for module, layer in layers.items() for end in layer.ends}
    whole = {key: tensor for key, tensor in tensors.items() if key not in used}
    return Source(name, folder, config, layers, whole, read_head(folder), base_record(folder), fields)


# --- whether they go together --------------------------------------------------------------------------------------


def check_together(sources: Sequence[Source], base: str | None) -> None:
    """Whether the sources are adapters of one base and of one kind. `base`: said to be everyone's.

    Raises: RequestError with the first thing that differs.
    """
    for one, other in combinations(sources, 2):  # what is known of the first may say nothing of two others
        _check_bases(one, other, base)
    first = sources[0]
    for other in sources[1:]:
        for what, mine, theirs in (
            ("task type", first.config.task_type, other.config.task_type),
            ("bias", first.config.bias, other.config.bias),
            ("trainable_token_indices", first.config.trainable_token_indices, other.config.trainable_token_indices),
        ):
            if mine != theirs:
                raise RequestError(
                    f"'{first.name}' has {what} {mine!r} and '{other.name}' {theirs!r}; combine adapters of one kind"
                )
        if first.head != other.head:
            raise RequestError(
                f"the heads of '{first.name}' and '{other.name}' mean different things ({first.head} and "
                f"{other.head}); train them with the same labels"
            )
    _check_shapes(sources)


def _check_bases(first: Source, other: Source, base: str | None) -> None:
    mine, theirs = weight_hashes(first.base), weight_hashes(other.base)
    if mine and theirs:
        names = [name for name in {**mine, **theirs} if mine.get(name) != theirs.get(name)]
        if names:
            a, b = (known.get(names[0], "none")[:SHOWN_DIGITS] for known in (mine, theirs))
            raise RequestError(
                f"'{first.name}' and '{other.name}' are adapters of different bases: the hash of {names[0]} is {a} for "
                f"one and {b} for the other; combine adapters of one base"
            )
        return
    names_of = [_base_name(source) for source in (first, other)]
    if base is None and None not in names_of and names_of[0] != names_of[1]:
        raise RequestError(
            f"'{first.name}' is an adapter of '{names_of[0]}' and '{other.name}' of '{names_of[1]}'; if that is one "
            "model under two names, say so by --base"
        )


def _base_name(source: Source) -> str | None:
    """The base that the adapter names, with its revision; a folder by where it really is."""
    name = source.config.base_model_name_or_path
    if not name:
        return None
    folder = Path(name).expanduser()
    if folder.is_dir():
        return str(folder.resolve())
    return f"{name}@{source.config.revision}" if source.config.revision else name


def _check_shapes(sources: Sequence[Source]) -> None:
    known: dict[str, tuple[Source, tuple[Any, ...]]] = {}
    for source in sources:
        shapes: dict[str, tuple[Any, ...]] = {
            name: (layer.ends, tuple(layer.A.shape[1:]), layer.B.shape[0], tuple(layer.B.shape[2:]))
            for name, layer in source.layers.items()
        }
        shapes |= {name: tuple(tensor.shape) for name, tensor in source.whole.items()}
        for name, shape in shapes.items():
            before, theirs = known.setdefault(name, (source, shape))
            if theirs != shape:
                raise RequestError(
                    f"'{name}' has other shapes in '{before.name}' ({_sizes(before, name)}) than in '{source.name}' "
                    f"({_sizes(source, name)}); combine adapters of one model"
                )


def _sizes(source: Source, name: str) -> str:
    if name in source.whole:
        return str(list(source.whole[name].shape))
    layer = source.layers[name]
    return f"A {list(layer.A.shape)}, B {list(layer.B.shape)}"


# --- what is not low-rank ------------------------------------------------------------------------------------------


def combined_whole(sources: Sequence[Source], weights: Sequence[float]) -> tuple[dict[str, Tensor], list[str]]:
    """Heads, biases, token rows and embeddings of the combination, and notes on what was done.

    What all hold alike is taken. What differs was trained, and is the mean by the shares of the weights: the base's own
    plus the weighted sum of the changes, for weights that add up to 1. What some don't hold is taken from those who do.

    Raises: RequestError for a mean with a negative weight, or of weights that are all zero.
    """
    found: dict[str, Tensor] = {}
    notes: list[str] = []
    means: list[str] = []
    for name in sorted({name for source in sources for name in source.whole}):
        holders = [(s, w) for s, w in zip(sources, weights, strict=True) if name in s.whole]
        tensors = [source.whole[name] for source, _ in holders]
        trained = any(is_trained(source.config, name) for source, _ in holders)
        if trained and len(holders) < len(sources):
            notes.append(f"'{name}' is taken from {', '.join(s.name for s, _ in holders)}: the others don't hold it")
        if all(tensor.equal(tensors[0]) for tensor in tensors[1:]):
            found[name] = tensors[0]
            continue
        if not trained:
            raise RequestError(
                f"'{holders[0][0].name}' and '{holders[1][0].name}' hold different base weights '{name}'"
            )
        shares = [weight for _, weight in holders]
        total = sum(shares)
        if min(shares) < 0 or not total:
            raise RequestError(
                f"'{name}' was trained whole, so it is averaged by the weights, which must be 0 or more and not all 0 "
                f"for that, not {' '.join(f'{weight:g}' for weight in weights)}"
            )
        mean = sum(w / total * tensor.double() for w, tensor in zip(shares, tensors, strict=True))
        assert isinstance(mean, Tensor)
        found[name] = mean.to(tensors[0].dtype)
        means.append(name)
    if means:
        listed = ", ".join(means[:3]) + (f" and {len(means) - 3} more" if len(means) > 3 else "")
        notes.append(f"trained whole, so averaged by the shares of the weights: {listed}")
    return found, notes


def merged_modules(configs: Sequence[LoraConfig]) -> list[str] | None:
    """The `modules_to_save` of all, in order."""
    found = dict.fromkeys(name for config in configs for name in config.modules_to_save or ())
    return list(found) or None


def same_targets(sources: Sequence[Source]) -> Mapping[str, Any]:
    """The fields that choose the layers: those of all sources where these are alike, else every layer by its name."""
    fields = ("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern")
    chosen = [{name: getattr(source.config, name) for name in fields} for source in sources]
    ordered = [
        {name: sorted(value) if isinstance(value, list) else value for name, value in choice.items()}
        for choice in chosen
    ]
    same_layers = all(source.layers.keys() == sources[0].layers.keys() for source in sources)
    if same_layers and all(choice == ordered[0] for choice in ordered):
        return chosen[0]
    names = sorted({name for source in sources for name in source.layers})
    return {**dict.fromkeys(fields), "target_modules": names}
