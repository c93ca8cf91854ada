"""Ranks that move, for every line of the tables of adapters and layers: the function, the error, the optimiser."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from rankwise.adapters.config import LoraConfig
from rankwise.adapters.svd import leading_svd
from rankwise.attach.inject import adapter_parameters, attach, ranks
from rankwise.errors import RequestError
from rankwise.ranks.dynamic import outside_rows, set_ranks
from tests import tiny
from tests.adapters.test_properties import LAYERS, PAIRS, SCALES, disturb

layers = pytest.mark.parametrize(
    ("adapter", "layer"), PAIRS, ids=lambda value: value if isinstance(value, str) else value.__name__
)
scales = pytest.mark.parametrize("scale", SCALES, ids=["alpha-over-r", "alpha-over-root-r"])


class Holder(nn.Module):
    """A model of one layer."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)


def attached(adapter: str, layer: type[nn.Module], scale=SCALES[0], dtype=torch.float32, **options):
    torch.manual_seed(3)
    r, alpha, use_rslora = scale
    config = LoraConfig(
        r=r, lora_alpha=alpha, use_rslora=use_rslora, use_dora=adapter == "dora", target_modules=["layer"], **options
    )
    model = attach(Holder(LAYERS[layer][0]().to(dtype)), config)
    x = LAYERS[layer][1]()
    disturb(model.layer)
    return model, x.to(dtype) if x.is_floating_point() else x


def far(a: Tensor, b: Tensor) -> float:
    return float((a.detach().double() - b.detach().double()).abs().max() / b.detach().double().abs().max())


@layers
@scales
def test_growth_keeps_the_function(adapter, layer, scale):
    model, x = attached(adapter, layer, scale)
    before = model(x)
    assert set_ranks(model, {"layer": 9}) == {"layer": 0.0} and ranks(model) == {"layer": 9}
    assert far(model(x), before) < 1e-6
    set_ranks(model, {"layer": 11}, alpha="scale")
    assert far(model(x), before) < 1e-6


@layers
def test_growth_keeps_the_function_under_dropout(adapter, layer):
    model, x = attached(adapter, layer, lora_dropout=0.3 if layer is not nn.Embedding else 0.0)
    model.train()
    torch.manual_seed(0)
    before = model(x)
    set_ranks(model, {"layer": 9})
    torch.manual_seed(0)
    assert far(model(x), before) < 1e-6


@layers
def test_growth_on_a_bf16_base_is_within_its_rounding(adapter, layer):
    model, x = attached(adapter, layer, dtype=torch.bfloat16)
    before = model(x)
    set_ranks(model, {"layer": 9})
    assert far(model(x), before) < 2**-6


@layers
@pytest.mark.parametrize("start", [True, "pissa"], ids=["plain", "frozen-start"])
def test_shrinking_is_the_best_approximation(adapter, layer, start):
    """Against a float64 SVD of the dense change; DoRA's magnitudes stay."""
    model, x = attached(adapter, layer, init_lora_weights=start)
    wrapped = model.layer
    dense = wrapped.delta().detach().double()
    U, S, Vh = torch.linalg.svd(dense)
    error = set_ranks(model, {"layer": 2})["layer"]
    best = (U[:, :2] * S[:2]) @ Vh[:2]
    assert far(wrapped.delta().detach(), best) < 1e-5
    assert error == pytest.approx(float(torch.linalg.norm(dense - best) / torch.linalg.norm(dense)), rel=1e-5)
    assert torch.isfinite(model(x)).all()


def test_shrinking_what_was_padded_gives_it_back():
    """A rank above the smaller side of the weight, and back: no error where nothing is lost."""
    model, x = attached("lora", nn.Linear)
    before = model(x)
    set_ranks(model, {"layer": 30})
    assert set_ranks(model, {"layer": 20})["layer"] < 1e-6
    assert set_ranks(model, {"layer": 8})["layer"] < 1e-6
    assert far(model(x), before) < 1e-5


