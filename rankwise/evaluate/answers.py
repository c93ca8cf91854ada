"""How close generated answers come to the reference answers: the published scorers, over a whole corpus.

exact_match 0 to 1 (equal after stripping blanks at both ends); chrF (Popovic 2015, W15-3049) and BLEU (Papineni et al.
2002, P02-1040) by sacrebleu with its defaults (Post 2018, arXiv 1804.08771), 0 to 100; ROUGE-L (Lin 2004, W04-1013) by
rouge-score, mean F1, 0 to 100. rouge-score's own tokenizer keeps ASCII letters and digits only: for other scripts
read chrF.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from rankwise.errors import RequestError, did_you_mean

LOSS_METRICS = ("loss", "perplexity", "accuracy", "reward_margin")
"""Metrics that need no generated answer: of the likelihood, and what else an objective measures with its loss."""


def exact_match(answers: Sequence[str], references: Sequence[str]) -> float:
    """Share of answers that equal their reference, blanks at the ends aside; 0 to 1."""
    return sum(a.strip() == r.strip() for a, r in zip(answers, references, strict=True)) / len(answers)


def chrf(answers: Sequence[str], references: Sequence[str]) -> float:
    """Corpus chrF2, character 6-grams; 0 to 100."""
    from sacrebleu.metrics.chrf import CHRF

    return float(CHRF().corpus_score(list(answers), [list(references)]).score)


def bleu(answers: Sequence[str], references: Sequence[str]) -> float:
    """Corpus BLEU, 13a tokens, exponential smoothing; 0 to 100."""
    from sacrebleu.metrics.bleu import BLEU

    return float(BLEU().corpus_score(list(answers), [list(references)]).score)


def rouge_l(answers: Sequence[str], references: Sequence[str]) -> float:
    """Mean F1 of the longest common subsequence, no stemming; 0 to 100."""
    from rouge_score.rouge_scorer import RougeScorer

    scorer = RougeScorer(["rougeL"], use_stemmer=False)
    scores = [scorer.score(r, a)["rougeL"].fmeasure for a, r in zip(answers, references, strict=True)]
    return 100.0 * sum(scores) / len(scores)


METRICS: dict[str, Callable[[Sequence[str], Sequence[str]], float]] = {
    "chrf": chrf,
    "bleu": bleu,
    "rouge_l": rouge_l,
    "exact_match": exact_match,
}


def check_metrics(names: Sequence[str]) -> tuple[str, ...]:
    """The names, without repeats.

    Raises: RequestError for a metric that there is not, naming the nearest.
    """
    known = [*LOSS_METRICS, *METRICS]
    for name in names:
        if name not in known:
            raise RequestError(f"unknown metric '{name}'{did_you_mean(name, known)}")
    if not names:
        raise RequestError(f"no metric given; known: {', '.join(known)}")
    return tuple(dict.fromkeys(names))


def score(answers: Sequence[str], references: Sequence[str], metrics: Sequence[str]) -> dict[str, float]:
    """Each of `metrics` that compares answers, by name; metrics of the likelihood are left to `perplexity`.

    Raises: RequestError when there is nothing to compare, or the lengths differ.
    """
    if not answers or len(answers) != len(references):
        raise RequestError(f"{len(answers)} answers for {len(references)} references; give one answer for each")
    return {name: METRICS[name](answers, references) for name in metrics if name in METRICS}
