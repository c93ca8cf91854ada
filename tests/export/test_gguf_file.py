"""GGUF files, written from tiny models and read back by transformers."""

from __future__ import annotations

import gguf
import numpy as np
import pytest
import torch
import transformers
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from rankwise.errors import RequestError, WorkError
from rankwise.export.certificate import compare, probe_logits
from rankwise.export.gguf_file import check_tokenizer, read_model, write_gguf
from rankwise.export.gguf_metadata import architecture_of, context_length, head_dim, notes_of, rope_factors
from rankwise.export.gguf_tokenizer import vocabulary_of
from rankwise.models.gguf_weights import permute_rotary, unpermute_rotary
from tests import tiny
from tests.export.gguf_models import CUTTERS, FAMILIES, LLAMA3, ROWS, bpe_tokenizer, llama, mistral, piece_tokenizer

PROBES = [tuple(row) for row in torch.randint(3, 400, (2, 40), generator=torch.Generator().manual_seed(0)).tolist()]


def written(model, path, dtype="f32", tokenizer=None):
    tokenizer = bpe_tokenizer() if tokenizer is None else tokenizer
    told = vocabulary_of(tokenizer, model.config.vocab_size, tokenizer.chat_template)
    return write_gguf(model, told, path, dtype, "tiny")


def fields(path):
    return {name: field.contents() for name, field in gguf.GGUFReader(path).fields.items()}


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_is_read_back_as_it_was(family, tmp_path):
    model = FAMILIES[family]()
    written(model, tmp_path / "m.gguf")
    again = read_model(tmp_path / "m.gguf", model.config)
    difference = compare(probe_logits(model, PROBES), probe_logits(again, PROBES))
    assert difference.max_abs_diff < 1e-5 and difference.top1_agreement == 1.0
    assert again.config.tie_word_embeddings == model.config.tie_word_embeddings


@pytest.mark.parametrize(("dtype", "low", "high"), [("f16", 1e-9, 1e-5), ("q8_0", 1e-7, 1e-2)])
def test_rounding(dtype, low, high, tmp_path):
    model = llama()
    kinds = written(model, tmp_path / "m.gguf", dtype).types
    assert set(kinds) == {"F32", dtype.upper()}
    again = read_model(tmp_path / "m.gguf", model.config)
    assert low < compare(probe_logits(model, PROBES), probe_logits(again, PROBES)).kl < high


def test_rows_that_are_no_whole_blocks_stay_f16(tmp_path):
    kinds = written(llama(intermediate_size=72), tmp_path / "m.gguf", "q8_0").types
    assert kinds["F16"] == 2, "down_proj of two layers"


def test_sizes_are_those_of_the_dtypes(tmp_path):
    sizes = {}
    for dtype in ("f32", "f16", "q8_0"):
        written(llama(), tmp_path / dtype, dtype)
        sizes[dtype] = (tmp_path / dtype).stat().st_size
    weights = sum(p.numel() for p in llama().parameters())
    assert sizes["f32"] - sizes["f16"] == pytest.approx(2 * weights, rel=0.01)
    assert sizes["f16"] - sizes["q8_0"] == pytest.approx((2 - 34 / 32) * weights, rel=0.01)


def test_the_metadata(tmp_path):
    tokenizer = bpe_tokenizer("llama-bpe")
    written(llama(head_dim=32), tmp_path / "m.gguf", tokenizer=tokenizer)
    found = fields(tmp_path / "m.gguf")
    assert found["general.architecture"] == "llama" and found["general.type"] == "model"
    assert found["llama.attention.head_count"] == 4 and found["llama.attention.head_count_kv"] == 2
    assert found["llama.attention.key_length"] == found["llama.rope.dimension_count"] == 32
    assert found["llama.context_length"] == 256 and found["llama.vocab_size"] == ROWS
    assert found["llama.rope.freq_base"] == 10000.0
    assert found["tokenizer.ggml.model"] == "gpt2" and found["tokenizer.ggml.pre"] == "llama-bpe"
    assert found["tokenizer.ggml.add_bos_token"] is True and found["tokenizer.ggml.add_eos_token"] is False
    assert found["tokenizer.ggml.bos_token_id"] == 0 and found["tokenizer.ggml.eos_token_id"] == 2
    assert found["tokenizer.chat_template"] == tokenizer.chat_template
    assert len(found["tokenizer.ggml.tokens"]) == len(found["tokenizer.ggml.token_type"]) == ROWS


