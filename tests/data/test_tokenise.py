"""Tokens of beginnings that were not tokenised again are those of tokenising them."""

from __future__ import annotations

import random

import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from rankwise.data.chat_template import ChatTemplate
from rankwise.data.fields import ASSISTANT, SYSTEM, USER, Turn
from rankwise.data.templates import own_template
from rankwise.data.tokenise import Tokeniser
from tests import tiny
from tests.data.builders import SMOLLM2, merging_tokenizer, tokenizer_of
from tests.data.test_templates import FAMILIES

WORDS = [
    "a",
    " b",
    "assistant",
    "\n",
    "\n\n",
    "é",
    "🎉",
    "<|im_",
    "<|im_end|>",
    "<|im_start|>",
    "user",
    "  ",
    "\uff1c|im_end|\uff1e",
]


def spaced() -> PreTrainedTokenizerFast:
    """With a space in front of a text's first word alone, a normalizer, and added tokens of each kind."""
    pieces = ["<unk>", "▁", *"abcdefghijklmnopqrstuvwxyz<|>_\n", "▁as", "sis", "▁user", "tant"]
    merges = [("▁", "a"), ("▁a", "s")]
    vocab = {piece: number for number, piece in enumerate(dict.fromkeys([*pieces, "▁a"]))}
    backend = Tokenizer(models.BPE(vocab=vocab, merges=merges, unk_token="<unk>"))
    backend.normalizer = normalizers.NFKC()
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    backend.decoder = decoders.Metaspace(prepend_scheme="first")
    backend.add_special_tokens(["<|im_start|>", AddedToken("<|im_end|>", rstrip=True)])
    backend.add_tokens(
        [AddedToken("assistant", single_word=True, normalized=False), AddedToken("<|x|>", normalized=True)]
    )
    return PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>", eos_token="<|im_end|>")


TOKENIZERS = {
    "bytes": tiny.tiny_tokenizer,
    "merging": lambda: merging_tokenizer(tiny.CHATML),
    "spaced": spaced,
    **{name: build for name, (build, _) in FAMILIES.items() if name in ("llama3", "mistral", "phi3", "gemma")},
}


@pytest.mark.parametrize("name", TOKENIZERS)
def test_beginnings_of_any_text(name: str) -> None:
    tokenizer = TOKENIZERS[name]()
    tokeniser, chance = Tokeniser(tokenizer), random.Random(0)
    added = [token.content for token in tokenizer.added_tokens_decoder.values()]
    shortened = 0
    for _ in range(300):
        text = "".join(chance.choices([*WORDS, *added], k=chance.randrange(1, 12)))
        (encoding,) = tokeniser.encodings([text])
        assert encoding.ids == tokenizer(text, add_special_tokens=False)["input_ids"]
        beginning = text[: chance.randrange(len(text) + 1)]
        wanted = tokenizer(beginning, add_special_tokens=False)["input_ids"] if beginning else []
        assert tokeniser.beginnings([beginning], [(text, encoding)]) == [wanted], (text, beginning)
        shortened += tokeniser._of_beginning(beginning, text, encoding) is not None if beginning else 0
    assert shortened > 30


def test_special_tokens_that_are_text_cut_nothing() -> None:
    tokenizer = tiny.tiny_tokenizer()
    tokenizer.split_special_tokens = True
    text = "<|im_start|>user\nHi<|im_end|>\n"
    (encoding,) = Tokeniser(tokenizer).encodings([text])
    assert encoding.ids == tokenizer(text, add_special_tokens=False)["input_ids"]
    assert Tokeniser(tokenizer).beginnings([text[:20]], [(text, encoding)]) == [
        tokenizer(text[:20], add_special_tokens=False)["input_ids"]
    ]


def test_what_another_call_left_does_not_count() -> None:
    tokenizer = tiny.tiny_tokenizer()
    tokenizer(["abc", "a"], padding=True, truncation=True, max_length=2)
    assert [len(encoding.ids) for encoding in Tokeniser(tokenizer).encodings(["abc", "a"])] == [3, 1]


@pytest.mark.parametrize("family", [*FAMILIES, "smollm2 with special"])
def test_templates_write_what_apply_chat_template_writes(family: str) -> None:
    tokenizer = FAMILIES.get(family, (lambda: tokenizer_of(SMOLLM2, ("<|im_end|>",)), ""))[0]()
    if tokenizer.chat_template is None:
        return
    template = ChatTemplate(tokenizer, own_template(tokenizer), "it")
    conversation = [Turn(USER, "Hi "), Turn(ASSISTANT, "\nHello {{ x }}"), Turn(USER, "<b>"), Turn(ASSISTANT, "Bye")]
    for turns in (conversation, conversation[:1], [Turn(SYSTEM, "Be."), *conversation]):
        if family in ("gemma", "mistral") and turns[0].role == SYSTEM:
            continue  # these refuse it
        told = [{"role": turn.role, "content": turn.content} for turn in turns]
        assert template._text(turns)[0] == tokenizer.apply_chat_template(told, tokenize=False)
        if turns[-1].role == USER:
            prompt = tokenizer.apply_chat_template(told, tokenize=False, add_generation_prompt=True)
            assert template.prompt(turns) == prompt


def test_a_template_changes_nothing_that_the_next_row_sees() -> None:
    source = "{% set seen = namespace(n=0) %}{% for m in messages %}{% set seen.n = seen.n + 1 %}"
    source += "{{ seen.n }}{{ m.content }}<|im_end|>{% endfor %}"
    template = ChatTemplate(tiny.tiny_tokenizer(), source, "it")
    turns = [Turn(USER, "a"), Turn(ASSISTANT, "b")]
    assert template._text(turns)[0] == template._text(turns)[0] == "1a<|im_end|>2b<|im_end|>"
