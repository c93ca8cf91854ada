"""Accuracy, F1 and entities, by hand."""

from __future__ import annotations

import pytest

from rankwise.evaluate.classes import accuracy, entities, f1


@pytest.mark.parametrize(
    ("tags", "found"),
    [
        ("O O", set()),
        ("B-PER I-PER O", {(0, 1, "PER")}),
        ("I-PER I-PER", {(0, 1, "PER")}),
        ("B-PER B-PER", {(0, 0, "PER"), (1, 1, "PER")}),
        ("B-PER I-LOC", {(0, 0, "PER"), (1, 1, "LOC")}),
        ("B-PER E-PER I-PER", {(0, 1, "PER"), (2, 2, "PER")}),
        ("S-PER I-PER S-LOC", {(0, 0, "PER"), (1, 1, "PER"), (2, 2, "LOC")}),
        ("O B-A-B I-A-B", {(1, 2, "A-B")}),
        ("", set()),
    ],
)
def test_entities(tags: str, found: set[tuple[int, int, str]]) -> None:
    assert entities(tags.split()) == found


def test_one_label_each_is_the_macro_mean() -> None:
    answers, truths = [[0], [0], [1], [1]], [[0], [1], [1], [1]]
    assert accuracy(answers, truths, False) == 0.75
    assert f1(answers, truths, ["a", "b"], False) == pytest.approx((2 / 3 + 4 / 5) / 2)
    assert f1(answers, truths, ["a", "b", "never"], False) == pytest.approx((2 / 3 + 4 / 5) / 2)


def test_several_labels_are_counted_together() -> None:
    answers, truths = [[1, 0, 1], [0, 0, 0]], [[1, 0, 0], [0, 0, 0]]
    assert accuracy(answers, truths, False) == 0.5
    assert f1(answers, truths, ["a", "b", "c"], True) == pytest.approx(2 * 1 / (2 + 1))
    assert f1([[0, 0]], [[0, 0]], ["a", "b"], True) == 1.0


def test_tags_are_counted_by_word_and_entity() -> None:
    names = ["B-PER", "I-PER", "O"]
    answers, truths = [[0, 2, 2], [2]], [[0, 1, 2], [2]]
    assert accuracy(answers, truths, True) == 0.75
    assert f1(answers, truths, names, False) == 0.0  # the end of the only entity is wrong
    assert f1(truths, truths, names, False) == 1.0
    assert f1(answers, truths, ["NOUN", "VERB", "X"], False) == pytest.approx((1 + 0 + 4 / 5) / 3)
