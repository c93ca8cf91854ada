"""Ranks that move in place: the function, the optimiser's state, the saved folder."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from rankwise.adapters.config import LoraConfig
from rankwise.attach.checkpoint import load_adapter, save_adapter
from rankwise.attach.inject import adapter_parameters, attach, detach, ranks
from rankwise.errors import RequestError
from rankwise.ranks.dynamic import set_ranks
from tests import tiny

Q0, V1 = "model.layers.0.self_attn.q_proj", "model.layers.1.self_attn.v_proj"


def trained(**options):
    model = attach(tiny.llama(), LoraConfig(**{"r": 4, "lora_alpha": 8, **options}))
    optimizer = torch.optim.AdamW(adapter_parameters(model).values(), lr=0.01, weight_decay=0.1)
    for seed in range(3):
        step(model, optimizer, seed)
    return model, optimizer


def step(model, optimizer, seed: int) -> float:
    ids = tiny.token_ids(seed=seed)
    loss = model(ids, labels=ids).loss
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    return loss.item()


def logits(model) -> torch.Tensor:
    with torch.no_grad():
        return model(tiny.token_ids(seed=9)).logits


@pytest.mark.parametrize(
    "options", [{}, {"use_rslora": True}, {"use_dora": True}, {"init_lora_weights": "pissa"}], ids=str
)
def test_growth_keeps_the_function_and_training_goes_on(options):
    model, optimizer = trained(**options)
    before = logits(model)
    assert set_ranks(model, {Q0: 9, V1: 5}, optimizer=optimizer) == {Q0: 0.0, V1: 0.0}
    assert ranks(model)[Q0] == 9 and ranks(model)[V1] == 5
    assert (logits(model) - before).abs().max() / before.abs().max() < 1e-6
    parameters = set(adapter_parameters(model).values())
    assert parameters == {p for group in optimizer.param_groups for p in group["params"]}
    grown = model.get_submodule(Q0).lora_B
    step(model, optimizer, 3)
    assert grown[:, 4:].abs().max() > 0, "the new columns must learn"


def test_moments_of_old_entries_are_kept_and_rescaled():
    model, optimizer = trained()
    layer = model.get_submodule(Q0)
    factors = {"lora_A": layer.lora_A, "lora_B": layer.lora_B}
    old = {name: {k: v.clone() for k, v in optimizer.state[p].items()} for name, p in factors.items()}
    set_ranks(model, {Q0: 16}, optimizer=optimizer)
    A, B = optimizer.state[layer.lora_A], optimizer.state[layer.lora_B]
    gain = (8 / 16) / (8 / 4)
    assert torch.equal(A["exp_avg"][:4], old["lora_A"]["exp_avg"]) and not A["exp_avg"][4:].any()
    assert torch.allclose(B["exp_avg"][:, :4], old["lora_B"]["exp_avg"] * gain)
    assert torch.allclose(B["exp_avg_sq"][:, :4], old["lora_B"]["exp_avg_sq"] * gain**2)
    assert not B["exp_avg_sq"][:, 4:].any() and B["step"] == old["lora_B"]["step"]


def test_the_gradient_of_a_rescaled_column_follows_the_ratio():
    """What the rescaled moments rest on."""
    model, _ = trained()
    ids = tiny.token_ids(seed=5)
    layer = model.get_submodule(Q0)
    model.zero_grad()
    model(ids, labels=ids).loss.backward()
    before = layer.lora_B.grad.clone()
    set_ranks(model, {Q0: 16})
    model(ids, labels=ids).loss.backward()
    assert torch.allclose(layer.lora_B.grad[:, :4], before * (8 / 16) / (8 / 4), atol=1e-7)


def test_shrinking_reports_its_error_and_keeps_the_step_count():
    model, optimizer = trained()
    errors = set_ranks(model, {Q0: 1}, optimizer=optimizer)
    assert 0 < errors[Q0] < 1
    assert optimizer.state[model.get_submodule(Q0).lora_A]["step"] == 3
    step(model, optimizer, 4)


def test_saved_ranks_are_the_new_ones(tmp_path):
    model, _ = trained(rank_pattern={"q_proj": 6})
    set_ranks(model, {Q0: 9, V1: 2})
    save_adapter(model, tmp_path / "a")
    read = load_adapter(tiny.llama(), tmp_path / "a")
    assert ranks(read) == ranks(model)
    assert torch.equal(logits(read), logits(model))


def test_a_kept_scale_is_saved(tmp_path):
    model, _ = trained(alpha_pattern={"v_proj": 3})
    set_ranks(model, {Q0: 9, V1: 2}, alpha="scale")
    save_adapter(model, tmp_path / "a")
    read = load_adapter(tiny.llama(), tmp_path / "a")
    assert read.get_submodule(V1).scale == 3 / 4 and read.get_submodule(Q0).scale == 2.0
    assert torch.equal(logits(read), logits(model))


@pytest.mark.parametrize(
    ("wanted", "message"),
    [
        ({"model.layers.0.self_attn.q_pro": 4}, "did you mean"),
        ({Q0: 0}, "positive whole number"),
        ({Q0: 8, V1: -1}, "positive whole number"),
        pytest.param({Q0: 2.5}, "positive whole number", marks=pytest.mark.unchecked),
    ],
)
def test_bad_requests_change_nothing(wanted, message):
    model, optimizer = trained()
    before, had = logits(model), ranks(model)
    with pytest.raises(RequestError, match=message):
        set_ranks(model, wanted, optimizer=optimizer)
    assert torch.equal(logits(model), before) and ranks(model) == had


@pytest.mark.parametrize(("cls", "key"), [(torch.optim.Adagrad, "sum"), (torch.optim.Adafactor, "row_var")])
def test_an_optimiser_with_unknown_state_is_refused(cls, key):
    """Adafactor's moments are rows and columns, not of the parameter's shape."""
    model = attach(tiny.llama(), LoraConfig(r=4))
    optimizer = cls(adapter_parameters(model).values(), lr=0.01)
    step(model, optimizer, 0)
    with pytest.raises(RequestError, match=f"{cls.__name__} keeps '{key}'"):
        set_ranks(model, {Q0: 8}, optimizer=optimizer)
    assert ranks(model)[Q0] == 4
    step(model, optimizer, 1)


def test_a_swap_after_a_growth_reaches_the_grown_parameters(tmp_path):
    """The map from file names to parameters is made once, and the parameters are replaced since."""
    model, optimizer = trained()
    save_adapter(model, tmp_path / "small")
    load_adapter(model, tmp_path / "small", trainable=True)
    set_ranks(model, {Q0: 9}, optimizer=optimizer)
    step(model, optimizer, 4)
    save_adapter(model, tmp_path / "grown")
    wanted, layer = logits(model), model.get_submodule(Q0)
    step(model, optimizer, 5)
    assert not torch.equal(logits(model), wanted)
    load_adapter(model, tmp_path / "grown")
    assert model.get_submodule(Q0) is layer, "swapped in place"
    assert torch.equal(logits(model), wanted) and not layer.lora_A.requires_grad


class Suffixed(nn.Module):
    """The name of one layer is the end of the other's."""

    def __init__(self) -> None:
        super().__init__()
        self.proj = nn.Linear(8, 8)
        self.block = nn.Sequential()
        self.block.add_module("proj", nn.Linear(8, 8))

    def forward(self, x):
        return self.block(self.proj(x))


