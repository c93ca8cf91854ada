"""Optimizers by name: their groups, LoRA+'s rates against the formula, and state that goes to a file and back."""

from __future__ import annotations

import sys

import pytest
import torch
from safetensors.torch import load, save
from torch import nn

from rankwise.adapters.config import LoraConfig
from rankwise.attach.inject import adapter_parameters, attach, output_factors
from rankwise.errors import RequestError, WorkError
from rankwise.ranks.dynamic import set_ranks
from rankwise.train.loop import accumulate
from rankwise.train.objectives import TOKENS
from rankwise.train.optim import load_optimizer_state, optimizer_state
from rankwise.train.optimizers import LR_RATIO, OPTIMIZERS, make_optimizer, set_learning_rate
from tests import tiny
from tests.train.test_loop import adapted, split

BETAS = (0.9, 0.999)
BIG = (64, 128)  # 8,192 entries: more than bitsandbytes keeps in 32 bits


@pytest.fixture(params=sorted(OPTIMIZERS))
def kind(request: pytest.FixtureRequest) -> str:
    if request.param == "adamw-8bit":
        pytest.importorskip("bitsandbytes")
    return request.param


def parameters() -> dict[str, nn.Parameter]:
    torch.manual_seed(0)
    shapes = {"q.lora_A": BIG, "q.lora_B": BIG, "q.magnitude": (5,)}
    return {name: nn.Parameter(torch.randn(shape)) for name, shape in shapes.items()}


def steps(optimizer: torch.optim.Optimizer, named: dict[str, nn.Parameter], seeds: range) -> None:
    for seed in seeds:
        for place, name in enumerate(sorted(named)):
            generator = torch.Generator().manual_seed(10 * seed + place)
            named[name].grad = torch.randn(named[name].shape, generator=generator)
        optimizer.step()


def test_a_step_is_adamw_s_by_the_formula(kind: str) -> None:
    """After one step the moments' ratio is sign(g): each entry moves by the rate, after its decay."""
    named = parameters()
    before = {name: parameter.detach().clone() for name, parameter in named.items()}
    optimizer = make_optimizer(named, 0.01, BETAS, 0.5, kind, {"q.lora_B"}, 4.0)
    steps(optimizer, named, range(1))
    for name, parameter in named.items():
        rate = 0.04 if name == "q.lora_B" else 0.01
        decay = 1.0 if name == "q.magnitude" else 1 - rate * 0.5
        assert parameter.grad is not None
        wanted = before[name] * decay - rate * parameter.grad.sign()
        off = (parameter - wanted).abs() / rate
        if kind == "adamw-8bit":  # small entries of a block are rounded
            assert off.median() < 0.05, name
        else:
            assert off.max() < 1e-3, name


def test_state_goes_through_a_file_and_training_goes_on_to_the_bit(kind: str) -> None:
    named = parameters()
    optimizer = make_optimizer(named, 0.01, BETAS, 0.1, kind, {"q.lora_B"}, 4.0)
    steps(optimizer, named, range(3))
    saved = load(save(optimizer_state(optimizer, named)))
    again = {name: nn.Parameter(parameter.detach().clone()) for name, parameter in reversed(named.items())}
    other = make_optimizer(again, 0.01, BETAS, 0.1, kind, {"q.lora_B"}, 4.0)
    load_optimizer_state(other, again, saved)
    for one, which in ((optimizer, named), (other, again)):
        set_learning_rate(one, 0.003)
        steps(one, which, range(3, 6))
    assert all(torch.equal(named[name], again[name]) for name in named)
    states = optimizer_state(optimizer, named), optimizer_state(other, again)
    assert states[0].keys() == states[1].keys()
    assert all(torch.equal(states[0][key], states[1][key]) for key in states[0])


