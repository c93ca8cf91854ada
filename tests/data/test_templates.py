from __future__ import annotations

import dataclasses

import pytest

from rankwise.data.config import DataConfig
from rankwise.data.formats import ASSISTANT, Turn
from rankwise.data.loader import load_examples
from rankwise.data.rows import BadRows
from rankwise.data.templates import render_prompt, stop_token_ids, template_for
from rankwise.errors import RequestError
from tests import tiny
from tests.data.builders import (
    GEMMA,
    GENERATION,
    GENERATION_WITH_HEADER,
    GENERATION_WITHOUT_END,
    LLAMA3,
    MISTRAL,
    PHI3,
    PHI4,
    QWEN3,
    QWEN25,
    SMOLLM2,
    SYSTEM_IN_LAST_USER_TURN,
    THINKING,
    adding_bos,
    example_of,
    marked,
    merging_tokenizer,
    messages,
    tokenizer_of,
    turns,
    write_rows,
)  # fmt: skip

CONFIG = DataConfig(train="unused.jsonl")
LLAMA3_TOKENS = ("<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", "<|end_of_text|>")

FAMILIES = {
    "chatml": (tiny.tiny_tokenizer, "<|im_end|>"),
    "llama3": (
        lambda: tokenizer_of(LLAMA3, LLAMA3_TOKENS, bos="<|begin_of_text|>", eos="<|end_of_text|>"),
        "<|eot_id|>",
    ),
    "gemma": (
        lambda: tokenizer_of(GEMMA, ("<bos>", "<eos>", "<start_of_turn>", "<end_of_turn>"), bos="<bos>", eos="<eos>"),
        "<end_of_turn>",
    ),
    "mistral": (lambda: tokenizer_of(MISTRAL, ("<s>", "</s>", "[INST]", "[/INST]"), bos="<s>", eos="</s>"), "</s>"),
    "generation": (lambda: tiny.tiny_tokenizer(GENERATION), "<|im_end|>"),
    "thinking": (lambda: tiny.tiny_tokenizer(THINKING), "<|im_end|>"),
    "plain": (lambda: tiny.tiny_tokenizer(None), "<|im_end|>"),
    "smollm2": (lambda: tiny.tiny_tokenizer(SMOLLM2), "<|im_end|>"),
    "qwen2.5": (lambda: tiny.tiny_tokenizer(QWEN25), "<|im_end|>"),
    "qwen3": (lambda: tiny.tiny_tokenizer(QWEN3), "<|im_end|>"),
    "phi3": (
        lambda: tokenizer_of(
            PHI3, ("<|user|>", "<|assistant|>", "<|system|>", "<|end|>", "<|endoftext|>"), eos="<|endoftext|>"
        ),
        "<|end|>",
    ),
    "phi4": (
        lambda: tokenizer_of(PHI4, ("<|im_start|>", "<|im_sep|>", "<|im_end|>", "<|endoftext|>"), eos="<|endoftext|>"),
        "<|im_end|>",
    ),
}

