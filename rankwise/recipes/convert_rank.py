"""Convert-rank: an adapter folder compressed to lower ranks, from its files alone; the base is never loaded.

By `svd` each layer becomes the best approximation of its update. By `prefix`, for an adapter that was trained nested
(`ranks.policy: nested`), it keeps the first rows of A and columns of B: the adapter that was trained at this rank.

All layers get the scale s of the one with the highest rank; where another one's was different, B takes the ratio up. So
the configuration's `r`, the highest rank, and `lora_alpha` give every layer's scale: a reader that knows no patterns,
such as vLLM, scales rightly. What is not low-rank (magnitudes, biases, whole modules) is copied.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from rankwise.adapters.config import LoraConfig, start_name
from rankwise.adapters.factored import prefix, rank_for_energy, relative_error, singular_values, truncated
from rankwise.adapters.low_rank import scale_of
from rankwise.adapters.starts import TAKEN_FROM_BASE
from rankwise.attach import peft_format
from rankwise.attach.checkpoint import HEAD_FILE, NESTED_FILE, read_config, read_head, read_nested, read_tensors
from rankwise.attach.targets import alpha_in
from rankwise.errors import RequestError, did_you_mean
from rankwise.files import check_new_folder, replacing_folder
from rankwise.recipes.adapter_files import write_adapter
from rankwise.recipes.inspect import FACTOR_NAMES, factors
from rankwise.recipes.rank_map import vllm_max_lora_rank
from rankwise.recipes.target import adapter_folder

AUTO, SVD, PREFIX = "auto", "svd", "prefix"
METHODS = (AUTO, SVD, PREFIX)


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


def convert_rank(
    adapter: str, out: str, rank: int | None = None, energy: float | None = None, method: str = AUTO
) -> dict[str, Any]:
    """The document of `rankwise convert-rank`: `output`, `error`, `method`, `modules` and figures.

    Args:
        adapter: an adapter folder, or a run folder.
        out: the folder to write.
        rank: of every layer that has a higher one; or else
        energy: the share of each layer's squared singular values that must stay, above 0 and at most 1.
        method: `svd`, `prefix`, or `auto`: prefix for a nested adapter and a rank that it was trained for.

    Raises: RequestError for a folder that exists, an adapter that can't be read or has nothing to compress, both or
        none of `rank` and `energy`, or `prefix` where it is not to be had.
    """
    _check_request(out, rank, energy)
    folder = adapter_folder(adapter)
    config, tensors = read_config(folder), read_tensors(folder)
    if start_name(config.init_lora_weights) in TAKEN_FROM_BASE:
        raise RequestError(
            f"'{adapter}' was saved with init_lora_weights={config.init_lora_weights!r}: its factors count from a "
            "base that was changed by them, and are no update; save it from PEFT with "
            "path_initial_model_for_weight_conversion"
        )
    pairs = factors(tensors, str(folder))
    _check_lower(rank, {name: A.shape[0] for name, (A, _) in pairs.items()}, adapter)
    nested = read_nested(folder)
    chosen = _method(method, adapter, nested, rank)
    found: dict[str, tuple[Converted, Tensor, Tensor]] = {}
    for name, (A, B) in pairs.items():
        values = singular_values(A.flatten(1), B.flatten(1))
        found[name] = _convert(config, name, A, B, rank or rank_for_energy(values, energy or 1.0), chosen)
    modules = [converted for converted, _, _ in found.values()]
    scale = max(modules, key=lambda module: module.rank).scale
    for name, (converted, A, B) in found.items():
        end_a, end_b = next(ends for ends in FACTOR_NAMES if name + ends[0] in tensors)
        one_scale = B if converted.scale == scale else (B.double() * (converted.scale / scale)).to(B.dtype)
        tensors[name + end_a], tensors[name + end_b] = A, one_scale
    _write(
        Path(out), folder, tensors, _patterns(modules, scale, config.use_rslora), nested if chosen == PREFIX else None
    )
    return _document(out, chosen, modules, tensors)


def _method(method: str, adapter: str, nested: dict[str, Any] | None, rank: int | None) -> str:
    """`svd` or `prefix`. Raises: RequestError where prefix was asked for and can't be had."""
    if method not in METHODS:
        raise RequestError(f"--method can't be '{method}'{did_you_mean(method, METHODS)}")
    if method == PREFIX and nested is None:
        raise RequestError(
            f"--method prefix is for adapters trained with ranks.policy: nested, which '{adapter}' was not; use svd"
        )
    if method == PREFIX and rank is None:
        raise RequestError("--method prefix takes --rank: prefixes have no energy of their own")
    if method == PREFIX and nested is not None and rank is not None and rank < nested["least"]:
        raise RequestError(
            f"--rank {rank} is below {nested['least']}, the least that '{adapter}' was trained for; ask for more, or "
            "use --method svd"
        )
    trained = nested is not None and rank is not None and rank >= nested["least"]
    return (PREFIX if trained else SVD) if method == AUTO else method