def test_8_bit_state_is_a_quarter_and_its_maps_are_saved() -> None:
    pytest.importorskip("bitsandbytes")
    named = parameters()
    optimizer = make_optimizer(named, 0.01, BETAS, 0.0, "adamw-8bit")
    steps(optimizer, named, range(1))
    state = optimizer_state(optimizer, named)
    assert state["q.lora_A/state1"].dtype == torch.uint8 and state["q.lora_A/absmax1"].shape == (32,)
    assert state["q.lora_A/qmap2"].shape == (256,) and state["q.magnitude/state1"].dtype == torch.float32
    held = sum(t.nbytes for key, t in state.items() if key.startswith("q.lora_A/") and "qmap" not in key)
    assert held < 0.26 * 8 * named["q.lora_A"].numel()
    with pytest.raises(WorkError, match=r"'q.lora_A/absmax1' has shape \[31\], where .* needs \[32\]"):
        load_optimizer_state(optimizer, named, {"q.lora_A/absmax1": torch.zeros(31)})


def test_8_bit_without_its_package_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with pytest.raises(RequestError, match=r"adamw-8bit needs the package bitsandbytes; pip install"):
        make_optimizer(parameters(), 0.01, BETAS, 0.0, "adamw-8bit")


def test_8_bit_on_another_device_is_refused() -> None:
    named = {"q.lora_A": nn.Parameter(torch.empty(BIG, device="meta"))}
    with pytest.raises(RequestError, match=r"adamw-8bit runs on cpu, cuda, xpu, not on meta; use adamw"):
        make_optimizer(named, 0.01, BETAS, 0.0, "adamw-8bit")


def test_loraplus_speeds_up_b_of_linear_layers_only() -> None:
    model = attach(tiny.llama(), LoraConfig(r=4, target_modules=["q_proj", "embed_tokens"], use_dora=True))
    faster = output_factors(model)
    assert faster == {f"model.layers.{i}.self_attn.q_proj.lora_B" for i in (0, 1)}
    named = adapter_parameters(model)
    optimizer = make_optimizer(named, 1.0, BETAS, 0.1, "adamw", faster, 16.0)
    found = {
        name: (group["lr"], group["weight_decay"])
        for group in optimizer.param_groups
        for name, parameter in named.items()
        if any(parameter is one for one in group["params"])
    }
    assert found.keys() == named.keys()
    for name, (rate, decay) in found.items():
        assert rate == (16.0 if name in faster else 1.0), name
        assert decay == (0.0 if name.endswith("magnitude") else 0.1), name


def test_a_growth_of_ranks_keeps_loraplus_groups() -> None:
    model = adapted()
    faster = output_factors(model)
    optimizer = make_optimizer(adapter_parameters(model), 1e-2, BETAS, 0.0, "adamw", faster, 8.0)
    accumulate(model.train(), optimizer, split(8, True), TOKENS, 1)
    optimizer.step()
    set_ranks(model, {"model.layers.0.self_attn.q_proj": 9}, optimizer=optimizer)
    set_learning_rate(optimizer, 0.5)
    grown = model.get_submodule("model.layers.0.self_attn.q_proj")
    rates = {id(p): group["lr"] for group in optimizer.param_groups for p in group["params"]}
    assert rates[id(grown.lora_A)] == 0.5 and rates[id(grown.lora_B)] == 4.0
    assert {group[LR_RATIO] for group in optimizer.param_groups} == {1.0, 8.0}


def test_8_bit_state_refuses_a_growth_of_ranks() -> None:
    pytest.importorskip("bitsandbytes")
    model = adapted()
    set_ranks(model, {"model.layers.0.self_attn.q_proj": 256})
    optimizer = make_optimizer(adapter_parameters(model), 1e-2, BETAS, 0.0, "adamw-8bit")
    accumulate(model.train(), optimizer, split(8, True), TOKENS, 1)
    optimizer.step()
    with pytest.raises(RequestError, match=r"AdamW8bit keeps '\w+', which can't be resized"):
        set_ranks(model, {"model.layers.0.self_attn.q_proj": 300}, optimizer=optimizer)