GOLDEN = {
    "chatml": (
        "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n⟦Hello, 世界!<|im_end|>⟧\n"
        "<|im_start|>user\nAgain<|im_end|>\n<|im_start|>assistant\n⟦Bye 🎉<|im_end|>⟧\n"
    ),
    "llama3": (
        "<|begin_of_text|><|start_header_id|>user<|end_header_id|>\n\nHi<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n⟦Hello, 世界!<|eot_id|>⟧"
        "<|start_header_id|>user<|end_header_id|>\n\nAgain<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n⟦Bye 🎉<|eot_id|>⟧"
    ),
    "gemma": (
        "<bos><start_of_turn>user\nHi<end_of_turn>\n<start_of_turn>model\n⟦Hello, 世界!<end_of_turn>⟧\n"
        "<start_of_turn>user\nAgain<end_of_turn>\n<start_of_turn>model\n⟦Bye 🎉<end_of_turn>⟧\n"
    ),
    "mistral": "<s>[INST] Hi [/INST]⟦ Hello, 世界!</s>⟧[INST] Again [/INST]⟦ Bye 🎉</s>⟧",
    "generation": (
        "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n⟦Hello, 世界!<|im_end|>⟧\n"
        "<|im_start|>user\nAgain<|im_end|>\n<|im_start|>assistant\n⟦Bye 🎉<|im_end|>⟧\n"
    ),
    "thinking": (
        "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n⟦Hello, 世界!<|im_end|>⟧\n"
        "<|im_start|>user\nAgain<|im_end|>\n<|im_start|>assistant\n⟦<think>\n\n</think>\n\nBye 🎉<|im_end|>⟧\n"
    ),
    "plain": (
        "### User:\nHi\n\n### Assistant:\n⟦Hello, 世界!<|im_end|>⟧\n\n"
        "### User:\nAgain\n\n### Assistant:\n⟦Bye 🎉<|im_end|>⟧"
    ),
    "smollm2": (
        "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n"
        "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n⟦Hello, 世界!<|im_end|>⟧\n"
        "<|im_start|>user\nAgain<|im_end|>\n<|im_start|>assistant\n⟦Bye 🎉<|im_end|>⟧\n"
    ),
    "qwen2.5": (
        "<|im_start|>system\nYou are Qwen, created by Alibaba Cloud. You are a helpful assistant.<|im_end|>\n"
        "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n⟦Hello, 世界!<|im_end|>⟧\n"
        "<|im_start|>user\nAgain<|im_end|>\n<|im_start|>assistant\n⟦Bye 🎉<|im_end|>⟧\n"
    ),
    "qwen3": (
        "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n⟦Hello, 世界!<|im_end|>⟧\n"
        "<|im_start|>user\nAgain<|im_end|>\n<|im_start|>assistant\n⟦<think>\n\n</think>\n\nBye 🎉<|im_end|>⟧\n"
    ),
    "phi3": (
        "<|user|>\nHi<|end|>\n<|assistant|>\n⟦Hello, 世界!<|end|>⟧\n"
        "<|user|>\nAgain<|end|>\n<|assistant|>\n⟦Bye 🎉<|end|>⟧\n<|endoftext|>"
    ),
    "phi4": (
        "<|im_start|>user<|im_sep|>Hi<|im_end|><|im_start|>assistant<|im_sep|>⟦Hello, 世界!<|im_end|>⟧"
        "<|im_start|>user<|im_sep|>Again<|im_end|><|im_start|>assistant<|im_sep|>⟦Bye 🎉<|im_end|>⟧"
    ),
}
ROW = messages("Hi", "Hello, 世界!", "Again", "Bye 🎉")


@pytest.mark.parametrize("family", FAMILIES)
def test_text_and_trained_parts_are_as_written_here(family, tmp_path):
    example = example_of(tmp_path, FAMILIES[family][0](), ROW)
    assert marked(example) == GOLDEN[family]


@pytest.mark.parametrize("family", FAMILIES)
def test_every_label_is_right(family, tmp_path):
    """A byte-level tokenizer has no merges: the pieces of the golden text, tokenised apart, give ids and labels."""
    tokenizer = FAMILIES[family][0]()
    example = example_of(tmp_path, tokenizer, ROW)
    expected_ids, expected_labels = [], []
    for piece in GOLDEN[family].replace("⟦", "\0⟦").replace("⟧", "\0").split("\0"):
        ids = tokenizer(piece.removeprefix("⟦"), add_special_tokens=False)["input_ids"]
        expected_ids += ids
        expected_labels += ids if piece.startswith("⟦") else [-100] * len(ids)
    assert list(example.input_ids) == expected_ids
    assert list(example.labels) == expected_labels
    end = tokenizer.convert_tokens_to_ids(FAMILIES[family][1])
    assert example.labels.count(end) == 2


@pytest.mark.parametrize("family", FAMILIES)
def test_generation_starts_from_what_training_saw(family, tmp_path):
    tokenizer = FAMILIES[family][0]()
    example = example_of(tmp_path, tokenizer, ROW)
    text, ids = render_prompt(tokenizer, turns("Hi", "Hello, 世界!", "Again"), CONFIG)
    assert ids == example.prompt_ids == example.input_ids[: len(ids)]
    assert example.labels[len(ids)] != -100
    assert example.labels[len(ids) - 1] == -100
    assert example.text.startswith(text)
    assert (example.answer, example.prompt_text) == ("Bye 🎉", "Again")