@layers
def test_training_goes_on_after_each_change(adapter, layer):
    model, x = attached(adapter, layer)
    optimizer = torch.optim.AdamW(
        [{"params": [model.layer.lora_A]}, {"params": [model.layer.lora_B], "lr": 0.05, "weight_decay": 0.5}], lr=0.01
    )
    for rank in (9, 3, 7, 7, 1):
        set_ranks(model, {"layer": rank}, optimizer=optimizer)
        assert [len(group["params"]) for group in optimizer.param_groups] == [1, 1]
        assert optimizer.param_groups[1]["params"][0] is model.layer.lora_B
        assert optimizer.param_groups[1]["weight_decay"] == 0.5
        before = [model.layer.lora_A.detach().clone(), model.layer.lora_B.detach().clone()]
        optimizer.zero_grad()
        model(x).square().mean().backward()
        optimizer.step()
        assert not torch.equal(model.layer.lora_B, before[1]) and not torch.equal(model.layer.lora_A, before[0])
        assert all(state["exp_avg"].shape == p.shape for p, state in optimizer.state.items())


# --- new rows from a gradient --------------------------------------------------------------------------------------


@layers
def test_new_rows_are_the_gradients_leading_directions_outside(adapter, layer):
    model, x = attached(adapter, layer, (2, 4.0, False))
    wrapped = model.layer
    before = model(x)
    gradient = torch.randn(wrapped.base.weight.shape, generator=torch.Generator().manual_seed(1))
    old = wrapped.lora_A.detach().flatten(1).clone()
    set_ranks(model, {"layer": 4}, gradients={"layer": gradient})
    assert far(model(x), before) < 1e-6
    new = wrapped.lora_A.detach().flatten(1)[2:].double()
    assert (new @ old.double().T).abs().max() < 1e-4 * new.norm() * old.norm()
    projector = torch.eye(old.shape[1], dtype=torch.float64) - torch.linalg.pinv(old.double()) @ old.double()
    rest = wrapped.kind.matrix(gradient).double() @ projector
    reference = torch.linalg.svd(rest).Vh[:2]
    cosines = (new @ reference.T).abs() / new.norm(dim=1, keepdim=True)
    assert torch.allclose(cosines, torch.eye(2, dtype=torch.float64), atol=1e-4)
    assert new.norm(dim=1).allclose((old.norm() / 2**0.5).double().expand(2), rtol=1e-4)


def test_a_gradient_without_more_directions_is_filled_up_by_chance():
    model, _ = attached("lora", nn.Linear, (2, 4.0, False))
    gradient = torch.outer(torch.randn(8), torch.randn(12))
    assert outside_rows(model.layer, gradient, 3).shape == (1, 12)
    assert outside_rows(model.layer, torch.zeros(8, 12), 3).shape == (0, 12)
    set_ranks(model, {"layer": 5}, gradients={"layer": gradient})
    assert model.layer.lora_A.shape == (5, 12) and (model.layer.lora_A.norm(dim=1) > 0).all()


@pytest.mark.parametrize(
    ("wanted", "gradients", "message"),
    [
        ({"layer": 3}, {"layer": torch.zeros(8, 12)}, "no effect"),
        ({"layer": 5}, {"other": torch.zeros(8, 12)}, r"gradients\['other'\] has no effect"),
        ({"layer": 5}, {"layer": torch.zeros(12, 8)}, r"the shape \[12, 8\], not \[8, 12\]"),
    ],
)
def test_gradients_that_can_not_be_used(wanted, gradients, message):
    model, _ = attached("lora", nn.Linear)
    with pytest.raises(RequestError, match=message):
        set_ranks(model, wanted, gradients=gradients)
    assert ranks(model) == {"layer": 4}


def test_the_leading_singular_vectors_of_a_large_matrix():
    generator = torch.Generator().manual_seed(0)
    U, _ = torch.linalg.qr(torch.randn(300, 300, generator=generator))
    V, _ = torch.linalg.qr(torch.randn(200, 200, generator=generator))
    values = 2.0 ** -torch.arange(200)
    matrix = (U[:, :200] * values) @ V.T
    left, found, right = leading_svd(matrix, 5, torch.Generator().manual_seed(7))
    assert torch.allclose(found, values[:5], rtol=1e-4)
    assert torch.allclose((right @ V[:, :5]).abs(), torch.eye(5), atol=1e-3)
    assert torch.allclose((U[:, :5].T @ left).abs(), torch.eye(5), atol=1e-3)
    again = leading_svd(matrix, 5, torch.Generator().manual_seed(7))
    assert torch.equal(again[1], found)


