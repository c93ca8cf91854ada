"""Inspect: what an adapter folder holds, from its two files alone; the base is never loaded.

`effective_rank` and `norm` (Frobenius) are of the scaled update s B A, by its factors (`rankwise.adapters.factored`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from rankwise.adapters.config import LoraConfig
from rankwise.adapters.factored import effective_rank, singular_values
from rankwise.adapters.low_rank import scale_of
from rankwise.attach.checkpoint import read_config, read_tensors
from rankwise.attach.peft_format import EMBEDDING_NAMES, WEIGHTS_FILE
from rankwise.attach.targets import alpha_in
from rankwise.errors import RequestError
from rankwise.recipes.output import RUN_FILE
from rankwise.recipes.rank_map import check_picture, draw_map, rank_history, rank_map, vllm_max_lora_rank
from rankwise.train.state import ADAPTER

FACTOR_NAMES = ((".lora_A.weight", ".lora_B.weight"), (".lora_embedding_A", ".lora_embedding_B"))
"""Ends of PEFT's names of A and B: linear and convolution layers, embeddings."""


@dataclass(frozen=True)
class ModuleReport:
    """One adapted layer. With DoRA, the update before its magnitudes, which need the base."""

    name: str
    rank: int
    effective_rank: float
    norm: float


def inspect_adapter(name: str, picture: Path | None = None) -> dict[str, Any]:
    """The document of `rankwise inspect` for an adapter folder, or the adapter of a run folder.

    `picture`: a PNG or SVG to draw the rank map into, with its history where a run's ranks moved.

    Raises: RequestError for a folder that is neither, or whose files are broken.
    """
    folder = Path(name).expanduser()
    if picture is not None:
        check_picture(picture)
    history: list[dict[str, Any]] = []
    if (folder / RUN_FILE).is_file():
        history = rank_history(folder)
        folder = folder / ADAPTER
    config, tensors = read_config(folder), read_tensors(folder)
    modules = [report(config, module, A, B) for module, (A, B) in factors(tensors, str(folder)).items()]
    ranks = {module.name: module.rank for module in modules}
    if picture is not None:
        draw_map(rank_map(ranks), history, picture)
    trained = [tensor for key, tensor in tensors.items() if is_trained(config, key)]
    return {
        "adapter": name,
        "kind": "dora" if config.use_dora else config.kind,
        "base": config.base_model_name_or_path,
        "ranks": ranks,
        "trainable_parameters": sum(tensor.numel() for tensor in trained),
        "file_bytes": (folder / WEIGHTS_FILE).stat().st_size,
        "lora_alpha": config.lora_alpha,
        "use_rslora": config.use_rslora,
        "vllm_max_lora_rank": vllm_max_lora_rank(max(ranks.values())),
        "modules": [asdict(module) for module in modules],
        "history": history,
        "picture": None if picture is None else str(picture),
    }


def is_trained(config: LoraConfig, key: str) -> bool:
    """Whether a tensor of the file was trained: all but the embeddings that are only saved along with the adapter."""
    if key.endswith(".base_layer.weight"):
        return False
    module = key.removesuffix(".weight")
    saved = any(module.endswith(name) for name in config.modules_to_save or ())
    return saved or not (key.endswith(".weight") and module.rsplit(".", 1)[-1] in EMBEDDING_NAMES)


def factors(tensors: Mapping[str, Tensor], where: str) -> dict[str, tuple[Tensor, Tensor]]:
    """A and B of each layer, by the layer's name, in the order of the names.

    Raises: RequestError when one of a pair is missing, or there is none at all.
    """
    found: dict[str, tuple[Tensor, Tensor]] = {}
    for key in sorted(tensors):
        for end_a, end_b in FACTOR_NAMES:
            if key.endswith(end_a):
                module = key.removesuffix(end_a)
                if module + end_b not in tensors:
                    raise RequestError(f"'{where}' has '{key}' without its '{end_b.lstrip('.')}'")
                found[module] = (tensors[key], tensors[module + end_b])
            if key.endswith(end_b) and key.removesuffix(end_b) + end_a not in tensors:
                raise RequestError(f"'{where}' has '{key}' without its '{end_a.lstrip('.')}'")
    if not found:
        raise RequestError(f"'{where}' holds no low-rank factors")
    return found


def report(config: LoraConfig, module: str, A: Tensor, B: Tensor) -> ModuleReport:
    """Rank, effective rank and norm of one layer's scaled update."""
    rank = A.shape[0]
    values = singular_values(A.flatten(1), B.flatten(1)) * scale_of(alpha_in(config, module), rank, config.use_rslora)
    return ModuleReport(module, rank, effective_rank(values), float(values.square().sum().sqrt()))
