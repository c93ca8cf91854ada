from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from rankwise.attach.inject import adapter_parameters
from rankwise.train.loop import LoopPlan, Progress, Step, fit
from rankwise.train.objectives import TOKENS
from rankwise.train.statistics import norms, parts_of
from tests.train.test_loop import adapted, optimizer_of, split


@pytest.mark.parametrize(
    ("name", "parts"),
    [
        ("model.layers.3.self_attn.q_proj.lora_A", ["A", "q_proj", "layer 3"]),
        ("transformer.h.0.mlp.c_fc.lora_B", ["B", "c_fc", "layer 0"]),
        ("lm_head.lora_B", ["B", "lm_head"]),
        ("model.layers.1.mlp.up_proj.magnitude", ["magnitude", "up_proj", "layer 1"]),
        ("score.weight", ["weight", "score"]),
        ("model.layers.3.self_attn.q_proj.lora_A.1", ["A", "q_proj", "layer 3"]),
    ],
)
def test_parts(name: str, parts: list[str]) -> None:
    assert parts_of(name) == parts


def test_norms_are_those_of_the_joined_entries() -> None:
    generator = torch.Generator().manual_seed(0)
    names = ("a.0.q.lora_A", "a.0.q.lora_B", "a.1.q.lora_A", "a.1.v.lora_B", "a.1.v.idle")
    parameters = {name: nn.Parameter(torch.randn(3, 5, generator=generator)) for name in names}
    for parameter in list(parameters.values())[:-1]:
        parameter.grad = torch.randn(3, 5, generator=generator)
    found = norms(parameters)
    assert norms({}) == {"grad_norm": {}, "weight_norm": {}}
    for kind, read in (("grad_norm", lambda p: p.grad), ("weight_norm", lambda p: p.detach())):
        assert set(found[kind]) == {"A", "B", "q", "v", "layer 0", "layer 1"}
        for part, value in found[kind].items():
            joined = torch.cat([read(p).double().flatten() for n, p in parameters.items() if part in parts_of(n)[:9]
                                and n != "a.1.v.idle"])  # fmt: skip
            assert value == pytest.approx(float(joined.norm()), rel=1e-6)


def test_measured_before_clipping_and_training_is_the_same_to_the_bit() -> None:
    weights, steps = [], []
    for measured in (False, True):
        torch.manual_seed(0)
        model = adapted(lora_dropout=0.1)
        seen: list[Step] = []
        measure = (lambda model=model: norms(adapter_parameters(model))) if measured else None
        plan = LoopPlan(3, lambda step: 0.01, max_grad_norm=1e-3, measure=measure)
        fit(model, optimizer_of(model), lambda step: split(4, True), TOKENS, plan, Progress(), [seen.append])
        weights.append({name: parameter.detach().clone() for name, parameter in adapter_parameters(model).items()})
        steps.append(seen)
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])
    assert [step.statistics for step in steps[0]] == [{}, {}, {}]
    for step in steps[1]:
        found = step.statistics["grad_norm"]
        assert math.hypot(found["A"], found["B"]) == pytest.approx(step.grad_norm, rel=1e-5)
        depths = [value for part, value in found.items() if part.startswith("layer")]
        assert math.hypot(*depths) <= step.grad_norm * (1 + 1e-5)
    moved = [step.statistics["weight_norm"]["B"] for step in steps[1]]
    assert len(set(moved)) == 3