def test_a_window_that_llama_cpp_does_not_have_bounds_the_context(tmp_path):
    model = mistral(window=64)
    assert context_length(model.config) == 64
    assert notes_of(model.config) == [
        "the context is 64 tokens, the model's sliding window, which llama.cpp does not have"
    ]
    written(model, tmp_path / "m.gguf")
    assert fields(tmp_path / "m.gguf")["llama.context_length"] == 64
    assert context_length(mistral(window=None).config) == 256


def test_llama3_factors_are_transformers_frequencies(tmp_path):
    """The tensor that llama.cpp divides its frequencies by, against transformers' own function."""
    model = llama(rope_parameters=LLAMA3)
    scaled, attention = ROPE_INIT_FUNCTIONS["llama3"](model.config, torch.device("cpu"))
    width = head_dim(model.config)
    plain = 10000.0 ** -(torch.arange(0, width, 2, dtype=torch.float64) / width)
    assert attention == 1.0
    np.testing.assert_allclose(rope_factors(model.config), (plain / scaled.double()).numpy(), rtol=1e-5)
    assert len(set(np.round(rope_factors(model.config), 3))) > 2, "all three bands are there"
    written(model, tmp_path / "m.gguf")
    [tensor] = [t for t in gguf.GGUFReader(tmp_path / "m.gguf").tensors if t.name == "rope_freqs.weight"]
    np.testing.assert_allclose(tensor.data, rope_factors(model.config), rtol=1e-6)


def test_permuting_is_undone():
    weight = np.arange(48.0).reshape(16, 3)
    turned = permute_rotary(weight, 2)
    assert not np.array_equal(turned, weight) and np.array_equal(unpermute_rotary(turned, 2), weight)
    assert turned[:4, 0].tolist() == [0.0, 12.0, 3.0, 15.0], "row 0 of a head of 8 lies beside row 4"


@pytest.mark.parametrize("kind", CUTTERS)
def test_tokenizers_are_read_back_as_they_were(kind, tmp_path):
    tokenizer = bpe_tokenizer(kind)
    written(llama(), tmp_path / "m.gguf", tokenizer=tokenizer)
    assert check_tokenizer(tmp_path / "m.gguf", tokenizer, normalises=kind == "qwen2") > 20


def test_a_tokenizer_of_pieces_is_read_back_as_it_was(tmp_path):
    written(llama(), tmp_path / "m.gguf", tokenizer=piece_tokenizer())
    assert check_tokenizer(tmp_path / "m.gguf", piece_tokenizer(), normalises=False) > 20


def test_a_tokenizer_that_cuts_otherwise_is_found(tmp_path):
    written(llama(), tmp_path / "m.gguf", tokenizer=bpe_tokenizer("gpt-2"))
    with pytest.raises(WorkError, match=r"cuts '.*' into \[.*\], where the model's own has \["):
        check_tokenizer(tmp_path / "m.gguf", bpe_tokenizer("llama-bpe"), normalises=False)


def test_a_file_that_says_something_else_is_found(tmp_path):
    model = llama()
    written(model, tmp_path / "m.gguf")
    other = transformers.LlamaConfig.from_dict({**model.config.to_dict(), "rms_norm_eps": 1e-3})
    with pytest.raises(WorkError, match=r"the file says rms_norm_eps 9.99.*e-07 where the model has 0.001"):
        read_model(tmp_path / "m.gguf", other)


@pytest.mark.parametrize("family", ["gpt2", "gemma3", "mixtral", "cohere"])
def test_other_architectures_are_refused_with_those_that_are_not(family):
    config = tiny.CAUSAL_LMS[family]().config
    with pytest.raises(
        RequestError, match=r"of type '\w+'; it can hold llama, mistral, qwen2, qwen3 .*--to merged takes"
    ):
        architecture_of(config, "gguf")


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"hidden_act": "gelu"}, "hidden_act 'gelu': llama.cpp computes silu"),
        ({"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}}, "rope_type 'dynamic'"),
    ],
)
def test_what_llama_cpp_computes_otherwise_is_refused(fields, message):
    with pytest.raises(RequestError, match=message):
        architecture_of(llama(**fields).config, "gguf")
