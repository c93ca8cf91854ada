"""Adapters as GGUF files: what is read back is the adapter, in float64 and in logits."""

from __future__ import annotations

import gguf
import pytest
import torch

from rankwise.attach.attachment import adapter_layers
from rankwise.errors import RequestError
from rankwise.export.certificate import compare, probe_logits
from rankwise.export.gguf_lora import largest_weight_error, low_rank_layers, read_lora, using, write_lora
from tests import tiny
from tests.export.gguf_models import FAMILIES, attached, llama, qwen2

PROBES = [tuple(row) for row in torch.randint(3, 400, (2, 30), generator=torch.Generator().manual_seed(0)).tolist()]
ROUND = {
    "plain": {},
    "pissa": {"init_lora_weights": "pissa"},
    "rslora": {"use_rslora": True},
    "patterns": {"rank_pattern": {"q_proj": 5}, "alpha_pattern": {"down_proj": 1}},
    "attention": {"target_modules": ["q_proj", "k_proj"]},
}


def round_trip(model, path):
    ours = low_rank_layers(model)
    told = write_lora(model, path, "tiny")
    return told, ours, read_lora(path, model.config, ours)


@pytest.mark.parametrize("fields", ROUND.values(), ids=ROUND)
@pytest.mark.parametrize("family", ["llama-tied", "qwen3", "mistral"])
def test_what_is_read_back_is_the_adapter(family, fields, tmp_path):
    model = attached(FAMILIES[family](), **fields)
    told, ours, theirs = round_trip(model, tmp_path / "a.gguf")
    assert told.num_layers == len(adapter_layers(model)) == len(theirs)
    assert largest_weight_error(ours, theirs) < 1e-6
    adapted = probe_logits(model, PROBES)
    with using(model, theirs):
        assert compare(adapted, probe_logits(model, PROBES)).max_abs_diff < 1e-4
        assert compare(probe_logits(model, PROBES), adapted).kl < 1e-9
    assert torch.equal(probe_logits(model, PROBES)[0], adapted[0]), "the model is as it was"
    with using(model, {}):
        assert compare(adapted, probe_logits(model, PROBES)).kl > 1e-4, "the base is not the adapter"


def test_one_alpha_and_the_others_folded(tmp_path):
    model = attached(llama(), **ROUND["patterns"])
    told, _, theirs = round_trip(model, tmp_path / "a.gguf")
    assert told.alpha == 6 and told.num_folded == 2, "down_proj of two layers"
    assert {change.A.shape[0] for change in theirs.values()} == {3, 5}
    assert theirs["model.layers.0.self_attn.q_proj"].scale == pytest.approx(6 / 5)


def test_the_file_is_what_llama_cpp_looks_for(tmp_path):
    model = attached(llama())
    write_lora(model, tmp_path / "a.gguf", "tiny")
    reader = gguf.GGUFReader(tmp_path / "a.gguf")
    found = {name: field.contents() for name, field in reader.fields.items()}
    assert found["general.type"] == "adapter" and found["adapter.type"] == "lora"
    assert found["adapter.lora.alpha"] == 6.0 and found["general.architecture"] == "llama"
    shapes = {tensor.name: tensor.data.shape for tensor in reader.tensors}
    assert shapes["blk.1.attn_q.weight.lora_a"] == (3, 64) and shapes["blk.1.attn_q.weight.lora_b"] == (64, 3)
    assert shapes["blk.0.ffn_down.weight.lora_a"] == (3, 96) and len(shapes) == 2 * 14
    layer = adapter_layers(model)["model.layers.0.self_attn.q_proj"]
    [B] = [tensor.data for tensor in reader.tensors if tensor.name == "blk.0.attn_q.weight.lora_b"]
    own = layer.low_rank().B.detach().numpy()
    assert (B[0] == own[0]).all() and (B[1] == own[8]).all(), "row 1 of a head of 16 in the file is row 8 here"


def test_a_difference_is_seen(tmp_path):
    model = attached(llama())
    _, ours, theirs = round_trip(model, tmp_path / "a.gguf")
    theirs["model.layers.0.self_attn.q_proj"].B[0, 0] += 1.0
    assert largest_weight_error(ours, theirs) > 0.1


@pytest.mark.parametrize(
    ("model", "fields", "message"),
    [
        (llama, {"use_dora": True}, r"can't hold a Dora layer .*--to gguf folds it"),
        (llama, {"target_modules": ["embed_tokens", "q_proj"]}, r"an adapted Embedding \('model.embed_tokens'\)"),
        (llama, {"target_modules": ["lm_head", "q_proj"]}, r"the head of tied embeddings"),
        (qwen2, {"bias": "all"}, r"trained biases and whole modules \('"),
        (llama, {"modules_to_save": ["norm"]}, r"trained biases and whole modules \('model.*norm.weight'\)"),
        (llama, {"trainable_token_indices": [1, 2]}, r"a TokenRows layer"),
    ],
)
def test_what_it_can_not_hold_is_refused_with_the_way_out(model, fields, message, tmp_path):
    with pytest.raises(RequestError, match=message):
        write_lora(attached(model(), **fields), tmp_path / "a.gguf", "tiny")
    assert not (tmp_path / "a.gguf").exists()


def test_other_architectures_are_refused(tmp_path):
    with pytest.raises(RequestError, match="--to gguf-lora can't hold a model of type 'gpt2'"):
        write_lora(attached(tiny.gpt2()), tmp_path / "a.gguf", "tiny")
