"""Combine: several adapters of one base made into one, in PEFT's folder; weights searched, and what each task loses."""

from __future__ import annotations

import contextlib
import json
import math
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from rankwise.attach import peft_format
from rankwise.attach.checkpoint import HEAD_FILE
from rankwise.errors import RequestError, did_you_mean
from rankwise.files import check_new_folder, replacing_folder
from rankwise.recipes.adapter_files import write_adapter
from rankwise.recipes.combine_layers import Combination, Recipe, combination, off
from rankwise.recipes.combine_losses import DEFAULT_TRIALS, Bench, Tuned, tuned
from rankwise.recipes.combine_sources import Source, check_together, read_source
from rankwise.recipes.names import PROVENANCE_FILE
from rankwise.recipes.provenance import adapter_hashes, source_commit, versions
from rankwise.recipes.rank_map import vllm_max_lora_rank
from rankwise.tasks.methods import DEFAULT_DENSITY, METHODS

DEFAULT_METHOD = "sum"
DEFAULT_SEED = 0


@dataclass(frozen=True)
class CombineConfig:
    """What a combination can be told beside its adapters, method and weights.

    Args:
        rank: of every layer of the result (`svd`); or else
        energy: the share of each layer's squared singular values that stays.
        density: the share of entries that stays, for methods that prune; not given: 0.5.
        seed: of which entries stay, for methods that draw them; not given: 0.
        base: the base of all of them, where they name none, or one model under several names.
        tune: a data file whose loss the weights are searched on, beginning with those given.
        trials: how many weights are tried at most; not given: 40.
        tasks: data files by the name of their task: each adapter and the result are measured on them. Empty: on the
            valid files of the runs.
        batch_size, device, precision: of measuring.
        progress: whether bars are shown on stderr.
    """

    rank: int | None = None
    energy: float | None = None
    density: float | None = None
    seed: int | None = None
    base: str | None = None
    tune: str | None = None
    trials: int | None = None
    tasks: Mapping[str, str] | None = None
    batch_size: int = 16
    device: str = "auto"
    precision: str = "auto"
    progress: bool = False


def combine(
    adapters: Sequence[str | Path],
    out: str | Path,
    method: str = DEFAULT_METHOD,
    weights: Sequence[float] | None = None,
    config: CombineConfig | None = None,
) -> dict[str, Any]:
    """Makes one adapter of several of the same base, in a PEFT folder; returns what `rankwise combine --json` prints.

    Args:
        adapters: two or more adapter folders or run folders; they may adapt different layers at different ranks.
        out: the folder to write.
        method: a key of `METHODS` (docs/combine.md).
        weights: one for each adapter, negative ones too; not given: equal ones that add up to 1, or 1 for each where
            the method takes means.
        config: everything else.

    `error` is the relative Frobenius error against the weighted sum of the updates.

    Raises: RequestError for an output folder that exists, adapters that can't be read or don't go together, or a
        setting that has no effect.
    """
    config, names, out = config or CombineConfig(), [str(name) for name in adapters], str(out)
    chosen = _weights(method, names, weights)
    recipe = _recipe(method, config)
    check_new_folder(out)
    sources = [read_source(name) for name in names]
    check_together(sources, config.base)
    if "rank" in METHODS[method].takes and recipe.rank is None and recipe.energy is None:
        recipe = replace(recipe, rank=max(layer.A.shape[0] for s in sources for layer in s.layers.values()))
    bench = None
    if config.tune is not None or config.tasks is not None:
        bench = Bench(sources, config.base, config.device, config.precision, config.batch_size, config.progress)
    tasks = None if bench is None or config.tasks is None else bench.read_tasks(config.tasks)
    found: Tuned | None = None
    if config.tune is not None:
        assert bench is not None
        found = tuned(bench, config.tune, sources, recipe, chosen, config.trials or DEFAULT_TRIALS)
        chosen = found.weights
    made = combination(sources, chosen, recipe, config.base)
    _check_rank(config.rank, max(module.rank for module in made.modules))
    notes = [*made.notes]
    if method == "linear":
        notes.append(
            f"linear adds the factors, and that is {made.error:.0%} off the sum of the updates; see sum, cat, svd"
        )
    for note in notes:
        print(f"note: {note}", file=sys.stderr)
    document: dict[str, Any] = {
        "output": out, "error": made.error, "method": method, "weights": list(chosen), "adapters": names,
        **{name: value for name, value in asdict(recipe).items() if name != "method"}, "notes": notes,
        "tune": None if found is None else asdict(found),
    }  # fmt: skip
    with written(Path(out), made, sources, document) as folder:
        if bench is not None and tasks is not None:
            document["tasks"] = bench.report(tasks, folder)
    return document | _figures(Path(out), made)


