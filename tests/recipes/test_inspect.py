from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from rankwise.adapters.config import LoraConfig
from rankwise.attach.checkpoint import save_adapter
from rankwise.attach.inject import adapter_layers, adapter_parameters, attach
from rankwise.errors import RequestError
from rankwise.recipes.inspect import effective_rank, inspect_adapter
from tests import tiny

VARIANTS = {
    "plain": {},
    "rslora": {"use_rslora": True},
    "patterns": {"rank_pattern": {"q_proj": 2}, "alpha_pattern": {"q_proj": 16, "layers.1.mlp.up_proj": 1}},
    "embedding": {"target_modules": ["embed_tokens", "v_proj"]},
    "pissa": {"init_lora_weights": "pissa"},
}


def adapter(folder: Path, model, **fields):
    """Saved with random factors; the model it was saved from."""
    attach(model, LoraConfig(**{"r": 4, "lora_alpha": 12, **fields}))
    with torch.no_grad():
        for parameter in adapter_parameters(model).values():
            parameter.add_(0.3 * torch.randn(parameter.shape))
    save_adapter(model, folder)
    return model


@pytest.mark.parametrize("variant", sorted(VARIANTS))
def test_equals_the_svd_of_the_whole_update(variant, tmp_path):
    """From the file alone, against the model's own delta weights."""
    model = adapter(tmp_path / "a", tiny.llama(), **VARIANTS[variant])
    found = inspect_adapter(str(tmp_path / "a"))
    layers = adapter_layers(model)
    assert sorted(layers) == [module["name"] for module in found["modules"]]
    for module in found["modules"]:
        delta = layers[module["name"]].delta_weight().detach().double().flatten(1)
        values = torch.linalg.svdvals(delta)
        shares = values / values.sum()
        assert module["norm"] == pytest.approx(float(delta.norm()), rel=1e-4)
        wanted = float(torch.special.entr(shares[shares > 1e-9]).sum().exp())
        assert module["effective_rank"] == pytest.approx(wanted, rel=1e-3)
        assert 1 <= module["effective_rank"] <= module["rank"] + 1e-9
        assert found["ranks"][module["name"]] == module["rank"]


def test_the_document(tmp_path):
    model = adapter(tmp_path / "a", tiny.llama(), base_model_name_or_path="some/base")
    found = inspect_adapter(str(tmp_path / "a"))
    assert (found["kind"], found["base"], found["adapter"]) == ("lora", "some/base", str(tmp_path / "a"))
    assert found["trainable_parameters"] == sum(p.numel() for p in adapter_parameters(model).values())
    assert found["file_bytes"] == (tmp_path / "a" / "adapter_model.safetensors").stat().st_size
    assert set(found["ranks"].values()) == {4} and len(found["modules"]) == 14


@pytest.mark.parametrize("family", ["gpt2", "qwen"])
def test_other_families(family, tmp_path):
    adapter(tmp_path / "a", tiny.CAUSAL_LMS[family]())
    assert len(inspect_adapter(str(tmp_path / "a"))["modules"]) == {"gpt2": 8, "qwen": 14}[family]


def test_convolutions(tmp_path):
    model = adapter(tmp_path / "a", tiny.resnet(), target_modules=["convolution"])
    for module in inspect_adapter(str(tmp_path / "a"))["modules"]:
        delta = adapter_layers(model)[module["name"]].delta_weight().detach()
        assert module["norm"] == pytest.approx(float(delta.norm()), rel=1e-4)


def test_dora_and_whole_modules_are_counted(tmp_path):
    model = adapter(tmp_path / "a", tiny.llama(), use_dora=True, modules_to_save=["lm_head"])
    found = inspect_adapter(str(tmp_path / "a"))
    assert found["kind"] == "dora"
    assert found["trainable_parameters"] == sum(p.numel() for p in adapter_parameters(model).values())


def test_embeddings_saved_along_are_not_counted(tmp_path):
    model = adapter(tmp_path / "a", tiny.llama(), target_modules=["embed_tokens"])
    names = load_file(tmp_path / "a" / "adapter_model.safetensors")
    assert any(name.endswith("base_layer.weight") for name in names)
    found = inspect_adapter(str(tmp_path / "a"))
    assert found["trainable_parameters"] == sum(p.numel() for p in adapter_parameters(model).values())


def test_a_fresh_adapter_has_no_norm_and_no_effective_rank(tmp_path):
    model = attach(tiny.llama(), LoraConfig(r=4))
    save_adapter(model, tmp_path / "a")
    modules = inspect_adapter(str(tmp_path / "a"))["modules"]
    assert {(m["norm"], m["effective_rank"], m["rank"]) for m in modules} == {(0.0, 0.0, 4)}


def test_effective_rank():
    assert effective_rank(torch.tensor([2.0, 2.0, 2.0, 0.0])) == pytest.approx(3.0)
    assert effective_rank(torch.tensor([5.0, 0.0])) == pytest.approx(1.0)
    assert effective_rank(torch.tensor([3.0, 1.0])) == pytest.approx(
        math.exp(0.75 * math.log(4 / 3) + 0.25 * math.log(4))
    )


def test_what_is_no_adapter(tmp_path):
    with pytest.raises(RequestError, match="is not an adapter: it is not a folder"):
        inspect_adapter(str(tmp_path / "nope"))
    adapter(tmp_path / "a", tiny.llama())
    path = tmp_path / "a" / "adapter_model.safetensors"
    tensors = load_file(path)
    for missing in ("lora_A.weight", "lora_B.weight"):
        gone = next(name for name in tensors if name.endswith(missing))
        save_file({name: tensor for name, tensor in tensors.items() if name != gone}, path)
        with pytest.raises(RequestError, match=rf"without its '{missing}'"):
            inspect_adapter(str(tmp_path / "a"))
    path.write_bytes(b"torn")
    with pytest.raises(RequestError, match="torn or not a safetensors file"):
        inspect_adapter(str(tmp_path / "a"))
