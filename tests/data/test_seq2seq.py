from __future__ import annotations

import json
from pathlib import Path

import pytest
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast

from rankwise.data.config import SEQ2SEQ, DataConfig
from rankwise.data.example import Example
from rankwise.data.fields import ASSISTANT, USER, Turn
from rankwise.data.loaded import Loaded
from rankwise.data.loader import load_examples
from rankwise.data.rows import BadRows
from rankwise.data.seq2seq import collate_seq2seq
from rankwise.data.templates import render_prompt, stop_token_ids
from tests import tiny

START, END = 256, 258
ROW = {"prompt": "ab", "completion": "cde"}


def tokenizer(before: bool = False, template: str | None = None) -> PreTrainedTokenizerFast:
    """One that ends texts by itself, as T5's does, or also begins them, as BART's does."""
    made = tiny.tiny_tokenizer(template)
    single = "<|endoftext|> $A <|im_end|>" if before else "$A <|im_end|>"
    special = [("<|im_end|>", END), ("<|endoftext|>", START)]
    made.backend_tokenizer.post_processor = TemplateProcessing(single=single, pair=None, special_tokens=special)
    return made


def load(folder: Path, rows: list[dict], tokenizer: PreTrainedTokenizerFast, **settings: object) -> Loaded:
    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return load_examples(str(path), tokenizer, DataConfig(train=str(path), **settings), SEQ2SEQ)  # type: ignore[arg-type]


def sides(example: Example) -> tuple[str, str]:
    asked = example.parts[0]
    decode = tiny.tiny_tokenizer().decode
    return str(decode(list(example.input_ids[:asked]))), str(decode(list(example.input_ids[asked:])))


@pytest.mark.parametrize("before", [False, True])
def test_both_sides_have_the_tokenizers_own_special_tokens(tmp_path: Path, before: bool) -> None:
    made = tokenizer(before)
    example = load(tmp_path, [ROW], made).examples[0]
    assert list(example.input_ids[: example.parts[0]]) == made("ab")["input_ids"]
    assert list(example.input_ids[example.parts[0] :]) == made(text_target="cde")["input_ids"]
    assert example.num_trained == example.parts[1] and example.prompt_ids == example.input_ids[: example.parts[0]]


def test_a_tokenizer_that_adds_nothing_still_ends_answers(tmp_path: Path) -> None:
    made = tiny.tiny_tokenizer(None)
    assert sides(load(tmp_path, [ROW], made).examples[0]) == ("ab", "cde<|im_end|>")
    assert stop_token_ids(made, DataConfig(train="rows"), SEQ2SEQ) == (END,)


def test_generation_starts_from_what_training_saw(tmp_path: Path) -> None:
    made = tokenizer()
    example = load(tmp_path, [ROW], made).examples[0]
    assert render_prompt(made, [Turn(USER, "ab")], DataConfig(train="rows"), SEQ2SEQ)[1] == example.prompt_ids


@pytest.mark.parametrize(
    ("row", "asked"),
    [
        ({"instruction": "Turn", "input": "it", "output": "x"}, "Turn\n\nit"),
        ({"translation": {"en": "good day", "fr": "x"}}, "good day"),
        ({"instruction": "u", "system": "s", "output": "x"}, "s\n\nu"),
    ],
)  # fmt: skip
def test_formats(tmp_path: Path, row: dict, asked: str) -> None:
    assert sides(load(tmp_path, [row], tokenizer()).examples[0]) == (f"{asked}<|im_end|>", "x<|im_end|>")


TURNS = ((USER, "a"), (ASSISTANT, "b"), (USER, "c"), (ASSISTANT, "d"))
TALK = {"messages": [{"role": role, "content": text} for role, text in TURNS]}


def test_a_conversation_needs_a_template(tmp_path: Path) -> None:
    with pytest.raises(BadRows, match=r"rows.jsonl:1: .*one question, not user, assistant, user.*chat_template=plain"):
        load(tmp_path, [TALK], tokenizer())
    plain = load(tmp_path, [TALK], tokenizer(), chat_template="plain").examples[0]
    assert sides(plain)[0].startswith("### User:\na\n\n### Assistant:\nb") and sides(plain)[1] == "d<|im_end|>"


def test_a_tokenizers_own_chat_template_writes_the_question(tmp_path: Path) -> None:
    example = load(tmp_path, [TALK], tokenizer(template=tiny.CHATML)).examples[0]
    question, answer = sides(example)
    assert question.endswith("<|im_start|>user\nc<|im_end|>\n<|im_start|>assistant\n") and answer == "d<|im_end|>"


def test_each_side_is_cut_by_itself_and_counted(tmp_path: Path) -> None:
    rows = [ROW, {"prompt": "p" * 30, "completion": "c"}, {"prompt": "p", "completion": "c" * 30}]
    loaded = load(tmp_path, rows, tokenizer(), max_length=8)
    assert loaded.num_truncated == 2 and [example.parts for example in loaded.examples] == [(3, 4), (8, 2), (2, 8)]
    assert len(loaded.examples[1].prompt_ids) == 31, "what generation starts from is never cut"
    assert loaded.examples[1].longest == 8


@pytest.mark.parametrize(
    ("value", "reason"),
    [
        ("x", "translation is a string, must be an object"),
        ({"en": "a"}, "translation has a text in 'en' only; the one in the other language is missing"),
        ({"en": "a", "fr": "b", "de": "c"}, "translation has 3 texts"),
        ({"en": "a", "fr": " "}, "translation.fr is empty"),
        ({"en": "a", "fr": None}, "translation.fr is null, must be a string"),
    ],
)
def test_bad_translations_are_named(tmp_path: Path, value: object, reason: str) -> None:
    with pytest.raises(BadRows, match=rf"rows.jsonl:2: {reason}"):
        load(tmp_path, [{"translation": {"en": "a", "fr": "b"}}, {"translation": value}], tokenizer())


def test_batches_are_padded_on_the_right(tmp_path: Path) -> None:
    examples = load(tmp_path, [ROW, {"prompt": "abcd", "completion": "c"}], tokenizer()).examples
    batch = collate_seq2seq(examples, 259, False)
    assert batch.input_ids[0, -2:].tolist() == [259, 259] and batch.attention_mask[0].tolist() == [1, 1, 1, 0, 0]
    assert batch.labels[1, 1:].tolist() == [END, -100, -100]
    assert batch.num_trained == sum(example.num_trained for example in examples)
