"""Folding the adapter in: the same logits, in memory and after a reload, and ties that break are said."""

from __future__ import annotations

import pytest
import torch

from rankwise.adapters.base import AdapterLayer
from rankwise.adapters.config import LoraConfig
from rankwise.attach.inject import attach, is_attached, merge_in
from rankwise.errors import RequestError
from tests import tiny
from tests.attach.attached_cases import Build, Shared, inputs_of, tied
from tests.attach.peft_cases import randomise
from tests.attach.snapshots import assert_unchanged, logits, relative, snapshot

MERGES: dict[str, tuple[Build, dict, bool]] = {
    "llama": (tiny.llama, {}, False),
    "mixtral": (tiny.mixtral, {}, False),
    "untied-head": (tiny.llama, {"target_modules": ["lm_head"]}, False),
    "tied-layers": (tied, {}, False),
    "tied-head": (tied, {"target_modules": ["lm_head", "q_proj"]}, True),
    "tied-embedding": (tied, {"target_modules": ["embed_tokens", "q_proj"]}, True),
    "tied-both": (tied, {"target_modules": ["embed_tokens", "lm_head"]}, True),
    "tied-whole-head": (tied, {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}, True),
    "tied-whole-both": (tied, {"target_modules": ["q_proj"], "modules_to_save": ["lm_head", "embed_tokens"]}, True),
    "tied-rows": (tied, {"target_modules": ["q_proj"], "trainable_token_indices": [3, 60]}, False),
    "gpt2": (tiny.gpt2, {}, False),
    "gpt2-wte": (tiny.gpt2, {"target_modules": ["wte"]}, True),
    "gpt2-head": (tiny.gpt2, {"target_modules": ["lm_head"]}, True),
    "gemma3-embedding": (tiny.gemma3, {"target_modules": ["embed_tokens"]}, True),
    "gemma3-rows": (tiny.gemma3, {"target_modules": ["q_proj"], "trainable_token_indices": [3]}, False),
    "t5": (tiny.t5, {}, False),
    "t5-head": (tiny.t5, {"target_modules": ["lm_head"]}, True),
    "t5-encoder-embedding": (tiny.t5, {"target_modules": ["encoder.embed_tokens"]}, True),
    "t5-embeddings": (tiny.t5, {"target_modules": ["embed_tokens"]}, True),
    "t5-rows": (tiny.t5, {"target_modules": ["q"], "trainable_token_indices": [3]}, False),
    "resnet": (tiny.resnet, {"target_modules": ["convolution"], "modules_to_save": ["normalization"]}, False),
    "bert": (tiny.bert_classifier, {"target_modules": ["query"], "task_type": "SEQ_CLS", "bias": "all"}, False),
}  # fmt: skip
merges = pytest.mark.parametrize("case", MERGES)


@merges
def test_merged_and_reloaded_gives_the_unmerged_logits(case, tmp_path):
    build, options, unties = MERGES[case]
    model = attach(build(), LoraConfig(**{"r": 4, **options}))
    randomise(model)
    expected = logits(model, **inputs_of(model))
    flags = [p.requires_grad for p in build().parameters()]
    assert merge_in(model) is model and not is_attached(model)
    assert not any(isinstance(module, AdapterLayer) for module in model.modules())
    assert relative(logits(model, **inputs_of(model)), expected) < 1e-5
    assert [p.requires_grad for p in model.parameters()] == flags or unties
    ties = getattr(model.config.get_text_config(), "tie_word_embeddings", False)
    was_tied = getattr(build().config.get_text_config(), "tie_word_embeddings", False)
    assert ties == (was_tied and not unties)
    model.save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path).eval()
    assert relative(logits(again, **inputs_of(again)), expected) < 1e-5


@merges
def test_keep_tied_is_refused_where_the_tie_breaks(case):
    build, options, unties = MERGES[case]
    model = attach(build(), LoraConfig(**{"r": 4, **options}))
    if not unties:
        merge_in(model, keep_tied=True)
        return
    before = snapshot(model)
    with pytest.raises(RequestError, match="is tied to another module, and merging changes only one of them"):
        merge_in(model, keep_tied=True)
    assert_unchanged(model, before)


def test_merging_into_another_dtype_rounds_once():
    model = attach(tiny.llama().bfloat16(), LoraConfig(r=4))
    randomise(model)
    layer = model.model.layers[0].self_attn.q_proj
    exact = layer.base.weight.double() + layer.delta_weight().detach().double()
    merge_in(model, dtype=torch.float32)
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert relative(model.model.layers[0].self_attn.q_proj.weight.double(), exact) < 1e-6


def test_a_weight_of_two_layers_parts_when_merged():
    model, x = Shared(), torch.randn(4, 6)
    attach(model, LoraConfig(r=2, target_modules=["one"], init_lora_weights=False))
    changed = model(x)
    with pytest.raises(RequestError, match=r"'one\.weight' is tied to another module"):
        merge_in(model, keep_tied=True)
    merge_in(model)
    assert model.one.weight is not model.two.weight and relative(model(x), changed) < 1e-5
