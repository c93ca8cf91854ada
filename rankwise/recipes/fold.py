"""Fold: a gate's folder made into one plain PEFT folder, from its files alone; the base is never loaded.

All layers get scale 1 (`lora_alpha` is the rank), so that a reader that knows no patterns scales rightly. Heads that
the tasks' adapters trained whole become one, in the same shares.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rankwise.adapters.config import LoraConfig
from rankwise.adapters.factored import relative_error
from rankwise.adapters.low_rank import scale_of
from rankwise.attach import peft_format
from rankwise.attach.checkpoint import HEAD_FILE, read_config, read_head, read_tensors
from rankwise.attach.gate_folder import is_gate_folder, read_gate_folder, read_tables, with_ranks
from rankwise.attach.targets import alpha_in
from rankwise.errors import RequestError
from rankwise.files import check_new_folder, replacing_folder
from rankwise.recipes.adapter_files import write_adapter
from rankwise.recipes.inspect import FACTOR_NAMES, factors
from rankwise.recipes.output import RUN_FILE
from rankwise.recipes.rank_map import vllm_max_lora_rank
from rankwise.recipes.target import Target
from rankwise.tasks.folding import FoldedLayer, Share, Shares, folded_layer, shares_of
from rankwise.train.state import ADAPTER

TARGETS = ("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern")
"""Settings that say which layers are adapted."""


@dataclass(frozen=True)
class Member:
    """One adapter of the gate, read from its folder."""

    config: LoraConfig
    fields: dict[str, Any]
    factors: dict[str, tuple[Tensor, Tensor]]
    ends: dict[str, tuple[str, str]]
    whole: dict[str, Tensor]

    def scale(self, layer: str) -> float:
        """The scale s of a layer."""
        return scale_of(alpha_in(self.config, layer), len(self.factors[layer][0]), self.config.use_rslora)


def gate_folder_of(name: str) -> Path:
    """The folder of a gate, or of the run that made it.

    Raises: RequestError for anything else.
    """
    folder = Path(name).expanduser()
    folder = folder / ADAPTER if (folder / RUN_FILE).is_file() else folder
    if is_gate_folder(folder):
        return folder
    if not folder.is_dir():
        raise RequestError(f"there is no folder '{folder}'; give the folder of a gate or of task embeddings")
    raise RequestError(f"'{name}' holds no tasks.json: it is no gate and has nothing to fold")


def fold(
    target: str,
    out: str | Path,
    task: str | Mapping[str, float] | None = None,
    rank: int | None = None,
    energy: float | None = None,
) -> dict[str, Any]:
    """The document of `rankwise fold`: `output`, `error`, `task`, `modules` and figures.

    Args:
        target: the folder of a gate or of task embeddings, or a run folder.
        out: the folder to write, PEFT's format.
        task: of which adapter or vector; shares by task; None: what the learned gate gives.
        rank: of every layer that would have a higher one; or else
        energy: the share of each layer's squared singular values that must stay, above 0 and at most 1.

    Raises: RequestError for a folder that exists or can't be folded, an unknown task, or a rank without effect.
    """
    check_new_folder(out)
    if rank is not None and energy is not None:
        raise RequestError("give --rank or --energy, not both")
    if energy is not None and not 0 < energy <= 1:
        raise RequestError(f"--energy must be above 0 and at most 1, not {energy:g}; 0.99 keeps nearly everything")
    if rank is not None and rank < 1:
        raise RequestError(f"--rank must be a whole number from 1, not {rank}")
    folder = gate_folder_of(target)
    spec, tables = read_gate_folder(folder), read_tables(folder)
    shares = shares_of(spec, tables, str(target), task)
    members = {name: read_member(folder / name) for name in spec.adapters}
    _check_shapes(members)
    layers = _layers(members, shares, rank, energy)
    highest = max(layer.before for layer in layers.values())
    if rank is not None and rank >= highest:
        raise RequestError(
            f"--rank {rank} has no effect: the folded adapter has no higher rank (the highest is {highest}); ask for "
            "less"
        )
    _write(Path(out), folder, members, layers, _heads(members, shares))
    lost, whole = sum(layer.lost for layer in layers.values()), sum(layer.whole for layer in layers.values())
    most = max(layer.rank for layer in layers.values())
    return {
        "output": str(out),
        "error": relative_error(lost, whole),
        "task": task,
        "tasks": list(spec.tasks),
        "max_rank": most,
        "vllm_max_lora_rank": vllm_max_lora_rank(most),
        "parameters": sum(layer.A.numel() + layer.B.numel() for layer in layers.values()),
        "file_bytes": (Path(out) / peft_format.WEIGHTS_FILE).stat().st_size,
        "modules": [
            {"name": name, "before": layer.before, "rank": layer.rank, "error": layer.error}
            for name, layer in layers.items()
        ],
    }


@contextlib.contextmanager
def folded(target: Target) -> Iterator[Target]:
    """The target with one plain adapter, in a temporary folder, where it holds several.

    Raises: RequestError, as `fold`.
    """
    if target.gate is None:
        yield target
        return
    with tempfile.TemporaryDirectory() as folder:
        one = Path(folder) / ADAPTER
        fold(str(target.adapter), one, task=target.task)
        yield dataclasses.replace(target, adapter=one, gate=None, task=None)


def read_member(folder: Path) -> Member:
    """One adapter's files. Raises: RequestError for what can't be read, or is no plain LoRA."""
    config, tensors = read_config(folder), read_tensors(folder)
    pairs = factors(tensors, str(folder))
    ends = {name: next(ends for ends in FACTOR_NAMES if name + ends[0] in tensors) for name in pairs}
    whole = {
        key: tensor for key, tensor in tensors.items() if not any(key.endswith(end) for e in FACTOR_NAMES for end in e)
    }
    saved = config.modules_to_save or []
    strange = [key for key in whole if not any(f".{name}." in f".{key}" for name in saved)]
    if config.use_dora or strange:
        more = "use_dora" if config.use_dora else strange[0]
        raise RequestError(f"'{folder}' can't be folded: it is more than plain LoRA and heads ({more})")
    fields = json.loads((folder / peft_format.CONFIG_FILE).read_text(encoding="utf-8"))
    return Member(config, fields, pairs, ends, whole)


def _check_shapes(members: Mapping[str, Member]) -> None:
    """Raises: RequestError where two adapters are of other layers under one name."""
    seen: dict[str, tuple[str, tuple[int, ...], tuple[int, ...]]] = {}
    for name, member in members.items():
        for layer, (A, B) in member.factors.items():
            shapes = name, tuple(A.shape[1:]), (B.shape[0], *B.shape[2:])
            first = seen.setdefault(layer, shapes)
            if first[1:] != shapes[1:]:
                raise RequestError(
                    f"'{layer}' has other shapes in adapter '{first[0]}' than in '{name}' ({list(first[1])} and "
                    f"{list(shapes[1])} inputs, {first[2][0]} and {shapes[2][0]} outputs): they are of other models"
                )


def _layers(
    members: Mapping[str, Member], shares: Shares, rank: int | None, energy: float | None
) -> dict[str, FoldedLayer]:
    names = dict.fromkeys(layer for member in members.values() for layer in member.factors)
    found: dict[str, FoldedLayer] = {}
    for layer in names:
        parts = []
        for name, member in members.items():
            if layer not in member.factors:
                continue
            A, B = member.factors[layer]
            coefficients = shares.of(name, layer, len(A))
            if len(coefficients) != len(A):
                raise RequestError(
                    f"the vector for '{layer}' has {len(coefficients)} entries, its adapter rank {len(A)}"
                )
            parts.append(Share(A, B, coefficients.double() * member.scale(layer)))
        if any(bool(part.coefficients.any()) for part in parts):  # else no chosen adapter has this layer
            found[layer] = folded_layer(parts, rank, energy)
    if not found:
        raise RequestError("nothing takes part with these shares: the folded adapter would be the base alone")
    return found


def _heads(members: Mapping[str, Member], shares: Shares) -> dict[str, Tensor]:
    """The heads in their shares, as one."""
    found: dict[str, Tensor] = {}
    for name, member in members.items():
        for key, tensor in member.whole.items():
            share = shares.whole_of(name, key.rpartition(".")[0])
            found[key] = found.get(key, torch.zeros_like(tensor, dtype=torch.float64)) + share * tensor.double()
    return {key: tensor.float() for key, tensor in found.items()}


def _write(
    out: Path,
    folder: Path,
    members: Mapping[str, Member],
    layers: Mapping[str, FoldedLayer],
    heads: Mapping[str, Tensor],
) -> None:
    first = next(iter(members.values()))
    tensors = dict(heads)
    ends = {layer: member.ends[layer] for member in members.values() for layer in member.factors}
    for name, layer in layers.items():
        tensors |= {name + ends[name][0]: layer.A, name + ends[name][1]: layer.B}
    heading = next((member for member in members.values() if member.whole), first)
    config = first.config.with_(
        **_targets(members, layers), use_rslora=False, rank_pattern={}, alpha_pattern={},
        modules_to_save=heading.config.modules_to_save, task_type=heading.config.task_type,
    )  # fmt: skip
    config = with_ranks(config, {name: layer.rank for name, layer in layers.items()}, dict.fromkeys(layers, 1.0))
    beside = {key: first.fields[key] for key in ("fan_in_fan_out", "auto_mapping") if key in first.fields}
    fields = {**peft_format.config_to_peft(config), **beside}
    with replacing_folder(out) as temporary:
        write_adapter(temporary, fields, tensors, {HEAD_FILE: read_head(folder)})


def _targets(members: Mapping[str, Member], layers: Mapping[str, FoldedLayer]) -> dict[str, Any]:
    """The settings that select the folded layers: those of all adapters where they agree, else full names."""
    chosen = [{key: getattr(member.config, key) for key in TARGETS} for member in members.values()]
    every = {layer for member in members.values() for layer in member.factors}
    if all(choice == chosen[0] for choice in chosen) and every == set(layers):
        return chosen[0]
    return {**dict.fromkeys(TARGETS), "target_modules": sorted(layers)}
