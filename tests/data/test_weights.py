"""Answers that count other than once: on which tokens their weights lie, and how they come to a batch."""

from __future__ import annotations

import pytest
import torch

from rankwise.data.config import PREFERENCE, SEQ2SEQ, DataConfig
from rankwise.data.example import Example
from rankwise.data.loader import load_examples
from rankwise.data.packing import collate
from rankwise.data.rows import BadRows
from tests import tiny
from tests.data.builders import GENERATION, example_of, tokenizer_of, write_rows


def talk(*weights: object) -> dict:
    turns = [
        {"role": role, "content": content} | ({"weight": weight} if role == "assistant" and weight is not None else {})
        for number, weight in enumerate(weights)
        for role, content in (("user", f"question {number}"), ("assistant", f"answer {number}"))
    ]
    return {"messages": turns}


def by_text(example: Example, tokenizer) -> dict[str, float]:
    """What each run of tokens with a weight says, and the weight."""
    return {tokenizer.decode(list(example.input_ids[a:b])): weight for a, b, weight in example.weights}


@pytest.mark.parametrize("template", [tiny.CHATML, GENERATION, None], ids=["prefix", "blocks", "plain"])
def test_a_weight_lies_on_its_answer_and_end_token(tmp_path, template) -> None:
    tokenizer = tokenizer_of(template)
    example = example_of(tmp_path, tokenizer, talk(0.5, None, 0, 2.5))
    assert by_text(example, tokenizer) == {"answer 0<|im_end|>": 0.5, "answer 3<|im_end|>": 2.5}
    for first, last, _ in example.weights:
        assert example.labels[first:last] == example.input_ids[first:last]
    assert example.num_trained == len("answer 0") * 3 + 3


def test_a_weight_of_one_is_none(tmp_path) -> None:
    tokenizer = tokenizer_of(tiny.CHATML)
    plain, ones = (example_of(tmp_path, tokenizer, talk(*weights)) for weights in ((None, None), (1, 1.0)))
    assert plain == ones and plain.weights == ()


def test_what_is_cut_has_no_weight(tmp_path) -> None:
    tokenizer = tokenizer_of(tiny.CHATML)
    whole = example_of(tmp_path, tokenizer, talk(0.5, 0.25))
    (start, end, _), (later, _, _) = whole.weights
    cut = example_of(tmp_path, tokenizer, talk(0.5, 0.25), max_length=end - 2)
    assert cut.weights == ((start, end - 2, 0.5),)
    half = example_of(tmp_path, tokenizer, talk(0.5, 0.25), max_length=later + 1)
    assert half.weights == ((start, end, 0.5), (later, later + 1, 0.25))


def test_batches_carry_them_only_where_there_are_some(tmp_path) -> None:
    tokenizer = tokenizer_of(tiny.CHATML)
    rows = [example_of(tmp_path, tokenizer, talk(*weights)) for weights in ((None,), (0.5, 3))]
    assert collate(rows[:1], 0, False).weights is None and collate(rows[:1], 0, True).label_weights() is None
    wanted = [1.0] * 9 + [0.5] * 9 + [3.0] * 9
    for packing in (False, True):
        batch = collate(rows, 0, packing)
        assert batch.weights is not None and batch.weights.shape == batch.input_ids.shape
        weights = batch.label_weights()
        assert weights is not None and weights.tolist() == wanted
        assert torch.equal(batch.to("cpu").weights, batch.weights)


def test_they_are_said(tmp_path) -> None:
    path = write_rows(tmp_path / "rows.jsonl", [talk(0.5, 1), talk(1, 1), talk(0)][:2])
    loaded = load_examples(path, tiny.tiny_tokenizer(), DataConfig(train=path))
    assert "1 row with answers of a weight other than 0 and 1" in loaded.notes
    assert [bool(example.weights) for example in loaded.examples] == [True, False]


@pytest.mark.parametrize("layout", [SEQ2SEQ, PREFERENCE])
def test_other_layouts_refuse_them(tmp_path, layout) -> None:
    row = talk(0.5)
    if layout == PREFERENCE:
        row = {"prompt": "q", "chosen": [row["messages"][1]], "rejected": "b"}
    path = write_rows(tmp_path / "rows.jsonl", [row])
    with pytest.raises(BadRows, match=r"rows.jsonl:1: an answer has weight 0.5; only train.objective sft applies"):
        load_examples(path, tiny.tiny_tokenizer(), DataConfig(train=path), layout)


def test_a_row_with_another_weight_is_another_row(tmp_path) -> None:
    path = write_rows(tmp_path / "rows.jsonl", [talk(0.5), talk(0.25), talk(0.5)])
    keys = load_examples(path, tiny.tiny_tokenizer(), DataConfig(train=path)).examples.column("key").tolist()
    assert keys[0] == keys[2] != keys[1]
