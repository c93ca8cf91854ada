from __future__ import annotations

import pytest
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from rankwise.errors import RequestError
from rankwise.export.gguf_tokenizer import (
    BYTE,
    CONTROL,
    NORMAL,
    PRE_TOKENIZERS,
    UNKNOWN,
    UNUSED,
    USER_DEFINED,
    vocabulary_of,
)
from tests import tiny
from tests.export.gguf_models import CUTTERS, ROWS, bpe_tokenizer, piece_tokenizer


@pytest.mark.parametrize("kind", CUTTERS)
def test_every_way_of_cutting_is_named(kind):
    assert set(CUTTERS) == set(PRE_TOKENIZERS)
    told = vocabulary_of(bpe_tokenizer(kind), ROWS, None)
    assert (told.model, told.pre) == ("gpt2", kind)
    assert (told.add_bos, told.add_eos) == (kind in ("llama-bpe", "tekken"), False)


def test_tokens_types_and_merges():
    tokenizer = bpe_tokenizer()
    told = vocabulary_of(tokenizer, ROWS, "template")
    assert len(told.tokens) == len(told.types) == ROWS and told.chat_template == "template"
    for token, index in tokenizer.get_vocab().items():
        assert told.tokens[index] == token
    kinds = dict(zip(told.tokens, told.types, strict=True))
    assert kinds["<|im_start|>"] == CONTROL and kinds["rankwise"] == USER_DEFINED and kinds["a"] == NORMAL
    padded = ROWS - len(tokenizer)
    assert told.num_padded == padded > 0 and told.types.count(UNUSED) == padded
    assert told.tokens[-1] == f"[PAD{ROWS - 1}]"
    assert all(len(merge.split(" ")) == 2 for merge in told.merges) and len(told.merges) > 50
    assert told.special == {"bos": 0, "eos": 2, "padding": 0}


def test_pieces():
    tokenizer = piece_tokenizer()
    told = vocabulary_of(tokenizer, ROWS, None)
    assert (told.model, told.add_bos, told.adds_space) == ("llama", True, True)
    kinds = dict(zip(told.tokens, told.types, strict=True))
    assert kinds["<0x0A>"] == BYTE and kinds["<unk>"] == UNKNOWN and kinds["<s>"] == CONTROL
    scores = dict(zip(told.tokens, told.scores, strict=True))
    made = [merge.replace(" ", "") for merge in told.merges]
    assert [scores[token] for token in dict.fromkeys(made)] == sorted(
        (scores[t] for t in dict.fromkeys(made)), reverse=True
    )


@pytest.mark.parametrize(
    ("tokenizer", "note"),
    [
        (bpe_tokenizer("qwen2"), "NFC, which llama.cpp does not"),
        (bpe_tokenizer("tekken"), "combining marks"),
        (piece_tokenizer(), "a text that begins with one"),
    ],
)
def test_what_llama_cpp_cuts_otherwise_is_noted(tokenizer, note):
    [found] = vocabulary_of(tokenizer, ROWS, None).notes
    assert note in found
    assert vocabulary_of(bpe_tokenizer("smollm"), ROWS, None).notes == []
    assert vocabulary_of(piece_tokenizer(prepends=True), ROWS, None).notes == []


def test_more_tokens_than_rows():
    with pytest.raises(
        RequestError, match=r"has a token 'rankwise' of id \d+, and the model's embedding 300 rows; res"
    ):
        vocabulary_of(bpe_tokenizer(), 300, None)


def fast(model, **fields) -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(model)
    for name, value in fields.items():
        setattr(tokenizer, name, value)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="a", pad_token="a")


def test_what_can_not_be_named_is_refused():
    with pytest.raises(
        RequestError, match=r"cuts text in a way \(bytes\) that --to gguf can't name .*; known: gpt-2, sm"
    ):
        vocabulary_of(tiny.tiny_tokenizer(), 260, None)
    with pytest.raises(RequestError, match="the tokenizer is a WordPiece, which --to gguf can't hold"):
        vocabulary_of(tiny.word_tokenizer(), 260, None)
    with pytest.raises(RequestError, match="the tokenizer is a Unigram"):
        vocabulary_of(fast(models.Unigram([("a", -1.0)], 0)), 260, None)
    alphabet = {letter: i for i, letter in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    bytes_ = pre_tokenizers.ByteLevel(add_prefix_space=False)
    lower = fast(models.BPE(alphabet, []), normalizer=normalizers.Lowercase(), pre_tokenizer=bytes_)
    with pytest.raises(RequestError, match=r'normalizer {"type": "Lowercase"}'):
        vocabulary_of(lower, 260, None)
    prefixed = fast(models.BPE(alphabet, []), pre_tokenizer=pre_tokenizers.ByteLevel(add_prefix_space=True))
    with pytest.raises(RequestError, match=r"pre-tokenizer .*add_prefix_space"):
        vocabulary_of(prefixed, 260, None)


def test_tokens_around_a_text_that_are_not_bos_and_eos():
    tokenizer = bpe_tokenizer("llama-bpe")
    tokenizer.bos_token = "<|im_start|>"
    with pytest.raises(RequestError, match=r"puts tokens around a text .* that are not its bos and eos"):
        vocabulary_of(tokenizer, ROWS, None)