def _check_request(out: str, rank: int | None, energy: float | None) -> None:
    if (rank is None) == (energy is None):
        raise RequestError(
            "give --rank or --energy, one of them: the rank of each layer, or the share of it that stays"
        )
    if energy is not None and not 0 < energy <= 1:
        raise RequestError(f"--energy must be above 0 and at most 1, not {energy:g}; 0.99 keeps nearly everything")
    if rank is not None and rank < 1:
        raise RequestError(f"--rank must be a whole number from 1, not {rank}")
    check_new_folder(out)


def _check_lower(rank: int | None, ranks: dict[str, int], adapter: str) -> None:
    highest = max(ranks.values())
    if rank is not None and rank >= highest:
        raise RequestError(
            f"--rank {rank} has no effect: no layer of '{adapter}' has a rank above it (the highest is {highest}); "
            "ask for less"
        )


def _convert(
    config: LoraConfig, name: str, A: Tensor, B: Tensor, rank: int, method: str
) -> tuple[Converted, Tensor, Tensor]:
    """The layer at `rank`, in the shapes and dtypes that it has; as it is where that is no less than its own."""
    before = A.shape[0]
    alpha = alpha_in(config, name)
    scale = scale_of(alpha, before, config.use_rslora)
    squared = scale**2
    if rank >= before:
        whole = float(singular_values(A.flatten(1), B.flatten(1)).square().sum())
        return Converted(name, before, before, scale, 0.0, whole * squared), A, B
    if method == PREFIX:
        scale = scale_of(alpha, rank, config.use_rslora)  # the rule of the training: alpha stays
        found = prefix(A.flatten(1), B.flatten(1), rank, scale / squared**0.5)
    else:
        found = truncated(A.flatten(1), B.flatten(1), rank)
    converted = Converted(name, before, rank, scale, found.lost * squared, found.whole * squared)
    new_A = found.A.reshape(rank, *A.shape[1:]).to(A.dtype).contiguous()
    new_B = found.B.reshape(B.shape[0], rank, *B.shape[2:]).to(B.dtype).contiguous()
    return converted, new_A, new_B


def _patterns(modules: list[Converted], scale: float, use_rslora: bool) -> dict[str, Any]:
    """The configuration's `r` and `lora_alpha`, of the highest rank, and patterns for the layers of lower ones."""
    most = max(module.rank for module in modules)
    lower = {f"^{module.name}": module.rank for module in modules if module.rank != most}
    return {
        "r": most,
        "lora_alpha": _alpha(scale, most, use_rslora),
        "rank_pattern": lower,
        "alpha_pattern": {name: _alpha(scale, rank, use_rslora) for name, rank in lower.items()},
    }


def _alpha(scale: float, rank: int, use_rslora: bool) -> int | float:
    alpha = scale * (rank**0.5 if use_rslora else rank)
    nearest = round(alpha)
    return nearest if nearest and abs(alpha - nearest) <= 1e-12 * alpha else alpha


def _write(
    out: Path, folder: Path, tensors: dict[str, Tensor], patterns: dict[str, Any], nested: dict[str, Any] | None
) -> None:
    """PEFT's folder: the configuration is the old one's, field for field, but for the ranks and alphas."""
    fields = json.loads((folder / peft_format.CONFIG_FILE).read_text(encoding="utf-8"))
    if nested is not None:
        nested = {**nested, "most": patterns["r"]}
    with replacing_folder(out) as temporary:
        write_adapter(
            temporary, {**fields, **patterns}, tensors, {HEAD_FILE: read_head(folder), NESTED_FILE: nested}
        )  # fmt: skip


def _document(out: str, method: str, modules: list[Converted], tensors: dict[str, Tensor]) -> dict[str, Any]:
    lost, whole = sum(module.lost for module in modules), sum(module.whole for module in modules)
    rows = [asdict(module) | {"error": module.error} for module in modules]
    most = max(module.rank for module in modules)
    return {
        "output": out,
        "error": relative_error(lost, whole),
        "method": method,
        "max_rank": most,
        "vllm_max_lora_rank": vllm_max_lora_rank(most),
        "parameters": sum(tensor.numel() for tensor in tensors.values()),
        "file_bytes": (Path(out) / peft_format.WEIGHTS_FILE).stat().st_size,
        "modules": [{key: row[key] for key in ("name", "before", "rank", "error")} for row in rows],
    }