@contextlib.contextmanager
def written(out: Path, made: Combination, sources: Sequence[Source], document: Mapping[str, Any]) -> Iterator[Path]:
    """The folder under a temporary name, to be measured in the block; in its place, with provenance, after it."""
    with replacing_folder(out) as temporary:
        write_adapter(temporary, made.fields, made.tensors, {HEAD_FILE: sources[0].head})
        yield temporary
        record = {
            "versions": versions(),
            "commit": source_commit(),
            "base": next((source.base for source in sources if source.base), None),
            "combined": {
                "sources": [
                    {"folder": str(s.folder.absolute()), "weight": weight, "files": adapter_hashes(s.folder)}
                    for s, weight in zip(sources, document["weights"], strict=True)
                ],
                **{name: document[name] for name in ("method", "rank", "energy", "density", "seed", "error", "tune")},
            },
        }
        text = json.dumps(record, indent=2, ensure_ascii=False) + "\n"
        (temporary / PROVENANCE_FILE).write_text(text, encoding="utf-8")


def _figures(out: Path, made: Combination) -> dict[str, Any]:
    most = max(module.rank for module in made.modules)
    return {
        "max_rank": most,
        "vllm_max_lora_rank": vllm_max_lora_rank(most),
        "parameters": sum(tensor.numel() for tensor in made.tensors.values()),
        "file_bytes": (out / peft_format.WEIGHTS_FILE).stat().st_size,
        "modules": [
            {"name": m.name, "ranks": list(m.ranks), "rank": m.rank, "error": off(m.apart, m.whole)}
            for m in made.modules
        ],
    }


# --- the request ---------------------------------------------------------------------------------------------------


def _weights(method: str, names: Sequence[str], weights: Sequence[float] | None) -> tuple[float, ...]:
    if method not in METHODS:
        raise RequestError(f"--method can't be '{method}'{did_you_mean(method, METHODS)}")
    if len(names) < 2:
        raise RequestError(
            f"combine takes two adapters or more, not {len(names)}; to make one smaller, use `rankwise convert-rank`"
        )
    if weights is None:
        return (1.0 if METHODS[method].is_mean else 1 / len(names),) * len(names)
    if len(weights) != len(names):
        raise RequestError(
            f"--weights are {len(weights)} ({' '.join(f'{weight:g}' for weight in weights)}) for {len(names)} "
            "adapters; give one for each, in their order"
        )
    broken = next((weight for weight in weights if not math.isfinite(weight)), None)
    if broken is not None:
        raise RequestError(f"--weights must be finite numbers, not {broken}")
    return tuple(float(weight) for weight in weights)


def _recipe(method: str, config: CombineConfig) -> Recipe:
    """Raises: RequestError for a value out of range, and for one that the method, or the request, has no use for."""
    takes = METHODS[method].takes
    for name in ("rank", "energy", "density", "seed"):
        if getattr(config, name) is not None and name not in takes:
            able = ", ".join(other for other, entry in METHODS.items() if name in entry.takes)
            raise RequestError(
                f"--{name} {getattr(config, name):g} has no effect on --method {method}; leave it out, or use {able}"
            )
    if config.trials is not None and config.tune is None:
        raise RequestError(f"--trials {config.trials} has no effect without --tune; name a data file, or leave it out")
    if config.rank is not None and config.energy is not None:
        raise RequestError(
            "give --rank or --energy, one of them: the rank of each layer, or the share of it that stays"
        )
    if config.rank is not None and config.rank < 1:
        raise RequestError(f"--rank must be a whole number from 1, not {config.rank}")
    if config.trials is not None and config.trials < 1:
        raise RequestError(f"--trials must be a whole number from 1, not {config.trials}")
    for name, value in (("energy", config.energy), ("density", config.density)):
        if value is not None and not 0 < value <= 1:
            raise RequestError(f"--{name} must be above 0 and at most 1, not {value:g}")
    density = DEFAULT_DENSITY if config.density is None and "density" in takes else config.density
    seed = DEFAULT_SEED if config.seed is None and "seed" in takes else config.seed
    return Recipe(method, config.rank, config.energy, density, seed)


def _check_rank(asked: int | None, most: int) -> None:
    if asked is not None and asked > most:
        raise RequestError(
            f"--rank {asked} has no effect: the sum has a rank of {most} at most; ask for less, or use --method sum"
        )
