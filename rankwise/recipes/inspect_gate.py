"""Inspect a gate's folder: each adapter in it, the shares that were learned, the tasks' vectors, the classifier."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from rankwise.adapters.mixture import Mixture
from rankwise.attach.checkpoint import read_config, read_tensors
from rankwise.attach.gate_folder import GateFolder, is_gate_folder, read_gate_folder, read_tables
from rankwise.errors import RequestError
from rankwise.recipes.inspect import factors, inspect_adapter, is_trained, report
from rankwise.recipes.output import RUN_FILE
from rankwise.recipes.rank_map import check_picture, draw_map, rank_map, vllm_max_lora_rank
from rankwise.tasks.folding import shares_of
from rankwise.train.state import ADAPTER


def inspect_adapters(name: str, picture: Path | None = None) -> dict[str, Any]:
    """The document of `rankwise inspect`: of one adapter (`inspect_adapter`), or of several under a gate.

    Raises: RequestError for a folder that is neither, or whose files are broken.
    """
    folder = Path(name).expanduser()
    folder = folder / ADAPTER if (folder / RUN_FILE).is_file() else folder
    if not is_gate_folder(folder):
        return inspect_adapter(name, picture)
    if picture is not None:
        check_picture(picture)
    return inspect_gate(name, folder, picture)


def inspect_gate(name: str, folder: Path, picture: Path | None) -> dict[str, Any]:
    """The document of `rankwise inspect` for several adapters: the fields of one, those of all adapters together.

    `modules` have the `adapter` that they are of, and `ranks` are the sums over adapters. `mode`, `tasks`, `adapters`
    (by name: ranks, parameters, norm), `shares` (by group, of learned gates), `vectors` (by task: mean and standard
    deviation of the entries) and `router` come besides.

    Raises: RequestError for a folder that is broken.
    """
    spec, tables = read_gate_folder(folder), read_tables(folder)
    modules: list[dict[str, Any]] = []
    adapters: dict[str, dict[str, Any]] = {}
    ranks: dict[str, int] = {}
    config = read_config(folder / next(iter(spec.adapters)))
    for member, task in spec.adapters.items():
        own_config, tensors = read_config(folder / member), read_tensors(folder / member)
        pairs = factors(tensors, str(folder / member))
        own = [report(own_config, module, A, B) for module, (A, B) in pairs.items()]
        modules += [asdict(module) | {"adapter": member} for module in own]
        for module in own:
            ranks[module.name] = ranks.get(module.name, 0) + module.rank
        adapters[member] = {
            "task": task,
            "max_rank": max(module.rank for module in own),
            "parameters": sum(tensor.numel() for key, tensor in tensors.items() if is_trained(own_config, key)),
            "norm": sum(module.norm**2 for module in own) ** 0.5,
        }
    if picture is not None:
        draw_map(rank_map(ranks), [], picture)
    files = [file for file in folder.rglob("*.safetensors") if file.is_file()]
    return {
        "adapter": name,
        "kind": "gate" if spec.gate is not None else "task-embeddings",
        "mode": None if spec.gate is None else spec.gate.mode,
        "base": config.base_model_name_or_path,
        "tasks": list(spec.tasks),
        "adapters": adapters,
        "shares": _shares(spec, tables, name),
        "vectors": _vectors(spec, tables),
        "router": spec.router,
        "ranks": ranks,
        "trainable_parameters": sum(entry["parameters"] for entry in adapters.values())
        + sum(tensor.numel() for key, tensor in tables.items() if not key.startswith("router/")),
        "file_bytes": sum(file.stat().st_size for file in files),
        "vllm_max_lora_rank": vllm_max_lora_rank(max(entry["max_rank"] for entry in adapters.values())),
        "modules": modules,
        "history": [],
        "picture": None if picture is None else str(picture),
    }


def _shares(spec: GateFolder, tables: dict[str, torch.Tensor], where: str) -> dict[str, dict[str, float]]:
    if spec.gate is None or not any(key.startswith("logits/") for key in tables):
        return {}
    found = shares_of(spec, tables, where, None).mixture
    assert isinstance(found, Mixture)
    with torch.no_grad():
        return {
            group: dict(zip(spec.tasks, found.shares(place).tolist(), strict=True))
            for place, group in enumerate(found.groups)
        }


def _vectors(spec: GateFolder, tables: dict[str, torch.Tensor]) -> dict[str, dict[str, float]]:
    found: dict[str, dict[str, float]] = {}
    for task in spec.tasks if spec.embedding is not None else ():
        parts = [t for key, t in tables.items() if key == f"vectors/{task}" or key.startswith(f"vectors/{task}/")]
        if not parts:
            raise RequestError(f"the folder lacks the vector of task '{task}'")
        entries = torch.cat([part.double() for part in parts])
        found[task] = {"mean": float(entries.mean()), "deviation": float(entries.std(correction=0))}
    return found
