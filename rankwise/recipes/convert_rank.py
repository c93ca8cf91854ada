"""Convert-rank: an adapter folder compressed to lower ranks, from its two files alone; the base is never loaded.

Layers keep their scale s: alpha falls with the rank. So where all layers had one scale they still have it, and the
configuration's `r` and `lora_alpha` (`r` being the highest rank) give it too: a reader that knows no patterns, such as
vLLM, scales every layer rightly. What is not low-rank (magnitudes, biases, whole modules) is copied.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from safetensors.torch import save
from torch import Tensor

from rankwise.adapters.config import LoraConfig, start_name
from rankwise.adapters.low_rank import scale_of
from rankwise.adapters.starts import TAKEN_FROM_BASE
from rankwise.attach import peft_format
from rankwise.attach.checkpoint import HEAD_FILE, read_config, read_head, read_tensors
from rankwise.attach.targets import alpha_in
from rankwise.errors import RequestError
from rankwise.files import obstacle, replacing_folder
from rankwise.ranks.factored import rank_for_energy, relative_error, singular_values, truncated
from rankwise.recipes.inspect import FACTOR_NAMES, factors
from rankwise.recipes.output import RUN_FILE
from rankwise.train.state import ADAPTER

VLLM_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
"""What vLLM's `max_lora_rank` can be (vllm.config.lora, 0.14): one number for all layers of all adapters."""


@dataclass(frozen=True)
class Converted:
    """One layer: its ranks before and after, its scale, and the squared norms of what is lost and of all there was."""

    name: str
    before: int
    rank: int
    scale: float
    lost: float
    whole: float

    @property
    def error(self) -> float:
        """Relative Frobenius error of the layer's update."""
        return relative_error(self.lost, self.whole)


def convert_rank(adapter: str, out: str, rank: int | None = None, energy: float | None = None) -> dict[str, Any]:
    """The document of `rankwise convert-rank`: `output`, `error`, `modules` and figures.

    Args:
        adapter: an adapter folder, or a run folder.
        out: the folder to write.
        rank: of every layer that has a higher one; or else
        energy: the share of each layer's squared singular values that must stay, above 0 and at most 1.

    Raises: RequestError for a folder that exists, an adapter that can't be read or has nothing to compress, or both or
        none of `rank` and `energy`.
    """
    _check_request(out, rank, energy)
    folder = Path(adapter).expanduser()
    if (folder / RUN_FILE).is_file():
        folder = folder / ADAPTER
    config, tensors = read_config(folder), read_tensors(folder)
    if start_name(config.init_lora_weights) in TAKEN_FROM_BASE:
        raise RequestError(
            f"'{adapter}' was saved with init_lora_weights={config.init_lora_weights!r}: its factors count from a "
            "base that was changed by them, and are no update; save it from PEFT with "
            "path_initial_model_for_weight_conversion"
        )
    pairs = factors(tensors, str(folder))
    _check_lower(rank, {name: A.shape[0] for name, (A, _) in pairs.items()}, adapter)
    modules = []
    for name, (A, B) in pairs.items():
        values = singular_values(A.flatten(1), B.flatten(1))
        converted, new_A, new_B = _convert(config, name, A, B, rank or rank_for_energy(values, energy or 1.0))
        modules.append(converted)
        end_a, end_b = next(ends for ends in FACTOR_NAMES if name + ends[0] in tensors)
        tensors[name + end_a], tensors[name + end_b] = new_A, new_B
    _write(Path(out), folder, tensors, modules, config.use_rslora)
    return _document(out, modules, tensors)


def _check_request(out: str, rank: int | None, energy: float | None) -> None:
    if (rank is None) == (energy is None):
        raise RequestError(
            "give --rank or --energy, one of them: the rank of each layer, or the share of it that stays"
        )
    if energy is not None and not 0 < energy <= 1:
        raise RequestError(f"--energy must be above 0 and at most 1, not {energy:g}; 0.99 keeps nearly everything")
    if rank is not None and rank < 1:
        raise RequestError(f"--rank must be a whole number from 1, not {rank}")
    if Path(out).exists():
        raise RequestError(f"output folder '{out}' exists; choose another, or remove it")
    if (found := obstacle(out)) is not None:
        raise RequestError(f"output folder '{out}' can't be made: {found}; choose another")


