from __future__ import annotations

import pytest

from rankwise.errors import RequestError
from rankwise.evaluate.answers import METRICS, check_metrics, score


@pytest.mark.parametrize("name, best", [("chrf", 100.0), ("bleu", 100.0), ("rouge_l", 100.0), ("exact_match", 1.0)])
def test_units(name, best):
    references = ["The cat sat on the mat today.", "And he said unto them, go in peace."]
    assert METRICS[name](references, references) == pytest.approx(best)
    assert METRICS[name](["zzzz qqqq", "xxxx vvvv"], references) < 0.1 * best


def test_exact_match_ignores_blanks_at_the_ends_only():
    assert METRICS["exact_match"]([" yes\n", "no  way", "No"], ["yes", "no way", "no"]) == pytest.approx(1 / 3)


def test_scores_equal_the_published_tools():
    import sacrebleu

    answers, references = ["a cat on a mat", "he goes home now"], ["the cat on the mat", "he goes home today"]
    assert METRICS["bleu"](answers, references) == pytest.approx(sacrebleu.corpus_bleu(answers, [references]).score)
    assert METRICS["chrf"](answers, references) == pytest.approx(sacrebleu.corpus_chrf(answers, [references]).score)
    # longest common subsequences 3 of 5 words and 3 of 4 words
    assert METRICS["rouge_l"](answers, references) == pytest.approx(100 * (3 / 5 + 3 / 4) / 2)


def test_score_takes_only_what_compares_answers():
    assert set(score(["a"], ["a"], ["loss", "chrf", "exact_match"])) == {"chrf", "exact_match"}


def test_metric_names_are_checked():
    assert check_metrics(["bleu", "loss", "bleu"]) == ("bleu", "loss")
    with pytest.raises(RequestError, match=r"unknown metric 'blue'; did you mean 'bleu'"):
        check_metrics(["blue"])
    with pytest.raises(RequestError, match="no metric given; known: loss, perplexity, accuracy, reward_margin, chrf"):
        check_metrics([])


def test_counts_must_agree():
    with pytest.raises(RequestError, match="1 answers for 2 references"):
        score(["a"], ["a", "b"], ["bleu"])
    with pytest.raises(RequestError, match="0 answers"):
        score([], [], ["bleu"])