@pytest.mark.parametrize("family", FAMILIES)
def test_generation_stops_on_the_trained_end(family):
    make, end = FAMILIES[family]
    tokenizer = make()
    ids = stop_token_ids(tokenizer, CONFIG)
    assert ids[0] == tokenizer.convert_tokens_to_ids(end)
    assert tokenizer.eos_token_id in ids
    assert len(set(ids)) == len(ids)


def test_qwen3_keeps_the_last_thought_and_a_row_with_an_earlier_one_is_bad(tmp_path):
    thought = "<think>\nhm\n</think>\n\nBye"
    example = example_of(tmp_path, tiny.tiny_tokenizer(QWEN3), messages("Hi", "Yo", "Again", thought))
    assert marked(example).endswith("<|im_start|>assistant\n⟦<think>\nhm\n</think>\n\nBye<|im_end|>⟧\n")
    with pytest.raises(BadRows, match="changes answer 1"):
        example_of(tmp_path, tiny.tiny_tokenizer(QWEN3), messages("Hi", thought, "Again", "Yo"))


def test_qwen25_writes_tools_and_trains_on_calls_but_not_on_results(tmp_path):
    tools = [{"type": "function", "function": {"name": "weather", "parameters": {"type": "object", "properties": {}}}}]
    call = {"type": "function", "function": {"name": "weather", "arguments": {"place": "Rome"}}}
    row = {
        "tools": tools,
        "messages": [
            {"role": "user", "content": "Rome?"},
            {"role": "assistant", "content": "", "tool_calls": [call]},
            {"role": "tool", "content": "sunny"},
            {"role": "assistant", "content": "Sunny."},
        ],
    }
    written = marked(example_of(tmp_path, tiny.tiny_tokenizer(QWEN25), row))
    assert '"name": "weather"' in written.split("<|im_end|>")[0]
    assert written.endswith(
        "<|im_start|>user\nRome?<|im_end|>\n<|im_start|>assistant\n⟦<tool_call>\n"
        '{"name": "weather", "arguments": {"place": "Rome"}}\n</tool_call><|im_end|>⟧\n'
        "<|im_start|>user\n<tool_response>\nsunny\n</tool_response><|im_end|>\n<|im_start|>assistant\n⟦Sunny.<|im_end|>⟧\n"
    )


def test_answers_that_a_template_trims_are_found(tmp_path):
    example = example_of(tmp_path, FAMILIES["llama3"][0](), messages(" Hi ", "\n Hello \n"))
    assert marked(example).endswith("assistant<|end_header_id|>\n\n⟦Hello<|eot_id|>⟧")


def test_an_answer_that_repeats_its_question(tmp_path):
    example = example_of(tmp_path, tiny.tiny_tokenizer(), messages("a", "a", "assistant", "user\na"))
    assert [example.text[start:end] for start, end in example.spans] == ["a<|im_end|>", "user\na<|im_end|>"]


def test_system_turns_are_not_trained(tmp_path):
    example = example_of(tmp_path, tiny.tiny_tokenizer(), messages("Hi", "Yo", system="Be brief."))
    assert marked(example) == (
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n"
        "<|im_start|>assistant\n⟦Yo<|im_end|>⟧\n"
    )
    plain = example_of(tmp_path, tiny.tiny_tokenizer(), messages("Hi", "Yo", system="Be brief."), chat_template="plain")
    assert marked(plain) == "### System:\nBe brief.\n\n### User:\nHi\n\n### Assistant:\n⟦Yo<|im_end|>⟧"


def test_a_template_that_breaks_the_prefix_property_is_refused(tmp_path):
    tokenizer = tokenizer_of(SYSTEM_IN_LAST_USER_TURN, ("</s>",), eos="</s>")
    fine = example_of(tmp_path, tokenizer, messages("Hi", "Yo", system="S"))
    assert marked(fine) == "[INST] S Hi [/INST]⟦ Yo</s>⟧"
    with pytest.raises(RequestError, match=r"one.jsonl:1: .*before answer 1 of 2 differently .*character 7"):
        example_of(tmp_path, tokenizer, messages("Hi", "Yo", "Hm", "Oh", system="S"))


