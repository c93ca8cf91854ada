"""Ranks and starts from data: a few of the run's own rows go through the model before its adapter is made."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from transformers import PreTrainedModel

from rankwise.adapters.config import DATA_STARTS, LoraConfig, start_name
from rankwise.adapters.low_rank import LowRankLayer
from rankwise.adapters.starts import Directions
from rankwise.attach.inject import adapter_layers, attach, detach, disabled
from rankwise.attach.targets import find_targets, rank_in, with_task_heads
from rankwise.errors import RequestError, counted
from rankwise.ranks.config import DEFAULT_BATCHES, RanksConfig
from rankwise.ranks.layered import check_budget, planned
from rankwise.ranks.sizes import AdapterSizes, measure_sizes
from rankwise.ranks.spectrum import Spectra, Spectrum, share_out
from rankwise.recipes.finetune_data import RunData
from rankwise.recipes.rank_plan import bounds, say_budget, with_layered_ranks, with_ranks
from rankwise.recipes.run import RunConfig
from rankwise.say import Say
from rankwise.train.batches import MicroBatches
from rankwise.train.objective import total_weight, weighted_sum
from rankwise.train.objectives import minimised, objective_of
from rankwise.train.order import RowOrder
from rankwise.train.rng import seed_everything

LEAST_HIGHEST = 8
SPREAD = 4
"""Without `max`, a layer may have so many times the mean rank (and at least LEAST_HIGHEST) under `spectrum`."""
LORA_GA = "lora_ga"


@dataclass(frozen=True)
class Chosen:
    """The adapter to attach: its configuration with all ranks, and directions for a start that needs them."""

    config: LoraConfig
    directions: dict[str, Directions] = field(default_factory=dict)


def choose(
    model: PreTrainedModel, config: LoraConfig, run: RunConfig, data: RunData, say: Say, goes_on: bool
) -> Chosen:
    """What `ranks:` and `init_lora_weights` ask for; the plain model stays as it was.

    A run that `goes_on` from a checkpoint measures nothing: its ranks are in its plan, its factors in the checkpoint.

    Raises: RequestError for a plan that fits no layer, a budget that can't be met, layers that can't be measured.
    """
    if run.ranks.policy == "layered":
        config = with_layered_ranks(model, config, run.ranks, say)
    measures_ranks = run.ranks.policy == "spectrum" and run.ranks.plan is None
    if run.ranks.plan is not None and run.ranks.policy == "spectrum":
        names = [target.name for target in find_targets(model, with_task_heads(config))]
        config = with_ranks(config, planned(names, run.ranks.plan, config.r, say), run.ranks.alpha)
    start = start_name(config.init_lora_weights)
    if start in DATA_STARTS and goes_on:
        return Chosen(config, _blank(measure_sizes(model, config), config))
    if not measures_ranks and start not in DATA_STARTS:
        return Chosen(config)
    sizes = measure_sizes(model, config)
    highest = max(rank_in(config, name) for name in sizes.costs)
    if run.ranks.policy == "spectrum":  # of a run that is repeated too: sketches of another width see other directions
        highest = _highest(sizes, run.ranks)
    found = _measure(model, config, run, data, 2 * highest if start == LORA_GA else highest, say)
    if measures_ranks:
        config = _with_spectral_ranks(config, run.ranks, sizes, found, highest, say)
    seed_everything(run.train.seed)
    return Chosen(config, {name: one.directions for name, one in found.items()} if start in DATA_STARTS else {})


def _highest(sizes: AdapterSizes, ranks: RanksConfig) -> int:
    """The most directions of a layer that are looked at: `max`, or SPREAD times the mean rank."""
    budget = ranks.most_parameters
    assert budget is not None
    one = dict.fromkeys(sizes.costs, 1)
    each = sizes.total(dict.fromkeys(one, 2), budget) - sizes.total(one, budget)
    return ranks.max or max(LEAST_HIGHEST, SPREAD * -(-budget.amount // each))


def _measure(
    model: PreTrainedModel, config: LoraConfig, run: RunConfig, data: RunData, most: int, say: Say
) -> dict[str, Spectrum]:
    """Spectra of all layers, by a fresh adapter of rank one through which gradients flow, which is taken out again."""
    started = time.perf_counter()
    probe = config.with_(
        r=1, rank_pattern={}, alpha_pattern={}, init_lora_weights=True, init_scale=1.0, use_dora=False, lora_dropout=0.0
    )
    attach(model, probe, torch.Generator().manual_seed(run.train.seed))
    modes = {name: module.training for name, module in model.named_modules()}
    try:
        layers = {n: layer for n, layer in adapter_layers(model).items() if isinstance(layer, LowRankLayer)}
        spectra = Spectra(layers, most, run.train.seed)
        batches = _batches(model, run, data)
        num_steps = min(run.ranks.batches or DEFAULT_BATCHES, run.train.num_steps(data.rows_per_epoch))
        model.eval()
        for _ in spectra.passes():
            for step in range(1, num_steps + 1):
                _backward(model, batches, step)
            model.zero_grad(set_to_none=True)
        found = spectra.results()
    finally:
        for name, module in model.named_modules():
            module.training = modes.get(name, module.training)
        detach(model)
    num_rows = sum(len(batches.order.rows(step)) for step in range(1, num_steps + 1))
    say(f"ranks     measured on {counted(num_rows, 'row')} in {time.perf_counter() - started:.1f} s")
    return found


def _batches(model: PreTrainedModel, run: RunConfig, data: RunData) -> MicroBatches:
    order = RowOrder(data.shares, run.train.batch_size, run.train.num_rows(data.rows_per_epoch), run.train.seed)
    objective = minimised(objective_of(run.train, disabled), run.train)
    packing = run.data.packing is True
    return MicroBatches(
        objective, data.train.examples, order, run.train.micro_rows, data.pad_id, packing, model.device
    )  # fmt: skip


def _backward(model: PreTrainedModel, batches: MicroBatches, step: int) -> None:
    """Gradients of a step's mean loss, as training takes them. A step without a loss adds nothing."""
    objective = batches.objective
    own = [batch for batch in batches.whole(step) if objective.count(batch)]
    total = sum(total_weight(objective.weights(batch), objective.count(batch)) for batch in own)
    with objective.meter.closed():
        for batch, losses in zip(own, objective.losses_of(model, own), strict=True):
            (weighted_sum(losses, objective.weights(batch)) / total).backward()