def test_alphas_of_layers_whose_names_end_alike_are_saved_apart(tmp_path):
    torch.manual_seed(0)
    model = attach(Suffixed(), LoraConfig(r=2, lora_alpha=4, init_lora_weights=False))
    set_ranks(model, {"proj": 4, "block.proj": 8}, alpha="scale")
    x = torch.randn(3, 8)
    expected = model(x)
    save_adapter(model, tmp_path / "a")
    read = load_adapter(detach(model), tmp_path / "a")
    assert {name: read.get_submodule(name).scale for name in ranks(read)} == {"proj": 2.0, "block.proj": 2.0}
    assert torch.equal(read(x), expected)


def test_an_optimizer_of_other_parameters_is_refused():
    """What replaces a factor would never be trained."""
    model, _ = trained()
    had = ranks(model)
    stale = torch.optim.AdamW(adapter_parameters(trained()[0]).values(), lr=0.01)
    with pytest.raises(RequestError, match=f"the optimizer does not hold lora_A of '{Q0}'"):
        set_ranks(model, {Q0: 8}, optimizer=stale)
    assert ranks(model) == had


def test_a_frozen_factor_needs_no_optimizer():
    model = attach(tiny.llama(), LoraConfig(r=4))
    for name, parameter in adapter_parameters(model).items():
        parameter.requires_grad_(name.endswith("lora_B"))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.01)
    set_ranks(model, {Q0: 8}, optimizer=optimizer)
    layer = model.get_submodule(Q0)
    assert not layer.lora_A.requires_grad
    assert any(parameter is layer.lora_B for parameter in optimizer.param_groups[0]["params"])
