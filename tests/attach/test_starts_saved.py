"""Starts that take weight out of the base: saved as plain LoRA of twice the rank, and read unconverted."""

from __future__ import annotations

import json

import peft
import pytest
import torch

from rankwise.adapters.config import LoraConfig
from rankwise.attach.checkpoint import load_adapter, read_config, save_adapter
from rankwise.attach.inject import attach, disabled, merge_in, ranks
from tests import tiny
from tests.attach.attached_cases import IDS
from tests.attach.peft_cases import randomise
from tests.attach.snapshots import logits, relative

QV = ["q_proj", "v_proj"]
STARTS = ["pissa", "pissa_niter_8", "olora"]
OPTIONS = {
    "alpha-over-r": {"r": 4, "lora_alpha": 6, "target_modules": QV},
    "rslora": {"r": 4, "lora_alpha": 6, "target_modules": QV, "use_rslora": True},
    "rank-pattern": {"r": 4, "target_modules": QV, "rank_pattern": {"q_proj": 3}, "alpha_pattern": {"v_proj": 5}},
    "rslora-rank-pattern": {
        "r": 4, "target_modules": QV, "use_rslora": True, "rank_pattern": {"q_proj": 3}, "alpha_pattern": {"v_proj": 5},
    },
    "dora": {"r": 4, "target_modules": QV, "use_dora": True},
    "gpt2": {"r": 4, "target_modules": ["c_attn", "c_fc"]},
    "embedding": {"r": 4, "target_modules": ["embed_tokens", "q_proj"]},
    "convolution": {"r": 3, "target_modules": ["convolution"]},
}  # fmt: skip


def build(options: str):
    return {"gpt2": tiny.gpt2, "convolution": tiny.resnet}.get(options, tiny.llama)()


def outputs(model, options: str) -> torch.Tensor:
    if options == "convolution":
        return logits(model, pixel_values=torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0)))
    return logits(model, input_ids=IDS)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("start", STARTS)
@pytest.mark.parametrize("options", OPTIONS)
def test_saved_as_plain_lora_of_twice_the_rank(start, options, tmp_path):
    base = outputs(build(options), options)
    mine = attach(build(options), LoraConfig(**OPTIONS[options], init_lora_weights=start))
    assert torch.equal(outputs(mine, options), base)
    randomise(mine)
    expected = outputs(mine, options)
    assert not torch.equal(expected, base)
    with disabled(mine):
        assert torch.equal(outputs(mine, options), base)
    save_adapter(mine, tmp_path)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["init_lora_weights"] is True
    theirs = peft.PeftModel.from_pretrained(build(options), tmp_path).eval()
    assert relative(outputs(theirs, options), expected) < 1e-5
    again = load_adapter(build(options), tmp_path)
    assert ranks(again) == {name: 2 * rank for name, rank in ranks(mine).items()}
    assert relative(outputs(again, options), expected) < 1e-5
    assert relative(outputs(merge_in(mine), options), expected) < 1e-5


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("start", ["pissa", "olora"])
@pytest.mark.parametrize("options", ["alpha-over-r", "rslora", "rank-pattern", "rslora-rank-pattern", "dora"])
def test_an_unconverted_folder_of_peft_is_read(start, options, tmp_path):
    theirs = peft.get_peft_model(build(options), peft.LoraConfig(**OPTIONS[options], init_lora_weights=start)).eval()
    randomise(theirs)
    theirs.save_pretrained(tmp_path / "theirs")
    expected = outputs(theirs, options)
    assert read_config(tmp_path / "theirs").init_lora_weights == start
    mine = load_adapter(build(options), tmp_path / "theirs")
    assert relative(outputs(mine, options), expected) < 1e-5
    with disabled(mine):
        assert torch.equal(outputs(mine, options), outputs(build(options), options))
    save_adapter(mine, tmp_path / "mine")
    again = peft.PeftModel.from_pretrained(build(options), tmp_path / "mine").eval()
    assert relative(outputs(again, options), expected) < 1e-5


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("start", ["pissa", "olora"])
def test_peft_s_own_conversion_is_read(start, tmp_path):
    options = OPTIONS["alpha-over-r"]
    theirs = peft.get_peft_model(tiny.llama(), peft.LoraConfig(**options, init_lora_weights=start)).eval()
    theirs.peft_config["default"].init_lora_weights = True  # the recipe of PEFT's documentation
    theirs.save_pretrained(tmp_path / "start")
    theirs.peft_config["default"].init_lora_weights = start
    randomise(theirs)
    expected = logits(theirs, input_ids=IDS)
    theirs.save_pretrained(tmp_path / "converted", path_initial_model_for_weight_conversion=str(tmp_path / "start"))
    mine = load_adapter(tiny.llama(), tmp_path / "converted")
    assert relative(logits(mine, input_ids=IDS), expected) < 1e-5
