"""Compressed folders against the float64 SVD of each layer's dense update, and against PEFT."""

from __future__ import annotations

import json
from pathlib import Path

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file

from rankwise.attach.checkpoint import load_adapter, save_adapter
from rankwise.attach.inject import adapter_layers, adapter_parameters, ranks
from rankwise.errors import RequestError
from rankwise.recipes.convert_rank import convert_rank
from rankwise.recipes.inspect import inspect_adapter
from tests import tiny
from tests.recipes.test_inspect import VARIANTS, adapter

FAMILIES = {**dict.fromkeys(VARIANTS, tiny.llama), "gpt2": tiny.gpt2, "convolution": tiny.resnet}
FIELDS = {**VARIANTS, "gpt2": {}, "convolution": {"target_modules": ["convolution"]}}


def updates(folder: Path, family) -> dict[str, torch.Tensor]:
    """The dense update of each layer, in float64."""
    layers = adapter_layers(load_adapter(family(), folder))
    return {name: layer.delta_weight().detach().double().flatten(1) for name, layer in layers.items()}


def best(dense: torch.Tensor, rank: int) -> torch.Tensor:
    U, S, Vh = torch.linalg.svd(dense, full_matrices=False)
    return (U[:, :rank] * S[:rank]) @ Vh[:rank]


@pytest.mark.parametrize("variant", sorted(FIELDS))
def test_every_layer_is_the_svd_of_its_update(variant, tmp_path):
    family = FAMILIES[variant]
    before = ranks(adapter(tmp_path / "a", family(), **FIELDS[variant]))
    dense = updates(tmp_path / "a", family)
    found = convert_rank(str(tmp_path / "a"), str(tmp_path / "small"), rank=3)
    after = updates(tmp_path / "small", family)
    wanted = {name: best(matrix, 3) for name, matrix in dense.items()}
    assert found["max_rank"] == 3 and {row["name"] for row in found["modules"]} == set(dense)
    for row in found["modules"]:
        name, whole = row["name"], dense[row["name"]]
        assert row["rank"] == min(3, row["before"])
        assert row["error"] == 0.0 or before[name] > 3, "lower than asked for: as it was"
        assert torch.allclose(after[name], wanted[name], atol=2e-6 * float(whole.norm()))
        assert row["error"] == pytest.approx(float((whole - wanted[name]).norm() / whole.norm()), abs=1e-5)
    lost = sum(float((dense[name] - wanted[name]).square().sum()) for name in dense)
    whole = sum(float(matrix.square().sum()) for matrix in dense.values())
    assert found["error"] == pytest.approx((lost / whole) ** 0.5, abs=1e-5)


@pytest.mark.parametrize("variant", ["plain", "rslora", "patterns", "embedding", "dora"])
def test_peft_loads_it_and_computes_the_same(variant, tmp_path):
    fields = {**VARIANTS, "dora": {"use_dora": True}}[variant]
    adapter(tmp_path / "a", tiny.llama(), **fields)
    found = convert_rank(str(tmp_path / "a"), str(tmp_path / "small"), energy=0.8)
    assert len({row["rank"] for row in found["modules"]}) > 1, "layers differ, so patterns are needed"
    ids = tiny.token_ids()
    with torch.no_grad():
        ours = load_adapter(tiny.llama(), tmp_path / "small")(ids).logits
        theirs = peft.PeftModel.from_pretrained(tiny.llama(), tmp_path / "small")(ids).logits
    assert torch.allclose(ours, theirs, atol=1e-5)


def test_energy_is_kept_by_each_layer_and_by_no_lower_rank(tmp_path):
    adapter(tmp_path / "a", tiny.llama())
    found = convert_rank(str(tmp_path / "a"), str(tmp_path / "small"), energy=0.8)
    dense = updates(tmp_path / "a", tiny.llama)
    for row in found["modules"]:
        squares = torch.linalg.svdvals(dense[row["name"]]).square()
        shares = squares.cumsum(0) / squares.sum()
        assert shares[row["rank"] - 1] >= 0.8 - 1e-6 and (row["rank"] == 1 or shares[row["rank"] - 2] < 0.8)


def test_one_scale_stays_one_scale_without_patterns(tmp_path):
    """What vLLM needs, which reads `r` and `lora_alpha` only."""
    adapter(tmp_path / "a", tiny.llama())
    found = convert_rank(str(tmp_path / "a"), str(tmp_path / "small"), energy=0.8)
    fields = json.loads((tmp_path / "small" / "adapter_config.json").read_text())
    assert fields["r"] == found["max_rank"] and fields["lora_alpha"] / fields["r"] == 12 / 4
    alphas = [fields["alpha_pattern"].get(name, fields["lora_alpha"]) / r for name, r in fields["rank_pattern"].items()]
    assert alphas == [3.0] * len(alphas) and found["vllm_max_lora_rank"] == 8
    uniform = convert_rank(str(tmp_path / "a"), str(tmp_path / "two"), rank=2)
    fields = json.loads((tmp_path / "two" / "adapter_config.json").read_text())
    assert (fields["r"], fields["lora_alpha"], fields["rank_pattern"], fields["alpha_pattern"]) == (2, 6, {}, {})
    assert uniform["file_bytes"] < (tmp_path / "a" / "adapter_model.safetensors").stat().st_size