def _with_spectral_ranks(
    config: LoraConfig,
    ranks: RanksConfig,
    sizes: AdapterSizes,
    found: Mapping[str, Spectrum],
    highest: int,
    say: Say,
) -> LoraConfig:
    budget = ranks.most_parameters
    assert budget is not None
    least, most = bounds(sizes, ranks)
    halved = 2 if start_name(config.init_lora_weights) == LORA_GA else 1  # it takes two directions for each rank
    most = {name: max(least[name], min(highest, rank // halved)) for name, rank in most.items()}
    check_budget(least, most, lambda r: sizes.total(r, budget), budget.amount)
    gradients = sum(float(one.gradient.double().square().sum()) for one in found.values())
    if ranks.measured != "activation" and gradients == 0:
        raise RequestError(
            "no gradient reaches the layers that adapter.target_modules names, so their spectrum says nothing; adapt "
            "others"
        )
    gains = {name: found[name].gains(ranks.measured, gradients) for name in sizes.costs}
    chosen = share_out(gains, sizes.costs, least, most, lambda r: sizes.total(r, budget) <= budget.amount)
    say_budget(chosen, sizes, ranks, say)
    return with_ranks(config, chosen, ranks.alpha)


def _blank(sizes: AdapterSizes, config: LoraConfig) -> dict[str, Directions]:
    """Zeros for a start whose values come from a checkpoint."""
    blank: dict[str, Directions] = {}
    for name, (num_outputs, num_inputs) in sizes.shapes.items():
        rank = 2 * rank_in(config, name)
        blank[name] = Directions(
            torch.zeros(rank, num_inputs), torch.zeros(num_outputs, rank), torch.zeros(rank, num_inputs)
        )
    return blank


def with_measured_plan(run: RunConfig, plan: Mapping[str, int]) -> RunConfig:
    """A run of policy `spectrum` with these ranks in its plan: when it is repeated, nothing is measured again."""
    if run.ranks.policy != "spectrum":
        return run
    return dataclasses.replace(run, ranks=dataclasses.replace(run.ranks, plan=dict(plan)))