def _check_lower(rank: int | None, ranks: dict[str, int], adapter: str) -> None:
    highest = max(ranks.values())
    if rank is not None and rank >= highest:
        raise RequestError(
            f"--rank {rank} has no effect: no layer of '{adapter}' has a rank above it (the highest is {highest}); "
            "ask for less"
        )


def _convert(config: LoraConfig, name: str, A: Tensor, B: Tensor, rank: int) -> tuple[Converted, Tensor, Tensor]:
    """The layer at `rank`, in the shapes and dtypes that it has; as it is where that is no less than its own."""
    before = A.shape[0]
    scale = scale_of(alpha_in(config, name), before, config.use_rslora)
    squared = scale**2
    if rank >= before:
        whole = float(singular_values(A.flatten(1), B.flatten(1)).square().sum())
        return Converted(name, before, before, scale, 0.0, whole * squared), A, B
    found = truncated(A.flatten(1), B.flatten(1), rank)
    converted = Converted(name, before, rank, scale, found.lost * squared, found.whole * squared)
    new_A = found.A.reshape(rank, *A.shape[1:]).to(A.dtype).contiguous()
    new_B = found.B.reshape(B.shape[0], rank, *B.shape[2:]).to(B.dtype).contiguous()
    return converted, new_A, new_B


def _patterns(modules: list[Converted], use_rslora: bool) -> dict[str, Any]:
    """The configuration's `r`, `lora_alpha` and patterns: those of the layer of highest rank, and what differs."""
    most = max(modules, key=lambda module: module.rank)
    alphas = {module.name: _alpha(module, use_rslora) for module in modules}
    return {
        "r": most.rank,
        "lora_alpha": alphas[most.name],
        "rank_pattern": {f"^{module.name}": module.rank for module in modules if module.rank != most.rank},
        "alpha_pattern": {f"^{name}": alpha for name, alpha in alphas.items() if alpha != alphas[most.name]},
    }


def _alpha(module: Converted, use_rslora: bool) -> int | float:
    alpha = module.scale * (module.rank**0.5 if use_rslora else module.rank)
    nearest = round(alpha)
    return nearest if nearest and abs(alpha - nearest) <= 1e-12 * alpha else alpha


def _write(out: Path, folder: Path, tensors: dict[str, Tensor], modules: list[Converted], use_rslora: bool) -> None:
    """PEFT's folder: the configuration is the old one's, field for field, but for the ranks and alphas."""
    fields = json.loads((folder / peft_format.CONFIG_FILE).read_text(encoding="utf-8"))
    fields.update(_patterns(modules, use_rslora))
    head = read_head(folder)
    with replacing_folder(out) as temporary:
        weights = save(peft_format.to_file(tensors), metadata={"format": "pt"})
        (temporary / peft_format.WEIGHTS_FILE).write_bytes(weights)
        text = json.dumps(fields, indent=2, sort_keys=True)
        (temporary / peft_format.CONFIG_FILE).write_text(text, encoding="utf-8")
        if head is not None:
            text = json.dumps(head, indent=2, ensure_ascii=False)
            (temporary / HEAD_FILE).write_text(text, encoding="utf-8")


def _document(out: str, modules: list[Converted], tensors: dict[str, Tensor]) -> dict[str, Any]:
    lost, whole = sum(module.lost for module in modules), sum(module.whole for module in modules)
    rows = [asdict(module) | {"error": module.error} for module in modules]
    most = max(module.rank for module in modules)
    return {
        "output": out,
        "error": relative_error(lost, whole),
        "max_rank": most,
        "vllm_max_lora_rank": next((allowed for allowed in VLLM_RANKS if allowed >= most), None),
        "parameters": sum(tensor.numel() for tensor in tensors.values()),
        "file_bytes": (Path(out) / peft_format.WEIGHTS_FILE).stat().st_size,
        "modules": [{key: row[key] for key in ("name", "before", "rank", "error")} for row in rows],
    }
