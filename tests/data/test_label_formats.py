"""Rows with labels, tags and pairs: what is read, what is refused and why, and what becomes of it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedTokenizerBase

from rankwise.data.config import DataConfig
from rankwise.data.example import Example
from rankwise.data.fingerprint import fingerprint
from rankwise.data.formats import FORMATS, RowError, detect
from rankwise.data.head_batches import collate_classes, collate_tags, collate_texts
from rankwise.data.head_encoder import CLASSES, PAIRS, TAGS
from rankwise.data.labels import check_labels, find_labels, imbalance_warning, survey_training
from rankwise.data.loader import load_examples
from rankwise.data.preview import preview
from rankwise.data.rows import BadRows
from rankwise.errors import RequestError
from rankwise.models.batch import IGNORED
from rankwise.models.labels import Labels
from tests import tiny

ROWS: dict[str, dict[str, Any]] = {
    "label": {"text": "I like it", "label": "good"},
    "labels": {"text": "I like it", "labels": ["good", "short"]},
    "tags": {"words": ["Ada", "smiled"], "tags": ["B-PER", "O"]},
    "pairs": {"anchor": "what is it?", "positive": "a cat", "negatives": ["a dog", "a cow"]},
}


def write(path: Path, rows: list[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def roles(name: str, row: dict[str, Any]) -> list[tuple[str, str]]:
    return [(turn.role, turn.content) for turn in FORMATS[name].turns(row)]


@pytest.fixture(scope="module")
def bert_tokenizer() -> PreTrainedTokenizerBase:
    return tiny.word_tokenizer()


@pytest.mark.parametrize("name", ROWS)
def test_detected_and_said_why(name: str) -> None:
    assert detect([(1, ROWS[name])], "f")[0] == name
    assert "1 of 1 row has" in detect([(1, ROWS[name])], "f")[1]


def test_turns() -> None:
    assert roles("label", ROWS["label"]) == [("text", "I like it"), ("label", "good")]
    assert roles("label", {"text": "a", "text_pair": "b", "label": 3}) == [("text", "a"), ("text", "b"), ("label", "3")]
    pair = {"sentence1": "a", "sentence2": "b", "label": 0}
    assert detect([(1, pair)], "f")[0] == "label" and roles("label", pair)[1] == ("text", "b")
    assert roles("labels", {"text": "a", "labels": []}) == [("text", "a")]
    assert roles("tags", {"tokens": ["a"], "ner_tags": [7]}) == [("word", "a"), ("tag", "7")]
    assert roles("pairs", {"query": "a", "positive": "b", "negative": "c"})[-1] == ("negative", "c")
    assert len(roles("pairs", {"query": "a", "positive": "b"})) == 2


@pytest.mark.parametrize(
    ("name", "row", "reason"),
    [
        ("label", {"text": "a"}, "label is missing"),
        ("label", {"text": "a", "label": None}, "label is null, must be a name or a whole number"),
        ("label", {"text": "a", "label": True}, "label is a boolean"),
        ("label", {"text": "a", "label": 0.5}, r"label is 0\.5, must be a name"),
        ("label", {"text": "a", "label": ["x"]}, "label is a list"),
        ("label", {"text": "a", "label": " "}, "label is empty"),
        ("label", {"text": " ", "label": "x"}, "text is empty"),
        ("label", {"sentence1": "a", "label": "x"}, "sentence2 is missing"),
        ("label", {"text": "a", "sentence1": "a", "label": "x"}, "text and sentence1 are both there"),
        ("labels", {"text": "a", "labels": "x"}, "labels is a string, must be a list"),
        ("labels", {"text": "a", "labels": ["x", "x"]}, "labels names 'x' twice"),
        ("labels", {"text": "a", "labels": ["x", None]}, r"labels\[1\] is null"),
        ("tags", {"words": ["a"], "tags": ["O", "O"]}, "words has 1 entries and tags 2"),
        ("tags", {"words": [], "tags": []}, "words is empty"),
        ("tags", {"words": ["a", " "], "tags": ["O", "O"]}, r"words\[1\] is empty"),
        ("tags", {"words": ["a", 3], "tags": ["O", "O"]}, r"words\[1\] is a number"),
        ("tags", {"words": ["a"], "tokens": ["a"], "tags": ["O"]}, "words and tokens are both there"),
        ("pairs", {"anchor": "a", "positive": ""}, "positive is empty"),
        ("pairs", {"anchor": "a", "positive": "b", "negatives": ["b"]}, "the positive is among the negatives"),
        ("pairs", {"anchor": "a", "positive": "b", "negatives": [3]}, r"negatives\[0\] is a number"),
        ("pairs", {"anchor": "a", "positive": "b", "negative": "c", "negatives": []}, "are both there"),
    ],
)
def test_refused(name: str, row: dict[str, Any], reason: str) -> None:
    with pytest.raises(RowError, match=reason):
        FORMATS[name].turns(row)


def test_two_formats_that_fit_are_refused() -> None:
    with pytest.raises(RequestError, match=r"fits several formats: label \(1 of 1 row\) and labels"):
        detect([(1, {"text": "a", "label": "x", "labels": ["x"]})], "f")


def test_label_order_and_counts(tmp_path: Path) -> None:
    def found(name: str, rows: list[dict[str, Any]]) -> DataConfig:
        return DataConfig(train=write(tmp_path / f"{name}.jsonl", rows))

    names = found("a", [{"text": "t", "label": name} for name in ("b", "a", "b")])
    assert survey_training(names).counts == {"a": 1, "b": 2} and find_labels(names) == Labels(("a", "b"))
    numbers = found("b", [{"text": "t", "label": number} for number in (10, 2, -1)])
    assert find_labels(numbers) == Labels(("-1", "2", "10"))
    several = found("c", [{"text": "t", "labels": ["x"]}, {"text": "t", "labels": []}])
    assert find_labels(several) == Labels(("x",), is_multi=True)
    with pytest.raises(RequestError, match="only the label 'x'"):
        check_labels(Labels(("x",), is_multi=True))
    both = DataConfig(train=[str(tmp_path / "a.jsonl"), str(tmp_path / "c.jsonl")])
    with pytest.raises(RequestError, match="formats label and labels; write all of them with `labels`, or none"):
        find_labels(both)
    assert find_labels(found("d", [{"text": "t"}])) is None


def test_imbalance() -> None:
    assert imbalance_warning({"a": 50, "b": 6}) is None and imbalance_warning({}) is None
    assert imbalance_warning({"a": 50, "b": 5}) == "rare labels beside a (50): b (5)"


def load(
    tmp_path: Path, rows: list[dict[str, Any]], tokenizer: Any, layout: str, labels: Labels | None = None, **config: Any
) -> list[Example]:
    path = write(tmp_path / "rows.jsonl", rows)
    settings = DataConfig(train=path, packing=False, **config)
    return list(load_examples(path, tokenizer, settings, layout, labels=labels or find_labels(settings)).examples)


def test_classes(tmp_path: Path, bert_tokenizer: PreTrainedTokenizerBase) -> None:
    rows = [{"text": "a b", "label": "no"}, {"text": "a", "text_pair": "b c", "label": "yes"}]
    one, two = load(tmp_path, rows, bert_tokenizer, CLASSES)
    assert bert_tokenizer.convert_ids_to_tokens(list(one.input_ids)) == ["[CLS]", "a", "b", "[SEP]"]
    assert bert_tokenizer.convert_ids_to_tokens(list(two.input_ids)) == ["[CLS]", "a", "[SEP]", "b", "c", "[SEP]"]
    assert one.targets == (0,) and two.targets == (1,) and one.num_trained == 1
    assert two.token_type_ids == (0, 0, 0, 1, 1, 1)
    assert [two.text[start:end] for start, end in two.spans] == ["yes"] and two.text == "a\nb c\nyes"
    batch = collate_classes([one, two], 0, False)
    assert batch.targets.tolist() == [0, 1] and batch.num_trained == batch.num_examples == 2 and batch.num_tokens == 10
    assert batch.token_type_ids is not None and batch.token_type_ids.tolist() == [[0] * 6, [0, 0, 0, 1, 1, 1]]


def test_several_labels(tmp_path: Path, bert_tokenizer: PreTrainedTokenizerBase) -> None:
    rows = [{"text": "a", "labels": ["z", "x"]}, {"text": "b", "labels": []}, {"text": "c", "labels": ["y"]}]
    found = load(tmp_path, rows, bert_tokenizer, CLASSES)
    assert [example.targets for example in found] == [(1, 0, 1), (0, 0, 0), (0, 1, 0)]
    assert found[1].answer == "none"
    batch = collate_classes(found, 0, False)
    assert batch.targets.shape == (3, 3) and batch.num_trained == 9


def test_tags_stand_on_first_tokens(tmp_path: Path, bert_tokenizer: PreTrainedTokenizerBase) -> None:
    rows = [{"words": ["Ada", "smiles", "!"], "tags": ["B-PER", "O", "O"]}]
    (example,) = load(tmp_path, rows, bert_tokenizer, TAGS)
    tokens = bert_tokenizer.convert_ids_to_tokens(list(example.input_ids))
    assert tokens == ["[CLS]", "ada", "smile", "##s", "!", "[SEP]"]
    assert example.targets == (IGNORED, 0, 1, IGNORED, 1, IGNORED)
    assert example.text == "Ada/B-PER smiles/O !/O"
    batch = collate_tags([example], 0, False)
    assert batch.is_tagged and batch.num_trained == 3


def test_words_of_byte_level_tokenizers_keep_their_spaces(tmp_path: Path) -> None:
    rows = [{"words": ["ab", "c"], "tags": ["X", "Y"]}]
    (example,) = load(tmp_path, rows, tiny.tiny_tokenizer(), TAGS)
    assert tiny.tiny_tokenizer().decode(list(example.input_ids)) == "ab c"
    assert example.targets == (0, IGNORED, 1, IGNORED)


def test_cut_words_are_counted(tmp_path: Path, bert_tokenizer: PreTrainedTokenizerBase) -> None:
    path = write(tmp_path / "rows.jsonl", [{"words": ["a", "b", "c", "d"], "tags": ["X", "Y", "X", "Y"]}])
    config = DataConfig(train=path, max_length=4)
    loaded = load_examples(path, bert_tokenizer, config, TAGS, labels=find_labels(config))
    assert loaded.num_truncated == 1 and loaded.examples[0].num_trained == 2
    assert any(line.startswith("2 words whose tag is not learned") for line in loaded.warnings)


def test_pairs(tmp_path: Path, bert_tokenizer: PreTrainedTokenizerBase) -> None:
    rows = [{"query": "a", "positive": "b c", "negatives": ["d"]}, {"query": "b", "positive": "b c"}]
    found = load(tmp_path, rows, bert_tokenizer, PAIRS)
    assert found[0].parts == (3, 4, 3) and len(found[0].input_ids) == 10 and found[0].longest == 4
    batch = collate_texts(found, 0, False)
    assert batch.num_examples == batch.num_trained == 2 and batch.input_ids.shape == (5, 4)
    assert batch.keys[2] == batch.keys[3] and len(set(batch.keys.tolist())) == 4
    assert bert_tokenizer.decode(batch.input_ids[4], skip_special_tokens=True) == "d"


def test_too_little_room(tmp_path: Path, bert_tokenizer: PreTrainedTokenizerBase) -> None:
    with pytest.raises(RequestError, match=r"data\.max_length=4 leaves no room beside the tokenizer's special tokens"):
        load(tmp_path, [{"text": "a", "label": 0}, {"text": "a", "label": 1}], bert_tokenizer, CLASSES, max_length=4)


def test_a_label_that_training_does_not_have(tmp_path: Path, bert_tokenizer: PreTrainedTokenizerBase) -> None:
    with pytest.raises(BadRows, match=r"rows\.jsonl:2: 'godo' is no label of the training data; did you mean 'good'"):
        rows = [{"text": "a", "label": "good"}, {"text": "b", "label": "godo"}]
        load(tmp_path, rows, bert_tokenizer, CLASSES, Labels(("bad", "good")))


def test_a_leak_is_one_whatever_its_label(tmp_path: Path, bert_tokenizer: PreTrainedTokenizerBase) -> None:
    train = write(tmp_path / "a.jsonl", [{"text": "t", "label": "x"}, {"text": "u", "label": "y"}])
    valid = write(tmp_path / "b.jsonl", [{"text": "t", "label": "y"}, {"text": "v", "label": "y"}])
    assert preview(DataConfig(train=train, valid=valid), bert_tokenizer, 1, CLASSES)["leaks"] == 1


def test_the_cache_knows_the_labels(tmp_path: Path, bert_tokenizer: PreTrainedTokenizerBase) -> None:
    path = write(tmp_path / "rows.jsonl", [{"text": "a", "label": "y"}])
    config, prints = DataConfig(train=path), []
    for labels in (None, Labels(("x", "y")), Labels(("y", "z"))):
        prints.append(fingerprint([path], bert_tokenizer, config, CLASSES, labels))
    assert prints[0] != prints[1] != prints[2]


def test_workers_encode_them_alike(tmp_path: Path, bert_tokenizer: PreTrainedTokenizerBase) -> None:
    rows = [{"text": f"a {i}", "label": i % 3} for i in range(30)]
    one = load(tmp_path, rows, bert_tokenizer, CLASSES, cache="off")
    assert load(tmp_path, rows, bert_tokenizer, CLASSES, cache="off", workers=2) == one


def test_preview_shows_labels(tmp_path: Path, bert_tokenizer: PreTrainedTokenizerBase) -> None:
    rows = [{"text": f"a {i}", "label": "common"} for i in range(20)] + [{"text": "b", "label": "rare"}]
    train = write(tmp_path / "train.jsonl", rows)
    valid = write(
        tmp_path / "valid.jsonl", [{"text": "c", "label": "new"}, {"text": "d"}, {"text": "e", "label": "rare"}]
    )
    document = preview(DataConfig(train=train, valid=valid), bert_tokenizer, 1, CLASSES)
    assert document["labels"] == {"common": 20, "rare": 1}
    assert document["trained_tokens"] == 21 and document["rows"] == 21
    assert [problem["reason"] for problem in document["problems"]] == [
        "label is missing",
        "'new' is no label of the training data; known: common, rare",
    ]  # fmt: skip
    assert "train: rare labels beside common (20): rare (1)" in document["warnings"]
    (example,) = document["examples"]
    assert [example["text"][start:end] for start, end in example["trained_spans"]] == ["common"]


def test_preview_of_rows_for_another_objective(tmp_path: Path, bert_tokenizer: PreTrainedTokenizerBase) -> None:
    for name, row in ROWS.items():
        document = preview(DataConfig(train=write(tmp_path / f"{name}.jsonl", [row, row])), bert_tokenizer, 1, "whole")
        assert document["rows"] == 2 and document["format"] == name
    text = preview(DataConfig(train=write(tmp_path / "t.jsonl", [{"text": "a"}])), tiny.tiny_tokenizer(), 1, CLASSES)
    assert text["format"] == "text" and text["examples"]
