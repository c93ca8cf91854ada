"""Importance against AdaLoRA's formula weight by weight, which components move, and what moves with them."""

from __future__ import annotations

import json
import math
import random

import pytest
import torch

from rankwise.adapters.config import LoraConfig
from rankwise.attach.inject import adapter_parameters, attach, ranks
from rankwise.ranks.adaptive import BETA, LEAST_STEPS, Importance, most_moves, moves
from rankwise.ranks.dynamic import set_ranks
from rankwise.ranks.growth import ranked_layers
from rankwise.ranks.selection import select_components
from tests import tiny
from tests.ranks.test_dynamic import Q0, V1, logits, trained

OLD = math.inf


def test_importance_is_adaloras_formula():
    model = attach(tiny.llama(), LoraConfig(r=3, lora_alpha=6, rank_pattern={"q_proj": 5}))
    layers = ranked_layers(model)
    importance = Importance(layers)
    expected = {name: torch.zeros(4, layer.rank, dtype=torch.float64) for name, layer in layers.items()}
    for seed in range(LEAST_STEPS):
        for layer in layers.values():
            for number, parameter in enumerate((layer.lora_A, layer.lora_B)):
                draw = torch.Generator().manual_seed(seed + number)
                parameter.grad = torch.randn(parameter.shape, generator=draw)
        importance.observe()
        for name, layer in layers.items():
            for of, (w, dim) in enumerate(((layer.lora_A, 1), (layer.lora_B, 0))):
                now = (w.detach().double() * w.grad.double()).abs().mean(dim)
                smooth, unsure = expected[name][of], expected[name][2 + of]
                smooth.copy_(BETA * smooth + (1 - BETA) * now)
                unsure.copy_(BETA * unsure + (1 - BETA) * (now - smooth).abs())
        if seed < LEAST_STEPS - 1:
            assert {score for of_layer in importance.scores().values() for score in of_layer} == {OLD}
    for name, found in importance.scores().items():
        smooth, unsure = expected[name][:2], expected[name][2:]
        assert found == pytest.approx((smooth * unsure).sum(0).tolist(), rel=1e-4)


def test_importance_follows_moves_and_survives_json():
    model = attach(tiny.llama(), LoraConfig(r=3))
    importance = Importance(ranked_layers(model))
    for layer in ranked_layers(model).values():
        layer.lora_B.data.normal_(generator=torch.Generator().manual_seed(1))
        for parameter in (layer.lora_A, layer.lora_B):
            parameter.grad = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(2))
    for _ in range(LEAST_STEPS):
        importance.observe()
    before = importance.scores()
    select_components(model, {Q0: [0, 2]})
    set_ranks(model, {V1: 4})
    importance.move({Q0: [0, 2]}, {V1: 4})
    after = importance.scores()
    assert after[Q0] == [before[Q0][0], before[Q0][2]] and after[V1] == [*before[V1], OLD]
    assert all(after[name] == before[name] for name in before if name not in (Q0, V1))
    saved = json.loads(json.dumps(importance.to_lists(), allow_nan=False))
    other = Importance(ranked_layers(model))
    other.load(saved)
    assert other.scores() == after


def found_moves(scores, budget, count=10, least=1, most=9, costs=None):
    costs = costs or dict.fromkeys(scores, 1)

    def fits(now):
        return sum(costs[name] * rank for name, rank in now.items()) <= budget

    return moves(scores, dict.fromkeys(scores, least), dict.fromkeys(scores, most), fits, count)


def test_the_weakest_leave_for_the_layer_whose_weakest_is_worth_most():
    scores = {"a": [5.0, 4.0], "b": [0.1, 9.0, 0.2], "c": [1.0, 2.0]}
    found = found_moves(scores, budget=7)
    assert found.grown == {"a": 3, "c": 3} and found.kept == {"b": [1]}
    assert found_moves(scores, budget=7, count=1).grown == {"a": 3}
    assert found_moves(scores, budget=7, least=3).grown == {}
    assert found_moves(scores, budget=8).grown == {"a": 3, "c": 3}, "the first needs nobody to leave"
    assert found_moves(scores, budget=8).kept == {"b": [1, 2]}
    assert found_moves({"a": [1.0], "b": [1.0]}, budget=2).grown == {}, "equals stay"


def test_the_young_neither_leave_nor_speak_for_their_layer():
    found = found_moves({"a": [5.0, OLD], "b": [OLD, OLD], "c": [0.1, 0.3]}, budget=6)
    assert found.grown == {"a": 3} and found.kept == {"c": [1]}


def test_budgets_and_bounds_hold_whatever_the_scores():
    draw = random.Random(0)
    for _ in range(300):
        names = [f"layer{i}" for i in range(draw.randint(2, 7))]
        costs = {name: draw.randint(1, 20) for name in names}
        scores = {name: [draw.choice((draw.random(), OLD)) for _ in range(draw.randint(1, 6))] for name in names}
        budget = sum(costs[name] * len(of) for name, of in scores.items()) + draw.randint(0, 15)
        count = draw.randint(1, 6)
        found = found_moves(scores, budget, count, costs=costs)
        after = {name: found.grown.get(name, len(found.kept.get(name, scores[name]))) for name in names}
        assert sum(costs[name] * rank for name, rank in after.items()) <= budget
        assert all(1 <= after[name] <= max(9, len(scores[name])) for name in names)
        assert sum(len(scores[name]) - len(kept) for name, kept in found.kept.items()) <= count
        assert not found.grown.keys() & found.kept.keys()


def test_moves_come_to_rest():
    counts = [most_moves(200, step, 100) for step in (1, 25, 50, 75, 100)]
    assert counts == sorted(counts, reverse=True) and counts[0] == 19 and counts[-1] == 1


@pytest.mark.parametrize(
    "options", [{}, {"use_rslora": True, "use_dora": True}, {"init_lora_weights": "pissa"}], ids=str
)
def test_what_stays_keeps_its_numbers_and_moments(options):
    model, optimizer = trained(**options)
    layer = ranked_layers(model)[Q0]
    A, B, scale = layer.lora_A.detach().clone(), layer.lora_B.detach().clone(), layer.scale
    old = {name: dict(optimizer.state[p]) for name, p in (("A", layer.lora_A), ("B", layer.lora_B))}
    dense = layer.delta_weight().detach()
    with torch.no_grad():  # a component without effect leaves without one
        layer.lora_B[:, 1] = 0.0
    dense = layer.delta_weight().detach().clone()
    select_components(model, {Q0: [0, 2, 3]}, optimizer)
    kept, gain = [0, 2, 3], layer.scale / scale
    assert torch.allclose(layer.delta_weight(), dense, atol=1e-6)
    assert torch.equal(layer.lora_A, A[kept]) and torch.allclose(layer.lora_B, B[:, kept] / gain)
    new = {name: optimizer.state[p] for name, p in (("A", layer.lora_A), ("B", layer.lora_B))}
    assert torch.equal(new["A"]["exp_avg"], old["A"]["exp_avg"][kept])
    assert torch.allclose(new["B"]["exp_avg_sq"], old["B"]["exp_avg_sq"][:, kept] * gain**2)
    assert new["A"]["step"] == old["A"]["step"] and ranks(model)[Q0] == 3
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    assert held == {id(p) for p in adapter_parameters(model).values()}
    assert torch.isfinite(logits(model)).all()
