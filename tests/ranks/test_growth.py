"""Which layers grow, and the two measures against dense matrices."""

from __future__ import annotations

import random

import pytest
import torch

from rankwise.adapters.config import LoraConfig
from rankwise.attach.inject import adapter_layers, adapter_parameters, attach
from rankwise.attach.swiglu import fuse_mlps
from rankwise.ranks import sketch as sketch_module
from rankwise.ranks.config import RanksConfig
from rankwise.ranks.growth import fullness, grown
from rankwise.ranks.sketch import GradientSketch
from rankwise.train.recompute import enable_gradient_checkpointing
from tests import tiny

RANKS = {"a": 4, "b": 4, "c": 8, "d": 2}
MOST = {"a": 8, "b": 5, "c": 8, "d": 8}
MEASURED = {"a": 0.7, "b": 0.9, "c": 1.0, "d": 0.3}


def growth(fits=lambda _: True, **settings):
    return grown(RANKS, MOST, MEASURED, RanksConfig(policy="grow", max=8, every=10, **settings), fits)


def test_where():
    assert growth() == {"a": 8, "b": 5}, "saturated, and c is as high as it may be"
    assert growth(where="all", by=2) == {"a": 6, "b": 5, "d": 4}
    assert growth(where="top-1") == {"b": 5}
    assert growth(where="top-3", by=1) == {"a": 5, "b": 5, "d": 3}
    assert growth(measure="gradient", by=1) == {"a": 5, "b": 5}


def test_the_budget_goes_to_the_highest_measure_first():
    assert growth(lambda ranks: sum(ranks.values()) <= 20) == {"b": 5, "a": 5}
    assert growth(lambda ranks: sum(ranks.values()) <= 18) == {}
    assert growth(lambda ranks: sum(ranks.values()) <= 22, where="all") == {"b": 5, "a": 7}


def test_a_budget_is_never_exceeded():
    draw = random.Random(0)
    for _ in range(200):
        names = [f"layer{i}" for i in range(draw.randint(1, 8))]
        costs = {name: draw.randint(1, 30) for name in names}
        ranks = {name: draw.randint(1, 6) for name in names}
        most = {name: ranks[name] + draw.randint(0, 6) for name in names}

        def size(now, costs=costs):
            return sum(costs[name] * rank for name, rank in now.items())

        budget = size(ranks) + draw.randint(0, 100)
        config = RanksConfig(policy="grow", max=12, every=1, by=draw.randint(1, 5), where="all")
        new = grown(ranks, most, {name: draw.random() for name in names}, config, lambda now, b=budget: size(now) <= b)
        now = {**ranks, **new}
        assert size(now) <= budget and all(ranks[name] <= now[name] <= most[name] for name in names)
        if config.by and not new:
            assert all(ranks[name] == most[name] or size({**now, name: now[name] + 1}) > budget for name in names)


def trained(model, **options):
    attach(model, LoraConfig(**{"r": 3, "lora_alpha": 6, **options}), torch.Generator().manual_seed(0))
    with torch.no_grad():
        for parameter in adapter_parameters(model).values():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)))
    return model


def test_fullness_is_that_of_the_dense_update():
    model = trained(tiny.llama())
    for name, layer in adapter_layers(model).items():
        values = torch.linalg.svdvals(layer.delta_weight().detach().double())[:3]
        shares = values / values.sum()
        assert fullness(model)[name] == pytest.approx(float(torch.special.entr(shares).sum().exp()) / 3, rel=1e-4)
    assert set(fullness(attach(tiny.llama(), LoraConfig(r=3))).values()) == {0.0}


def projection(matrix: torch.Tensor) -> torch.Tensor:
    basis = torch.linalg.qr(matrix)[0]
    return basis @ basis.T


def loss_of(model, seed: int) -> torch.Tensor:
    ids = tiny.token_ids(3, 12, seed=seed)
    return model(ids, labels=ids).loss


def dense_share(model, name: str) -> float:
    """From the whole gradient, by merging the layer's weight into one that is trained."""
    layer = adapter_layers(model)[name]
    weight = layer.base.weight
    weight.requires_grad_(True)
    for seed in range(2):
        loss_of(model, seed).backward()
    G = layer.kind.matrix(weight.grad).double()
    weight.requires_grad_(False)
    weight.grad = None
    A, B = layer.lora_A.detach().flatten(1).double(), layer.lora_B.detach().flatten(1).double()
    rest = (torch.eye(len(B)) - projection(B)) @ G @ (torch.eye(A.shape[1]) - projection(A.T))
    return float(rest.square().sum() / G.square().sum())


@pytest.mark.parametrize(
    ("build", "options"),
    [
        (tiny.llama, {}),
        (tiny.llama, {"use_dora": True}),
        (tiny.gpt2, {}),
        (tiny.llama, {"target_modules": ["embed_tokens", "down_proj"]}),
    ],
    ids=["llama", "dora", "gpt2", "embedding"],
)
def test_the_sketch_estimates_the_share_outside(build, options, monkeypatch):
    monkeypatch.setattr(sketch_module, "COLUMNS", 1500)
    model = trained(build(), **options)
    name = list(adapter_layers(model))[-1]
    wanted = {name: dense_share(model, name) for name in (name, next(iter(adapter_layers(model))))}
    model.zero_grad()
    sketch = GradientSketch(model, "0")
    for seed in range(2):
        loss_of(model, seed).backward()
    found = sketch.outside()
    assert {name: found[name] for name in wanted} == pytest.approx(wanted, rel=0.1)
    assert not any(layer._forward_hooks for layer in adapter_layers(model).values())


def test_fused_and_checkpointed_passes_are_seen_once():
    plain, special = trained(tiny.llama()), tiny.llama()
    enable_gradient_checkpointing(special)
    fuse_mlps(trained(special))
    shares = []
    for model in (plain, special.train()):
        sketch = GradientSketch(model, "0")
        loss_of(model, 0).backward()
        shares.append(sketch.outside())
    assert shares[0] == pytest.approx(shares[1], rel=1e-4) and min(shares[0].values()) > 0.1


def test_without_a_gradient_there_is_no_share():
    model = trained(tiny.llama())
    assert set(GradientSketch(model, "0").outside().values()) == {0.0}
