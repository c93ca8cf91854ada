"""Ranks before training: what `ranks:` says, as the configuration of the adapter that is attached."""

from __future__ import annotations

from collections.abc import Mapping

from torch import nn

from rankwise.adapters.config import LoraConfig
from rankwise.attach.targets import alpha_in, find_targets, with_task_heads
from rankwise.errors import RequestError
from rankwise.ranks.config import RanksConfig
from rankwise.ranks.layered import fit_to_budget, planned, ramp
from rankwise.ranks.sizes import AdapterSizes, measure_sizes
from rankwise.say import Say


def with_layered_ranks(model: nn.Module, config: LoraConfig, ranks: RanksConfig, say: Say) -> LoraConfig:
    """`config` with the ranks that `ranks` (policy `layered`) gives the layers of a plain model, which stays as it was.

    Raises: RequestError for a plan that fits no layer, or a budget that can't be met.
    """
    names = [target.name for target in find_targets(model, with_task_heads(config))]
    if ranks.plan is not None:
        wanted = planned(names, ranks.plan, config.r, say)
        kept = {name: rank for name, rank in wanted.items() if rank}
        if len(kept) < len(names):
            config = without_layers(config, list(kept))
        if ranks.budget is None:
            return with_ranks(config, kept, ranks.alpha)
        weights: Mapping[str, float] = kept
    elif ranks.depth is not None and ranks.budget is None:
        low = ranks.min or max(1, config.r // 2)
        high = ranks.max or max(low, 2 * config.r - low)
        if low > high:
            raise RequestError(f"ranks.min ({low}) is above {high}, the highest rank of the ramp; give ranks.max")
        found = {name: int(rank + 0.5) for name, rank in ramp(names, ranks.depth, low, high).items()}
        return with_ranks(config, found, ranks.alpha)
    elif ranks.depth is not None:
        weights = ramp(names, ranks.depth, ranks.min or 1, ranks.max or 3 * (ranks.min or 1))
    else:
        weights = dict.fromkeys(names, 1.0)
    sizes = measure_sizes(model, config)
    least, most = bounds(sizes, ranks)
    budget = ranks.most_parameters
    assert budget is not None
    found = fit_to_budget(weights, least, most, lambda r: sizes.total(r, budget), budget.amount)
    say_budget(found, sizes, ranks, say)
    return with_ranks(config, found, ranks.alpha)


def bounds(sizes: AdapterSizes, ranks: RanksConfig) -> tuple[dict[str, int], dict[str, int]]:
    """The least and the highest rank of each layer: `min`, `max`, and what its weight can have."""
    least = {name: min(ranks.min or 1, most) for name, most in sizes.most.items()}
    return least, {name: min(ranks.max or most, most) for name, most in sizes.most.items()}


def say_budget(found: Mapping[str, int], sizes: AdapterSizes, ranks: RanksConfig, say: Say) -> None:
    """One line: what of the budget is used."""
    budget = ranks.most_parameters
    assert budget is not None
    unit = "bytes of weights" if budget.in_bytes else "trainable parameters"
    say(f"ranks     {ranks.policy}: {sizes.total(found, budget):,} of {budget.amount:,} {unit}")


def without_layers(config: LoraConfig, kept: list[str]) -> LoraConfig:
    """`config` for the layers `kept` and no others."""
    return config.with_(target_modules=kept, exclude_modules=None, layers_to_transform=None, layers_pattern=None)


def with_ranks(config: LoraConfig, ranks: Mapping[str, int], alpha: str | None) -> LoraConfig:
    """`config` in which each layer has its rank; with `alpha: scale` its alpha goes with the rank.

    Patterns hold what differs from `r` and `lora_alpha` only.
    """
    alphas: dict[str, int | float] = dict(config.alpha_pattern)
    if alpha == "scale":
        alphas = {name: alpha_in(config, name) * rank / config.r for name, rank in ranks.items()}
        alphas = {name: value for name, value in alphas.items() if value != config.lora_alpha}
    return config.with_(
        rank_pattern={name: rank for name, rank in ranks.items() if rank != config.r}, alpha_pattern=alphas
    )
