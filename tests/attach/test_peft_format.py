"""PEFT's folder as data: dict in, dict out."""

from __future__ import annotations

import dataclasses

import peft
import pytest
import torch

from rankwise.adapters.config import LoraConfig
from rankwise.attach.peft_format import config_from_peft, config_to_peft, doubled, from_file, saves_embeddings, to_file
from rankwise.errors import RequestError

NAMES = ["model.embed_tokens", "model.layers.0.q_proj", "lm_head"]


def test_every_field_of_peft_is_written_with_its_default():
    theirs = peft.LoraConfig(target_modules=["q_proj"], r=4).to_dict()
    mine = config_to_peft(LoraConfig(target_modules=["q_proj"], r=4, lora_alpha=8))
    assert mine.keys() == theirs.keys() - {"runtime_config"}
    assert list(mine) == sorted(mine)
    for name, value in mine.items():
        default = {"set": sorted}.get(type(theirs[name]).__name__, lambda v: v)(theirs[name])
        if name not in {"inference_mode", "lora_alpha", "peft_version", "init_lora_weights"}:
            assert value == default or value == (default or None), name
    assert mine["inference_mode"] is True and mine["peft_type"] == "LORA"


@pytest.mark.parametrize(
    "config",
    [
        LoraConfig(target_modules=["q_proj"]),
        LoraConfig(target_modules=r".*q_proj", exclude_modules=["a"], bias="all", use_rslora=True, use_dora=True),
        LoraConfig(target_modules=["q"], layers_to_transform=[0, 2], layers_pattern="h", lora_dropout=0.1),
        LoraConfig(target_modules=["q"], rank_pattern={"q": 2}, alpha_pattern={"q": 1.5}, modules_to_save=["lm_head"]),
        LoraConfig(target_modules=["q"], trainable_token_indices={"wte": [1]}, task_type="CAUSAL_LM", revision="main"),
        LoraConfig(target_modules=["q"], init_lora_weights="gaussian", base_model_name_or_path="x/y", lora_alpha=2.5),
        LoraConfig(target_modules=["q"], init_lora_weights=False),
    ],
    ids=str,
)
def test_there_and_back(config):
    fields = config_to_peft(config)
    again = config_from_peft(fields, "folder")
    assert again == config
    for field in dataclasses.fields(config):
        assert type(getattr(again, field.name)) is type(getattr(config, field.name)), field.name
    assert config_to_peft(again) == fields


def test_doubling_keeps_every_scale():
    config = LoraConfig(
        r=4,
        lora_alpha=6,
        target_modules=["q"],
        rank_pattern={"q": 3},
        alpha_pattern={"v": 5},
        init_lora_weights="pissa",
    )
    plain = config_to_peft(doubled(config))
    assert (plain["r"], plain["lora_alpha"]) == (8, 12)
    assert (plain["rank_pattern"], plain["alpha_pattern"]) == ({"q": 6}, {"v": 10})
    assert plain["init_lora_weights"] is True
    root = config_to_peft(doubled(config.with_(use_rslora=True)))
    assert root["lora_alpha"] / root["r"] ** 0.5 == pytest.approx(6 / 4**0.5)
    assert root["alpha_pattern"]["v"] / root["r"] ** 0.5 == pytest.approx(5 / 4**0.5)


def test_the_given_mappings_are_not_written_to():
    patterns = {"q": 2}
    fields = {**config_to_peft(LoraConfig(target_modules=["q"])), "rank_pattern": patterns, "exclude_modules": []}
    before = {**fields}
    config = config_from_peft(fields, "folder")
    assert fields == before and patterns == {"q": 2}
    assert config.exclude_modules is None


def test_old_and_short_configurations():
    """Fields came over the years; what an old folder lacks has PEFT's default."""
    old = {
        "peft_type": "LORA", "r": 8, "lora_alpha": 16, "target_modules": ["q"], "bias": "none", "enable_lora": None,
        "merge_weights": False, "fan_in_fan_out": False, "modules_to_save": None, "inference_mode": True,
    }  # fmt: skip
    assert config_from_peft(old, "folder") == LoraConfig(r=8, lora_alpha=16, target_modules=["q"])


@pytest.mark.parametrize("start", ["eva", "orthogonal", "gaussian", True, False])
def test_starts_that_leave_the_base_alone_are_read(start):
    config = config_from_peft({"peft_type": "LORA", "target_modules": ["q"], "init_lora_weights": start}, "folder")
    assert config.init_lora_weights == (True if start == "eva" else start)


def test_tied_rows_are_tied_anyway():
    fields = {"peft_type": "LORA", "target_modules": ["q"], "trainable_token_indices": [1], "ensure_weight_tying": True}
    assert config_from_peft(fields, "folder").trainable_token_indices == [1]
    with pytest.raises(RequestError, match="'folder' uses ensure_weight_tying=True, which is not supported"):
        config_from_peft({**fields, "trainable_token_indices": None}, "folder")


@pytest.mark.parametrize("variant", ["megatron_config", "eva_config", "loftq_config", "auto_mapping"])
def test_settings_without_effect_on_what_is_saved(variant):
    fields = {"peft_type": "LORA", "target_modules": ["q"], variant: {"a": 1}}
    if variant == "megatron_config":
        with pytest.raises(RequestError, match="uses megatron_config"):
            config_from_peft(fields, "folder")
    else:
        config_from_peft(fields, "folder")


@pytest.mark.parametrize(
    ("targets", "rows", "expected"),
    [
        (["q_proj"], None, False),
        (["embed_tokens"], None, True),
        (["q_proj", "lm_head"], None, True),
        (["model.embed_tokens"], None, False),  # as in PEFT, only the bare name counts
        (r".*(q_proj|lm_head)", None, True),
        (r".*q_proj", None, False),
        ("all-linear", None, False),
        (["embed_tokens"], [3], False),
    ],
)
def test_which_targets_save_whole_embeddings(targets, rows, expected):
    config = LoraConfig(target_modules=targets, trainable_token_indices=rows)
    assert saves_embeddings(config, NAMES) is expected


def test_names_there_and_back():
    tensors = {"model.q.lora_A.weight": torch.zeros(1)}
    assert list(to_file(tensors)) == ["base_model.model.model.q.lora_A.weight"]
    assert from_file(to_file(tensors), "file") == tensors


def test_names_of_peft_s_own_modules():
    one, two = torch.ones(1), torch.zeros(1)
    found = from_file(
        {
            "base_model.model.classifier.original_module.bias": two,
            "base_model.model.classifier.modules_to_save.bias": one,
            "base_model.model.classifier.bias": one,
        },
        "file",
    )
    assert found == {"classifier.bias": one}


def test_a_name_without_the_prefix():
    with pytest.raises(RequestError, match=r"'file' holds 'q\.lora_A', which is not a PEFT name"):
        from_file({"q.lora_A": torch.zeros(1)}, "file")
