from __future__ import annotations

import copy
import json

import pytest
import torch
import transformers

from rankwise.adapters.config import LoraConfig
from rankwise.attach.inject import adapter_parameters, attach
from rankwise.errors import RequestError, WorkError
from rankwise.export import merged as room
from rankwise.export.merged import Probes, dtype_name, merge_to_folder, rounding_error
from tests import tiny

PROBES = Probes([tuple(row) for row in tiny.token_ids(2, 20).tolist()], "random tokens")


def attached(model, **fields):
    """With an adapter that changes something."""
    attach(model, LoraConfig(**{"r": 3, "lora_alpha": 6, **fields}))
    with torch.no_grad():
        for parameter in adapter_parameters(model).values():
            parameter.add_(0.1 * torch.randn(parameter.shape))
    return model


@pytest.mark.parametrize("family", sorted(tiny.CAUSAL_LMS))
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_every_family_reloads_as_it_was(family, dtype, tokenizer, tmp_path):
    model = attached(tiny.CAUSAL_LMS[family]())
    kind, expected = type(model), model(tiny.token_ids()).logits.detach()
    result = merge_to_folder(model, tokenizer, tmp_path / "m", dtype, PROBES)
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "m", dtype=torch.float32)
    assert type(again) is kind
    assert torch.allclose(again(tiny.token_ids()).logits, expected, atol={"fp32": 1e-5, "bf16": 0.15}[dtype])
    assert result.certificate.verdict == "pass" and result.certificate.num_probe_tokens == 40
    assert result.certificate.adapter_effect_kl > 1e-6


@pytest.mark.parametrize("fields", [{"use_dora": True}, {"target_modules": ["lm_head", "q_proj"]}, {"bias": "all"}])
def test_variants(fields, tokenizer, tmp_path):
    model = tiny.qwen() if fields.get("bias") else tiny.llama()
    assert merge_to_folder(attached(model, **fields), tokenizer, tmp_path / "m", "fp32", PROBES).rounding.error == 0.0


@pytest.mark.parametrize("target", ["embed_tokens", "lm_head"])
def test_a_tied_embedding_that_is_adapted_gets_untied(target, tokenizer, tmp_path):
    model = attached(tiny.llama(tied=True), target_modules=[target, "v_proj"])
    merge_to_folder(model, tokenizer, tmp_path / "m", "fp32", PROBES)
    assert json.loads((tmp_path / "m" / "config.json").read_text())["tie_word_embeddings"] is False
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "m")
    assert not torch.equal(again.lm_head.weight, again.get_input_embeddings().weight)


def test_a_tied_embedding_that_is_not_adapted_stays_tied(tokenizer, tmp_path):
    merge_to_folder(attached(tiny.llama(tied=True)), tokenizer, tmp_path / "m", "fp32", PROBES)
    assert json.loads((tmp_path / "m" / "config.json").read_text())["tie_word_embeddings"] is True


def test_a_folder_that_differs_is_refused(tokenizer, tmp_path, monkeypatch):
    """The comparison is with what lies on disk: a weight lost in writing is found."""
    model = attached(tiny.llama())

    def lossy(model, dtype):
        merged = room_merge_in(model, dtype)
        with torch.no_grad():
            merged.model.layers[1].mlp.down_proj.weight.mul_(1.5)
        return merged

    room_merge_in = room.merge_in
    monkeypatch.setattr(room, "merge_in", lossy)
    with pytest.raises(WorkError, match="differs from the adapter model by KL"):
        merge_to_folder(model, tokenizer, tmp_path / "m", "fp32", PROBES)
    assert list(tmp_path.iterdir()) == []


def test_rounding_error_by_hand():
    model = attached(tiny.llama(), target_modules=["q_proj"])
    layers = [layer.self_attn.q_proj for layer in model.model.layers]
    exact = torch.cat([(layer.base.weight + layer.delta_weight()).detach().flatten() for layer in layers])
    update = torch.cat([layer.delta_weight().detach().flatten() for layer in layers])
    lost = exact.bfloat16().float() - exact
    found = rounding_error(model, torch.bfloat16)
    assert found.error == pytest.approx(float(lost.norm() / exact.norm()), rel=1e-5)
    assert found.update_error == pytest.approx(float(lost.norm() / update.norm()), rel=1e-5)
    assert rounding_error(copy.deepcopy(model), torch.float32).error == 0.0


def test_bad_requests(tokenizer, tmp_path):
    (tmp_path / "there").mkdir()
    with pytest.raises(RequestError, match="there' exists"):
        merge_to_folder(attached(tiny.llama()), tokenizer, tmp_path / "there", "fp32", PROBES)
    with pytest.raises(RequestError, match="unknown dtype 'fp23'; did you mean 'fp32'"):
        merge_to_folder(attached(tiny.llama()), tokenizer, tmp_path / "m", "fp23", PROBES)
    with pytest.raises(RequestError, match=r"loaded in torch.bfloat16; load it in fp32"):
        merge_to_folder(attached(tiny.llama().bfloat16()), tokenizer, tmp_path / "m", "bf16", PROBES)
    with pytest.raises(RequestError, match="no adapter is attached"):
        merge_to_folder(tiny.llama(), tokenizer, tmp_path / "m", "fp32", PROBES)
    with pytest.raises(RequestError, match=r"can't merge into torch.int8"):
        dtype_name(torch.int8)