# --- the optimiser's moments ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("use_rslora", [False, True])
def test_moments_of_a_shrunk_layer_are_those_of_its_gradients(use_rslora):
    """With momentum that sums gradients of one loss, the projected sum is the gradient of the new factors."""
    model, x = attached("lora", nn.Linear, (4, 8.0, use_rslora))
    set_ranks(model, {"layer": 4})
    with torch.no_grad():  # of rank 2, so that nothing is lost and the gradient by the weight stays
        model.layer.lora_B[:, 2:] = model.layer.lora_B[:, :2] @ torch.randn(2, 2)
    optimizer = torch.optim.SGD(adapter_parameters(model).values(), lr=0.0, momentum=0.9)

    def gradients() -> list[Tensor]:
        optimizer.zero_grad()
        model(x).square().sum().backward()
        return [model.layer.lora_A.grad.clone(), model.layer.lora_B.grad.clone()]

    gradients()
    optimizer.step()
    assert set_ranks(model, {"layer": 2}, optimizer=optimizer)["layer"] < 1e-6
    state = [optimizer.state[p]["momentum_buffer"] for p in (model.layer.lora_A, model.layer.lora_B)]
    for moment, gradient in zip(state, gradients(), strict=True):
        assert far(moment, gradient) < 1e-4


def test_moments_of_a_layer_with_a_frozen_start_begin_afresh_and_that_is_said(caplog):
    model, x = attached("lora", nn.Linear, init_lora_weights="pissa")
    optimizer = torch.optim.AdamW(adapter_parameters(model).values(), lr=0.01)
    model(x).square().sum().backward()
    optimizer.step()
    with caplog.at_level("WARNING"):
        set_ranks(model, {"layer": 2}, optimizer=optimizer)
    assert "moments start afresh in 1 of 1 layers: layer" in caplog.text
    assert not optimizer.state and model.layer.lora_A in optimizer.param_groups[0]["params"]


def test_8_bit_state_is_refused_with_the_reason():
    bitsandbytes = pytest.importorskip("bitsandbytes")
    model = attach(tiny.llama(hidden_size=256, intermediate_size=256), LoraConfig(r=16, target_modules=["up_proj"]))
    optimizer = bitsandbytes.optim.AdamW8bit(adapter_parameters(model).values(), lr=0.01)
    ids = tiny.token_ids()
    model(ids, labels=ids).loss.backward()
    optimizer.step()
    with pytest.raises(RequestError, match=r"AdamW8bit keeps 'state1', which can't be resized.*each 256 entries"):
        set_ranks(model, {"model.layers.0.mlp.up_proj": 17}, optimizer=optimizer)
    assert set(ranks(model).values()) == {16}


@pytest.mark.parametrize("use_rslora", [False, True])
def test_a_run_grown_early_is_one_at_the_final_rank_whose_ungrown_columns_were_held(use_rslora):
    """At equal scale. Adam's moments, step count and all: bit for bit up to rounding of sums of other lengths."""
    name = "model.layers.0.self_attn.q_proj"
    options = {"r": 3, "lora_alpha": 6, "use_rslora": use_rslora, "target_modules": ["q_proj", "up_proj"]}
    grown = attach(tiny.llama(), LoraConfig(**options), torch.Generator().manual_seed(0))
    whole = copy.deepcopy(grown)
    set_ranks(whole, {name: 7}, generator=torch.Generator().manual_seed(5), alpha="scale")
    optimizers = [torch.optim.AdamW(adapter_parameters(m).values(), lr=0.01, weight_decay=0.0) for m in (grown, whole)]
    for step in range(8):
        if step == 3:
            set_ranks(grown, {name: 7}, optimizers[0], torch.Generator().manual_seed(5), alpha="scale")
        losses = []
        for model, optimizer in zip((grown, whole), optimizers, strict=True):
            ids = tiny.token_ids(seed=step)
            loss = model(ids, labels=ids).loss
            optimizer.zero_grad()
            loss.backward()
            if model is whole and step < 3:
                layer = whole.get_submodule(name)
                layer.lora_A.grad[3:], layer.lora_B.grad[:, 3:] = 0, 0
            optimizer.step()
            losses.append(loss.item())
        assert losses[0] == pytest.approx(losses[1], rel=1e-6)
    a, b = (model.get_submodule(name) for model in (grown, whole))
    assert a.scale == pytest.approx(b.scale) and a.lora_B[:, 3:].abs().max() > 0
    assert far(a.lora_A, b.lora_A) < 1e-4 and far(a.lora_B, b.lora_B) < 1e-4