def test_rows_that_a_template_refuses_are_bad_rows(tmp_path):
    tokenizer = FAMILIES["gemma"][0]()
    path = write_rows(tmp_path / "rows.jsonl", [messages("Hi", "Yo"), messages("Hi", "Yo", system="S")])
    with pytest.raises(BadRows) as caught:
        load_examples(path, tokenizer, CONFIG)
    assert [(problem.line, "System role not supported" in problem.reason) for problem in caught.value.problems] == [
        (2, True)
    ]


def test_a_template_that_rewrites_an_answer_is_a_bad_row(tmp_path):
    template = tiny.CHATML.replace("message['content'] }}<", "message['content'].split('</think>')[-1] }}<")
    assert template != tiny.CHATML
    with pytest.raises(BadRows, match="changes answer 1"):
        example_of(tmp_path, tiny.tiny_tokenizer(template), messages("Hi", "<think>hm</think>Yo"))


@pytest.mark.parametrize(
    ("template", "words"),
    [
        ("{% for m in messages %}{{ m['content'] }}\n{% endfor %}", "no token of its own"),
        ("{% for m in messages if m['role'] == 'user' %}{{ m['content'] }}<|im_end|>{% endfor %}", "leaves the answer"),
        ("{% for m in messages %}{{ m['content'] }", "fails on a question and its answer"),
        ("{% for m in messages %}{{ m['content'] + 1 }}{% endfor %}", "fails on a question and its answer"),
        (GENERATION_WITH_HEADER, "holds the header"),
    ],
)  # fmt: skip
def test_unusable_templates_are_refused(template, words):
    with pytest.raises(RequestError, match=words):
        template_for(tiny.tiny_tokenizer(template), CONFIG)


def test_generation_blocks_without_the_end_token_are_extended(tmp_path):
    tokenizer = tiny.tiny_tokenizer(GENERATION_WITHOUT_END)
    assert marked(example_of(tmp_path, tokenizer, ROW)) == GOLDEN["generation"]
    assert any("out of its generation blocks" in note for note in template_for(tokenizer, CONFIG).notes)


def test_a_template_from_a_file(tmp_path):
    path = tmp_path / "own.jinja"
    path.write_text(tiny.CHATML)
    tokenizer = tiny.tiny_tokenizer(None)
    assert marked(example_of(tmp_path, tokenizer, ROW, chat_template=str(path))) == GOLDEN["chatml"]
    with pytest.raises(RequestError, match="can't be read"):
        template_for(tokenizer, dataclasses.replace(CONFIG, chat_template=str(tmp_path / "none.jinja")))


def test_named_templates_take_the_default():
    tokenizer = tiny.tiny_tokenizer(None)
    tokenizer.chat_template = {"default": tiny.CHATML, "tool_use": LLAMA3}
    assert render_prompt(tokenizer, turns("Hi"), CONFIG)[0] == "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    tokenizer.chat_template = {"tool_use": LLAMA3}
    with pytest.raises(RequestError, match="no default"):
        template_for(tokenizer, CONFIG)


def test_the_plain_fallback_is_stated(tmp_path):
    path = write_rows(tmp_path / "rows.jsonl", [ROW])
    loaded = load_examples(path, tiny.tiny_tokenizer(None), CONFIG)
    assert any("no chat template" in note for note in loaded.notes)
    asked_for = load_examples(path, tiny.tiny_tokenizer(None), dataclasses.replace(CONFIG, chat_template="plain"))
    assert asked_for.notes == ()


@pytest.mark.parametrize(("prompt", "between"), [("Once", "\n"), ("def f():\n", ""), ("Q: ", "")])
def test_completion_has_nothing_around_it(tmp_path, prompt, between):
    config = dataclasses.replace(CONFIG, chat_template="completion")
    tokenizer = tiny.tiny_tokenizer()
    example = example_of(tmp_path, tokenizer, {"prompt": prompt, "completion": "upon"}, chat_template="completion")
    assert marked(example) == f"{prompt}{between}⟦upon<|im_end|>⟧"
    text, ids = render_prompt(tokenizer, turns(prompt), config)
    assert (text, ids) == (prompt + between, example.prompt_ids)
    with pytest.raises(BadRows, match="takes one user turn and its answer"):
        example_of(tmp_path, tokenizer, ROW, chat_template="completion")
    with pytest.raises(RequestError, match="can't be a prompt"):
        render_prompt(tokenizer, turns("a", "b", "c"), config)