def test_several_scales_become_one(tmp_path):
    """Patterns, or a growth, leave layers with scales of their own."""
    adapter(tmp_path / "a", tiny.llama(), **VARIANTS["patterns"])
    dense = updates(tmp_path / "a", tiny.llama)
    convert_rank(str(tmp_path / "a"), str(tmp_path / "same"), energy=1.0)
    for name, matrix in updates(tmp_path / "same", tiny.llama).items():
        assert torch.allclose(matrix, dense[name], atol=2e-6 * float(dense[name].norm()))
    fields = json.loads((tmp_path / "same" / "adapter_config.json").read_text())
    scales = {fields["alpha_pattern"].get(n, fields["lora_alpha"]) / rank for n, rank in fields["rank_pattern"].items()}
    assert {*scales, fields["lora_alpha"] / fields["r"]} == {3.0}


def test_prefixes_are_of_nested_adapters_only(tmp_path):
    adapter(tmp_path / "a", tiny.llama())
    with pytest.raises(RequestError, match=r"trained with ranks.policy: nested, which .* was not; use svd"):
        convert_rank(str(tmp_path / "a"), str(tmp_path / "out"), rank=2, method="prefix")
    with pytest.raises(RequestError, match="--method can't be 'prefx'; did you mean 'prefix'"):
        convert_rank(str(tmp_path / "a"), str(tmp_path / "out"), rank=2, method="prefx")


def test_dora_keeps_its_magnitudes_and_whole_modules_are_copied(tmp_path):
    adapter(tmp_path / "a", tiny.llama(), use_dora=True, modules_to_save=["lm_head"])
    convert_rank(str(tmp_path / "a"), str(tmp_path / "small"), rank=2)
    old, new = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("a", "small"))
    assert old.keys() == new.keys()
    for name in old:
        assert torch.equal(old[name], new[name]) == ("lora_A" not in name and "lora_B" not in name), name


def test_dtypes_and_other_fields_stay(tmp_path):
    adapter(tmp_path / "a", tiny.llama(), task_type="CAUSAL_LM", base_model_name_or_path="some/base")
    path = tmp_path / "a" / "adapter_model.safetensors"
    save_file({name: tensor.bfloat16() for name, tensor in load_file(path).items()}, path)
    config = tmp_path / "a" / "adapter_config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "megatron_core": "kept as it is"}))
    convert_rank(str(tmp_path / "a"), str(tmp_path / "small"), rank=2)
    tensors = load_file(tmp_path / "small" / "adapter_model.safetensors")
    assert {tensor.dtype for tensor in tensors.values()} == {torch.bfloat16}
    fields = json.loads((tmp_path / "small" / "adapter_config.json").read_text())
    assert fields["megatron_core"] == "kept as it is" and fields["base_model_name_or_path"] == "some/base"


def test_a_fresh_adapter_becomes_a_fresh_one(tmp_path):
    model = adapter(tmp_path / "a", tiny.llama())
    with torch.no_grad():
        for name, parameter in adapter_parameters(model).items():
            parameter.mul_("lora_A" in name)
    save_adapter(model, tmp_path / "fresh")
    found = convert_rank(str(tmp_path / "fresh"), str(tmp_path / "small"), energy=0.99)
    assert found["error"] == 0 and found["max_rank"] == 1
    assert {row["norm"] for row in inspect_adapter(str(tmp_path / "small"))["modules"]} == {0.0}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "give --rank or --energy"),
        ({"rank": 2, "energy": 0.5}, "give --rank or --energy"),
        ({"rank": 4}, "no effect: no layer of .* above it \\(the highest is 4\\)"),
        ({"rank": 0}, "--rank must be a whole number from 1, not 0"),
        ({"energy": 0.0}, "--energy must be above 0 and at most 1, not 0"),
        ({"energy": 1.5}, "not 1.5"),
        ({"energy": float("nan")}, "not nan"),
    ],
)
def test_refusals_write_nothing(options, message, tmp_path):
    adapter(tmp_path / "a", tiny.llama())
    with pytest.raises(RequestError, match=message):
        convert_rank(str(tmp_path / "a"), str(tmp_path / "out"), **options)
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


def test_folders_that_cannot_be_read_or_written(tmp_path):
    adapter(tmp_path / "a", tiny.llama())
    (tmp_path / "out").mkdir()
    (tmp_path / "file").write_text("")
    for out, message in (("out", "output folder .* exists"), ("file/in", "can't be made")):
        with pytest.raises(RequestError, match=message):
            convert_rank(str(tmp_path / "a"), str(tmp_path / out), rank=2)
    with pytest.raises(RequestError, match="there is no run or adapter folder"):
        convert_rank(str(tmp_path / "nope"), str(tmp_path / "new"), rank=2)
    model = peft.get_peft_model(tiny.llama(), peft.LoraConfig(init_lora_weights="pissa", target_modules=["q_proj"]))
    model.save_pretrained(tmp_path / "pissa")
    with pytest.raises(RequestError, match="count from a base that was changed"):
        convert_rank(str(tmp_path / "pissa"), str(tmp_path / "new"), rank=2)
