"""Heads in fp32 on a bf16 base: trained, switched off, taken out, merged and saved."""

from __future__ import annotations

import copy
from pathlib import Path

import peft
import pytest
import torch
import transformers
from torch import nn
from transformers import PreTrainedModel

import rankwise as rw
from rankwise.attach.attachment import need_attachment
from rankwise.attach.wide import cast_inputs
from tests import tiny

CONFIG = rw.LoraConfig(r=4, lora_alpha=8, task_type="SEQ_CLS")


def llama_classifier() -> PreTrainedModel:
    return transformers.LlamaForSequenceClassification(
        transformers.LlamaConfig(**{**tiny._DECODER, "num_labels": 3})
    ).eval()


MODELS = {"bert": tiny.bert_classifier, "llama": llama_classifier}


@pytest.fixture(params=sorted(MODELS))
def model(request: pytest.FixtureRequest) -> PreTrainedModel:
    torch.manual_seed(0)
    return MODELS[request.param]().bfloat16()


def head(model: nn.Module) -> torch.Tensor:
    return (model.classifier if "classifier" in dict(model.named_children()) else model.score).weight


def move(model: nn.Module) -> None:
    """Changes every trained parameter a little."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * 0.05)


def test_the_head_is_fp32_and_the_base_is_not(model: PreTrainedModel) -> None:
    ids = tiny.token_ids()
    before = model(ids).logits
    rw.attach(model, CONFIG)
    assert head(model).dtype == torch.float32 and model.dtype == torch.bfloat16
    logits = model(ids).logits
    assert logits.dtype == torch.float32
    assert torch.allclose(logits, before.float(), atol=1e-2)
    logits.logsumexp(-1).sum().backward()
    assert head(model).grad is not None and head(model).grad.dtype == torch.float32


def test_a_small_step_is_not_lost(model: PreTrainedModel) -> None:
    rw.attach(model, CONFIG)
    weight = head(model)
    before = weight.detach().clone()
    with torch.no_grad():
        weight.add_(1e-5)
    assert (weight != before).float().mean() > 0.99
    narrow = before.bfloat16()
    assert ((narrow + 1e-5) != narrow).float().mean() < 0.5  # where it would have been, in bf16


def test_off_and_out_the_base_is_as_before(model: PreTrainedModel) -> None:
    ids = tiny.token_ids()
    before = model(ids).logits
    rw.attach(model, CONFIG)
    move(model)
    with rw.disabled(model):
        off = model(ids).logits
        assert off.dtype == torch.bfloat16 and torch.equal(off, before)
    assert not torch.equal(model(ids).logits, before.float())
    rw.detach(model)
    assert torch.equal(model(ids).logits, before)
    assert not any(hook is cast_inputs for m in model.modules() for hook in m._forward_pre_hooks.values())


def test_merged_it_is_a_plain_model_of_one_dtype(model: PreTrainedModel) -> None:
    ids = tiny.token_ids()
    rw.attach(model, CONFIG)
    move(model)
    attached = model(ids).logits
    merged = rw.merge(model)
    assert {parameter.dtype for parameter in merged.parameters()} == {torch.bfloat16}
    assert torch.allclose(merged(ids).logits.float(), attached, atol=0.05)


def test_a_copy_has_a_head_of_its_own(model: PreTrainedModel) -> None:
    rw.attach(model, CONFIG)
    twin = copy.deepcopy(model)
    move(twin)
    assert not torch.equal(head(twin), head(model))
    assert twin(tiny.token_ids()).logits.dtype == torch.float32


def test_saved_and_loaded_in_fp32(model: PreTrainedModel, tmp_path: Path) -> None:
    ids = tiny.token_ids()
    plain = copy.deepcopy(model)
    rw.attach(model, CONFIG)
    move(model)
    rw.save_adapter(model, tmp_path / "adapter")
    again = rw.load_adapter(copy.deepcopy(plain), tmp_path / "adapter")
    assert head(again).dtype == torch.float32 and torch.equal(head(again), head(model))
    assert torch.equal(again(ids).logits, model(ids).logits)
    # on an fp32 base PEFT has the same head, and the same logits
    ours = rw.load_adapter(copy.deepcopy(plain).float(), tmp_path / "adapter")
    theirs = peft.PeftModel.from_pretrained(copy.deepcopy(plain).float(), tmp_path / "adapter")
    assert torch.allclose(ours(ids).logits, theirs(ids).logits, atol=1e-6)


def test_what_frozen_layers_read_is_cast_back() -> None:
    """A new pooler is trained in fp32, but its output is the base's: the head after it is cast anew."""
    model = tiny.bert_classifier().bfloat16()
    rw.attach(model, CONFIG.with_(modules_to_save=["bert.pooler.dense"]))
    seen: list[torch.dtype] = []
    model.bert.pooler.dense.register_forward_hook(lambda m, a, out: seen.append(out.dtype))
    assert model(tiny.token_ids()).logits.dtype == torch.float32
    assert model.bert.pooler.dense.weight.dtype == torch.float32 and seen == [torch.bfloat16]


def test_a_failed_attach_leaves_no_hook() -> None:
    model = tiny.bert_classifier().bfloat16()
    with pytest.raises(rw.RequestError):
        rw.attach(model, CONFIG.with_(target_modules=["query"], exclude_modules=["nothing"]))
    assert model(tiny.token_ids()).logits.dtype == torch.bfloat16


def test_an_fp32_base_gets_no_hooks() -> None:
    model = rw.attach(tiny.bert_classifier(), CONFIG)
    assert not any(m._forward_pre_hooks or m._forward_hooks for m in model.modules())


def test_what_the_head_means_is_saved_with_it(tmp_path: Path) -> None:
    model = rw.attach(tiny.bert_classifier(), CONFIG)
    rw.save_adapter(model, tmp_path / "without")
    assert not (tmp_path / "without" / "head.json").exists()
    need_attachment(model).head = {"labels": ["bad", "good", "so-so"]}
    for folder in ("without", "with"):  # into a folder that is there, and into a new one
        rw.save_adapter(model, tmp_path / folder)
        again = rw.load_adapter(tiny.bert_classifier(), tmp_path / folder)
        assert need_attachment(again).head == {"labels": ["bad", "good", "so-so"]}
    (tmp_path / "with" / "head.json").write_text("[")
    with pytest.raises(rw.RequestError, match=r"head\.json"):
        rw.load_adapter(tiny.bert_classifier(), tmp_path / "with")
