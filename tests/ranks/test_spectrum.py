"""Spectra from sketches, against dense gradients and inputs; the sharing out of a budget."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from rankwise.adapters.config import LoraConfig
from rankwise.adapters.starts import STABLE_GAMMA, Directions
from rankwise.attach.inject import adapter_layers, attach
from rankwise.errors import RequestError
from rankwise.ranks.spectrum import Spectra, share_out
from tests import tiny

Q0, DOWN = "model.layers.0.self_attn.q_proj", "model.layers.1.mlp.down_proj"


def batches() -> list[Tensor]:
    return [tiny.token_ids(3, 9, seed) for seed in (1, 2)]


def measured(most: int, model=None, seed: int = 0):
    model = attach(tiny.llama(), LoraConfig(r=1)) if model is None else model
    spectra = Spectra(dict(adapter_layers(model)), most, seed)
    for _ in spectra.passes():
        for ids in batches():
            model(ids, labels=ids).loss.backward()
    return spectra.results()


def dense(name: str) -> tuple[Tensor, Tensor]:
    """The gradient of a layer's weight, and its inputs at tokens that the loss depends on: not the last ones."""
    model = tiny.llama()
    inputs: list[Tensor] = []
    module = model.get_submodule(name)
    module.register_forward_hook(lambda _, given, __: inputs.append(given[0][:, :-1].detach().flatten(0, 1)))
    for ids in batches():
        model(ids, labels=ids).loss.backward()
    return module.weight.grad.double(), torch.cat(inputs).double()


@pytest.mark.parametrize("name", [Q0, DOWN])
def test_spectra_of_the_whole_width_are_the_dense_ones(name):
    gradient, inputs = dense(name)
    if name == Q0:  # keys and values of the first token reach no loss through its own query, and so on: all others do
        inputs = inputs[(inputs != 0).any(1)]
    found = measured(48)[name]
    U, S, Vh = torch.linalg.svd(gradient, full_matrices=False)
    assert torch.allclose(found.gradient.double(), S, rtol=1e-4, atol=1e-5 * float(S[0]))
    best = (U[:, :3] * S[:3]) @ Vh[:3]
    ours = (found.directions.left[:, :3] * found.gradient[:3]) @ found.directions.right[:3]
    assert torch.allclose(ours.double(), best, atol=1e-4 * float(S[0]))
    if name == DOWN:
        values = torch.linalg.svdvals(inputs)
        assert torch.allclose(found.activation[:10].double(), values[:10], rtol=1e-3)
        assert found.energy == pytest.approx(float(inputs.square().sum()), rel=1e-5)
        explained = (inputs @ found.directions.inputs[:4].double().T).square().sum()
        assert explained == pytest.approx(float(values[:4].square().sum()), rel=1e-4)


def test_few_directions_of_many():
    """Narrower than the layer: leading values somewhat below, even with a flat spectrum; never above."""
    gradient, _ = dense(DOWN)
    values = torch.linalg.svdvals(gradient)[:4]
    found = measured(4)[DOWN].gradient.double()
    assert len(found) == 4 and (found <= values * (1 + 1e-5)).all() and (found > 0.85 * values).all()
    assert torch.equal(measured(4)[DOWN].gradient, measured(4)[DOWN].gradient)


def test_measuring_leaves_no_hooks():
    model = attach(tiny.llama(), LoraConfig(r=1))
    measured(4, model)
    assert not any(module._forward_hooks for module in model.modules())


def test_gains_fall_from_rank_to_rank():
    found = measured(8)
    total = sum(float(one.gradient.double().square().sum()) for one in found.values())
    for one in found.values():
        for measure in ("gradient", "activation", "product"):
            gains = one.gains(measure, total)
            assert gains == sorted(gains, reverse=True) and 0 <= gains[0] <= 1
        product = [a * b for a, b in zip(one.gains("gradient", total), one.gains("activation", total), strict=False)]
        assert one.gains("product", total) == pytest.approx(product)


def test_a_budget_goes_where_it_gains_most():
    gains = {"a": [9.0, 5.0, 1.0], "b": [8.0, 7.0, 6.0], "c": [0.0, 0.0, 0.0]}
    one, three = dict.fromkeys(gains, 1), dict.fromkeys(gains, 3)
    found = share_out(gains, one, one, three, lambda ranks: sum(ranks.values()) <= 6)
    assert found == {"a": 2, "b": 3, "c": 1}
    dear = share_out(gains, {"a": 1, "b": 10, "c": 1}, one, three, lambda r: r["a"] + 10 * r["b"] + r["c"] <= 16)
    assert dear == {"a": 3, "b": 1, "c": 3}, "what is left goes to layers without a gain too"


def test_only_linear_layers():
    model = attach(tiny.llama(), LoraConfig(r=1, target_modules=["embed_tokens", "q_proj"]))
    with pytest.raises(
        RequestError, match=r"'model\.embed_tokens' is an embedding, and spectra are measured of linear"
    ):
        Spectra(dict(adapter_layers(model)), 4, 0)


# --- starts --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("use_dora", [False, True])
@pytest.mark.parametrize("start", ["eva", "lora_ga"])
def test_starts_from_data(start, use_dora):
    base = tiny.llama()
    weights = {name: value.clone() for name, value in base.state_dict().items()}
    ids = tiny.token_ids()
    before = base(ids).logits
    directions = {name: one.directions for name, one in measured(16).items()}
    config = LoraConfig(r=4, init_lora_weights=start, use_dora=use_dora)
    model = attach(base, config, directions=directions)
    assert torch.equal(model(ids).logits, before)
    assert all(torch.equal(layer.base.weight, weights[f"{n}.weight"]) for n, layer in adapter_layers(model).items())
    layer, given = model.get_submodule(DOWN), directions[DOWN]
    if start == "eva":
        assert torch.equal(layer.lora_A, given.inputs[:4]) and not layer.lora_B.any()
        assert torch.allclose(layer.lora_A @ layer.lora_A.T, torch.eye(4), atol=1e-5)
    else:
        factor = 32**0.25 / STABLE_GAMMA**0.5
        assert torch.allclose(layer.lora_A, given.right[:4] * factor)
        assert torch.allclose(layer.lora_B, given.left[:, 4:8] * factor)
        assert torch.equal(layer.start_B, layer.lora_B)


@pytest.mark.parametrize("start", ["eva", "lora_ga"])
def test_starts_from_data_need_data(start):
    with pytest.raises(RequestError, match=f"init_lora_weights='{start}' starts from data, which a run has"):
        attach(tiny.llama(), LoraConfig(init_lora_weights=start))
    few = Directions(torch.zeros(3, 32), torch.zeros(32, 3), torch.zeros(3, 32))
    with pytest.raises(RequestError, match=r"takes \d directions for rank 4 of '.*q_proj', which has 3"):
        attach(
            tiny.llama(), LoraConfig(r=4, init_lora_weights=start, target_modules=["q_proj"]),
            directions={f"model.layers.{i}.self_attn.q_proj": few for i in (0, 1)},
        )  # fmt: skip