def test_text_is_trained_whole(tmp_path):
    tokenizer = tiny.tiny_tokenizer()
    example = example_of(tmp_path, tokenizer, {"text": "Some text."})
    assert marked(example) == "⟦Some text.<|im_end|>⟧"
    assert example.labels == example.input_ids
    assert (example.prompt_ids, example.answer, example.source) == ((), "", "")
    as_text = dataclasses.replace(CONFIG, format="text")
    assert render_prompt(tokenizer, turns("Some"), as_text)[0] == "Some"
    assert stop_token_ids(tokenizer, as_text) == (tokenizer.eos_token_id,)
    with pytest.raises(RequestError, match="has no effect on rows of format text"):
        example_of(tmp_path, tokenizer, {"text": "Some text."}, chat_template="plain")


def test_a_beginning_token_comes_first_where_the_tokenizer_adds_it(tmp_path):
    tokenizer = adding_bos(tiny.tiny_tokenizer(None))
    bos = tokenizer.bos_token_id
    rows = {"text": {"text": "abc"}, "plain": messages("Hi", "Yo")}
    for row in rows.values():
        example = example_of(tmp_path, tokenizer, row)
        assert example.input_ids[0] == bos
        assert example.input_ids.count(bos) == 1
        assert example.labels[0] == -100
        assert len(example.labels) == len(example.input_ids)
    assert example.prompt_ids[0] == bos
    assert render_prompt(tokenizer, turns("Hi"), CONFIG)[1] == example.prompt_ids
    assert tokenizer(example.text)["input_ids"] == list(example.input_ids)
    with_template = adding_bos(tiny.tiny_tokenizer())
    assert bos not in example_of(tmp_path, with_template, messages("Hi", "Yo")).input_ids


def test_a_token_across_the_boundary_is_not_trained_and_is_counted(tmp_path):
    path = write_rows(tmp_path / "rows.jsonl", [messages("Hi", "\nYo"), messages("Hi", "Yo")])
    loaded = load_examples(path, merging_tokenizer(tiny.CHATML), CONFIG)
    assert [marked(example).split("assistant")[1] for example in loaded.examples] == [
        "\n\n⟦Yo<|im_end|>⟧\n",
        "\n⟦Yo<|im_end|>⟧\n",
    ]
    assert [text for text in loaded.warnings if text.startswith("1 row with an answer that begins inside a token")]


def test_special_tokens_written_in_rows_are_counted(tmp_path):
    path = write_rows(tmp_path / "rows.jsonl", [messages("say <|im_start|>", "Yo"), messages("Hi", "Yo")])
    loaded = load_examples(path, tiny.tiny_tokenizer(), CONFIG)
    assert [text for text in loaded.warnings if text.startswith("1 row with special tokens")]


def test_tokenizers_without_an_end_token_are_refused():
    tokenizer = tiny.tiny_tokenizer(None)
    tokenizer.eos_token = None
    with pytest.raises(RequestError, match="no end-of-text token"):
        template_for(tokenizer, CONFIG)


@pytest.mark.unchecked
def test_slow_tokenizers_are_refused():
    class Slow:
        is_fast = False
        name_or_path = "some/model"

    with pytest.raises(RequestError, match=r"Slow .*some/model.* has no fast version"):
        template_for(Slow(), CONFIG)  # type: ignore[arg-type]


def test_a_template_that_writes_the_date_says_so():
    dated = "{{ strftime_now('%Y') }}" + tiny.CHATML
    assert any("today's date" in note for note in template_for(tiny.tiny_tokenizer(dated), CONFIG).notes)


def test_prompts_of_turns_that_end_otherwise():
    with pytest.raises(RequestError, match="can't be a prompt"):
        render_prompt(FAMILIES["gemma"][0](), turns("Hi", system="S"), CONFIG)
    assert render_prompt(tiny.tiny_tokenizer(None), [Turn("user", "Hi")], CONFIG)[0] == (
        "### User:\nHi\n\n### Assistant:\n"
    )
    assert ASSISTANT == "assistant"
