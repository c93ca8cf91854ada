"""Near rows and shared runs of words: found where they are, not where they are not, equal rows apart."""

from __future__ import annotations

import random

import numpy as np

from rankwise.data import overlap as overlap_module
from rankwise.data.config import DataConfig
from rankwise.data.lengths import histogram, outliers, padded_efficiency, shares
from rankwise.data.loader import load_examples
from rankwise.data.overlap import RUN_WORDS, overlaps, runs_of, words_of
from rankwise.data.packing import epoch_order
from tests import tiny
from tests.data.builders import messages, write_rows

WORDS = [f"w{number}" for number in range(400)]


def sentence(seed: int, count: int = 40) -> list[str]:
    return random.Random(seed).choices(WORDS, k=count)


def loaded(path, answers):
    rows = [messages(f"question {number}", answer) for number, answer in enumerate(answers)]
    config = DataConfig(train="unused", max_length=4096)
    return load_examples(write_rows(path, rows), tiny.tiny_tokenizer(), config).examples


def test_words():
    assert words_of("Don't STOP, Ünïcode 42!") == ["don", "t", "stop", "ünïcode", "42"]
    assert words_of("天気は晴れ ok") == ["天", "気", "は", "晴", "れ", "ok"]
    assert runs_of([], 3) == set() and len(runs_of(["a"], 3)) == 1 and len(runs_of(list("abcde"), 3)) == 3


def test_near_rows_are_found_and_others_are_not(tmp_path):
    base = sentence(0)
    near = [*base[:-1], "other"]
    train = loaded(tmp_path / "train.jsonl", [" ".join(base), " ".join(near), " ".join(sentence(1))])
    valid = loaded(tmp_path / "valid.jsonl", [" ".join(["new", *base[1:]]), " ".join(sentence(2))])
    found = overlaps({"train": train, "valid": valid})
    assert (found["train"].near_duplicates, found["valid"].near_leaks) == (1, 1)
    assert found["valid"].near_duplicates == 0
    assert found["train"].num_compared == found["train"].num_training == 3


def test_case_and_punctuation_do_not_matter_but_equal_rows_are_not_near(tmp_path):
    text = " ".join(sentence(0))
    train = loaded(tmp_path / "train.jsonl", [text])
    valid = loaded(tmp_path / "valid.jsonl", [text])
    assert overlaps({"train": train, "valid": valid})["valid"].near_leaks == 0  # a leak, which is counted elsewhere
    shouted = loaded(tmp_path / "shouted.jsonl", [text.upper().replace(" ", ", ")])
    assert overlaps({"train": train, "valid": shouted})["valid"].near_leaks == 1


def test_shared_runs_need_thirteen_words(tmp_path):
    run = sentence(5, RUN_WORDS)
    train = loaded(tmp_path / "train.jsonl", [" ".join([*sentence(6, 30), *run, *sentence(7, 30)])])
    valid = loaded(
        tmp_path / "valid.jsonl",
        [" ".join([*sentence(8, 30), *run]), " ".join([*sentence(9, 30), *run[:-1]]), "short"],
    )
    assert overlaps({"train": train, "valid": valid})["valid"].shared_runs == 1


def test_of_many_rows_some_are_compared(tmp_path):
    train = loaded(tmp_path / "train.jsonl", [" ".join(sentence(number)) for number in range(12)])
    found = overlaps({"train": train}, most_rows=5)
    assert (found["train"].num_compared, found["train"].num_training) == (5, 12)
    assert overlap_module.MOST_ROWS >= 1000


def test_histogram_counts_every_row():
    lengths = np.array([3, 3, 5, 100])
    found = histogram(lengths)
    assert sum(found["counts"]) == 4 and len(found["edges"]) == len(found["counts"]) + 1
    assert found["edges"][0] == 3 and found["edges"][-1] == 101
    assert histogram(np.array([7, 7])) == {"edges": [7, 8], "counts": [2]}
    assert histogram(np.array([], dtype=int)) == {"edges": [], "counts": []}


def test_outliers_are_far_beyond_the_quartiles():
    assert outliers(np.array([10, 11, 12, 13, 14, 10, 11, 12, 90, 500])) == [9, 8]
    assert outliers(np.array([100, 100, 101, 101, 101, 102, 150])) == []  # not twice the median
    assert outliers(np.array([10, 11, 12, 13, 14])) == [] and outliers(np.array([1, 900])) == []


def test_padding_is_that_of_training():
    lengths = np.array([1, 2, 3, 4, 8, 8])
    ordered = lengths[np.asarray(epoch_order(6, 3, 0))]
    computed = 0
    for start in (0, 4):
        step = sorted(ordered[start : start + 4], reverse=True)
        computed += sum(max(step[at : at + 2]) * len(step[at : at + 2]) for at in range(0, len(step), 2))
    assert padded_efficiency(lengths, 4, 2, 3) == lengths.sum() / computed
    assert padded_efficiency(np.full(8, 5), 4, 2, 0) == 1.0


def test_shares_are_sorted_and_bounded():
    assert shares(["b", "a", "b", "c"], most=2) == {"b": 2, "a": 1, "other": 1}


def test_the_short_look_finds_what_lies_in_few_rows(tmp_path):
    base = sentence(0)
    train = loaded(tmp_path / "train.jsonl", [" ".join(base), " ".join(sentence(1))])
    valid = loaded(tmp_path / "valid.jsonl", [" ".join(["new", *base[1:]]), " ".join(sentence(2))])
    found = overlap_module.overlap_in_short(train, valid)
    assert (found.near_leaks, found.shared_runs) == (1, 1)
    assert [text.split(":")[0] for text in overlap_module.near_warnings("valid", 1, 1)] == ["valid", "valid"]
    assert overlap_module.near_warnings("valid", 0, 0) == []
