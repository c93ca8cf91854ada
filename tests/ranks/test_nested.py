"""A prefix is the adapter that a cut gives, in every pass; only it learns."""

from __future__ import annotations

from collections import Counter

import pytest
import torch

from rankwise.adapters.config import LoraConfig
from rankwise.attach.attachment import need_attachment
from rankwise.attach.checkpoint import load_adapter, read_nested, save_adapter
from rankwise.attach.inject import adapter_parameters, attach
from rankwise.attach.swiglu import fuse_mlps
from rankwise.ranks.growth import ranked_layers
from rankwise.ranks.nested import prefix_at, set_prefix
from rankwise.recipes.convert_rank import convert_rank
from tests import tiny


def random_adapter(model, **options):
    attach(model, LoraConfig(**{"r": 6, "lora_alpha": 12, **options}))
    with torch.no_grad():
        for parameter in adapter_parameters(model).values():
            parameter.add_(0.2 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)))
    return model


def loss_and_gradients(model):
    model.zero_grad()
    ids = tiny.token_ids()
    loss = model(ids, labels=ids).loss
    loss.backward()
    return loss.item(), {name: parameter.grad for name, parameter in adapter_parameters(model).items()}


CASES = {
    "plain": (tiny.llama, {}),
    "rslora-patterns": (tiny.llama, {"use_rslora": True, "rank_pattern": {"q_proj": 2, "v_proj": 8}}),
    "dora": (tiny.llama, {"use_dora": True}),
    "gpt2": (tiny.gpt2, {}),
    "embedding": (tiny.llama, {"target_modules": ["embed_tokens", "o_proj"]}),
}


@pytest.mark.parametrize(
    ("case", "dtype"), [*((case, torch.float32) for case in CASES), ("plain", torch.bfloat16)], ids=str
)
def test_a_cut_is_the_prefix_that_was_trained(case, dtype, tmp_path):
    build, options = CASES[case]
    model = random_adapter(build().to(dtype), **options).train()
    need_attachment(model).nested = {"least": 1, "most": 6}
    save_adapter(model, tmp_path / "whole")
    whole, _ = loss_and_gradients(model)
    found = convert_rank(str(tmp_path / "whole"), str(tmp_path / "cut"), rank=3)
    assert found["method"] == "prefix" and read_nested(tmp_path / "cut") == {"least": 1, "most": 3}
    cut = load_adapter(build().to(dtype), tmp_path / "cut", trainable=True).train()
    wanted, gradients = loss_and_gradients(cut)
    set_prefix(model, 3)
    loss, own = loss_and_gradients(model)
    tolerance = 1e-6 if dtype == torch.float32 else 5e-4
    assert loss == pytest.approx(wanted, rel=tolerance) and abs(loss - whole) > 10 * tolerance
    scales = [{f"{n}.lora_B": layer.scale for n, layer in ranked_layers(each).items()} for each in (model, cut)]
    for name, gradient in gradients.items():
        gradient *= scales[0].get(name, 1.0) / scales[1].get(name, 1.0)  # a cut folder has one scale for all layers
        prefix = own[name][tuple(slice(0, size) for size in gradient.shape)]
        assert (prefix - gradient).norm() <= (1e-4 if dtype == torch.float32 else 0.05) * gradient.norm() + 1e-7
        assert own[name].norm() == pytest.approx(float(prefix.norm())), "what is beyond the prefix gets no gradient"
    set_prefix(model, None)
    assert loss_and_gradients(model)[0] == whole


def test_decoding_and_fused_passes_use_the_prefix_too():
    model = random_adapter(tiny.llama()).eval()
    ids = tiny.token_ids(1, 1)
    with torch.no_grad():
        set_prefix(model, 2)
        one = model(ids).logits
        fuse_mlps(model)
        assert torch.allclose(model(ids).logits, one, atol=1e-6)
        for layer in ranked_layers(model).values():
            layer.lora_A[2:] = 7.0
        assert torch.allclose(model(ids).logits, one, atol=1e-6)


def test_prefixes_are_drawn_evenly_and_again_the_same():
    draws = [prefix_at(3, step, 2, 9) for step in range(1, 4001)]
    assert (
        draws
        == [prefix_at(3, step, 2, 9) for step in range(1, 4001)]
        != [prefix_at(4, s, 2, 9) for s in range(1, 4001)]
    )
    counts = Counter(draws)
    assert set(counts) == set(range(2, 10)) and all(400 < count < 600 for count in counts.values())


def test_the_record_survives_loading_and_saving(tmp_path):
    model = random_adapter(tiny.llama())
    need_attachment(model).nested = {"least": 2, "most": 6}
    save_adapter(model, tmp_path / "a")
    save_adapter(load_adapter(tiny.llama(), tmp_path / "a"), tmp_path / "b")
    assert read_nested(tmp_path / "b") == {"least": 2, "most": 6}
    need_attachment(model).nested = None
    save_adapter(model, tmp_path / "c")
    assert read_nested(tmp_path / "c") is None
