"""The statistics on numbers whose truth is known: the size of the test, coverage, and that it can fail."""

from __future__ import annotations

import itertools
from dataclasses import replace

import numpy as np
import pytest

from rankwise.bench.statistics import contrast, deviations, holm, interval, share, variances

TRIALS = 600
"""The standard error of a rate of 5 % is then 0.9 points."""


def drawn(rng, num_seeds, size, mean, of_seed, of_example, rest, num_tasks=1, of_run=0.0):
    """Differences with these standard deviations of seeds (the same on every task), examples, the rest, and runs.

    `of_run`: of what a seed does on one task, for all of them or for each.
    """
    seeds = rng.normal(0, of_seed, (num_seeds, 1))
    return [
        mean + seeds + (rng.normal(0, own, (num_seeds, 1)) if own else 0.0)
        + rng.normal(0, of_example, (1, size)) + rng.normal(0, rest, (num_seeds, size))
        for own in np.broadcast_to(of_run, num_tasks)
    ]  # fmt: skip


def missed(mean, *shape, num_tasks=1, seed=0, of_run=0.0, apart=False):
    """How often the 95 % interval leaves the true mean out."""
    rng = np.random.default_rng(seed)
    found = 0
    for trial in range(TRIALS):
        tasks = drawn(rng, shape[0], shape[1], mean, *shape[2:], num_tasks, of_run)
        result = interval(tasks, trial, 100, apart)
        found += not result.low <= mean <= result.high
    return found / TRIALS


@pytest.mark.parametrize(
    ("shape", "num_tasks"),
    [
        ((2, 60, 0.3, 0.3, 0.3), 1),
        ((3, 60, 0.3, 0.3, 0.3), 1),  # seeds decide: three of them
        ((3, 60, 0.05, 1.0, 0.5), 2),  # examples decide
        ((8, 60, 0.1, 0.5, 1.0), 1),  # all three matter
        ((8, 40, 0.05, 0.5, 1.0), 4),
    ],
)
def test_five_in_a_hundred_intervals_miss(shape, num_tasks):
    assert 0.015 <= missed(0.2, *shape, num_tasks=num_tasks) <= 0.08


@pytest.mark.parametrize(
    ("num_seeds", "of_seed", "of_run"),
    [
        (2, 0.0, [0.4, 0.1, 0.1, 0.1]),
        (3, 0.0, [0.3] * 4),
        (3, 0.0, [0.4, 0.1]),
        (8, 0.0, [0.4, 0.1]),
        (3, 0.13, [0.27] * 4),  # a fifth of the seeds' variance is common to the tasks
    ],
)
def test_intervals_of_runs_on_one_task_each_miss_no_more_often(num_seeds, of_seed, of_run):
    rate = missed(0.2, num_seeds, 60, of_seed, 0.3, 0.3, num_tasks=len(of_run), of_run=of_run, apart=True)
    assert 0.002 <= rate <= 0.08


def test_two_seeds_whose_examples_decide_give_wide_intervals():
    assert missed(0.2, 2, 60, 0.05, 1.0, 0.5, num_tasks=2) <= 0.04


def test_runs_on_one_task_each_decide_more():
    """Three seeds on four tasks: the interval is narrower than that of seeds that are the same everywhere."""
    rng = np.random.default_rng(9)
    many = [drawn(rng, 3, 60, 0.0, 0.0, 0.3, 0.3, 4, 0.1) for _ in range(200)]
    halves = [[variances(tasks, apart).half(0.05) for tasks in many] for apart in (True, False)]
    assert np.median(halves[0]) < 0.85 * np.median(halves[1])


def test_a_common_effect_of_seeds_is_not_taken_for_runs():
    """The check can fail: without the common part, intervals miss far too often where there is one."""
    rng = np.random.default_rng(10)
    misses = np.zeros(2)
    for _ in range(TRIALS):
        tasks = drawn(rng, 3, 60, 0.0, 0.2, 0.05, 0.05, 4, 0.2)
        parts, mean = variances(tasks, apart=True), np.mean([task.mean() for task in tasks])
        misses += [abs(mean) > parts.half(0.05), abs(mean) > replace(parts, seeds=0.0).half(0.05)]
    assert misses[0] / TRIALS < 0.1 < misses[1] / TRIALS


def test_one_task_or_one_run_has_no_variance_of_runs():
    tasks = drawn(np.random.default_rng(11), 4, 30, 0.1, 0.1, 0.1, 0.1, 2)
    assert variances(tasks).runs == 0.0 and variances(tasks[:1], apart=True) == variances(tasks[:1])
    assert interval(tasks[:1], apart=True) == interval(tasks[:1])
    parts = variances(tasks, apart=True)
    assert parts.runs > 0 and 3 <= parts.freedom_runs <= 6


def test_chance_alone_gives_no_more_than_the_size():
    assert missed(0.0, 3, 60, 0.0, 0.0, 1.0) <= 0.085


def test_a_plain_percentile_bootstrap_would_fail_here():
    """The check can fail: without the correction, three seeds give an interval that misses far too often."""
    rng = np.random.default_rng(0)
    found = 0
    for _ in range(TRIALS):
        (task,) = drawn(rng, 3, 60, 0.0, 0.3, 0.3, 0.3)
        rows, columns = rng.integers(3, size=(200, 3)), rng.integers(60, size=(200, 60))
        means = [task[np.ix_(row, column)].mean() for row, column in zip(rows, columns, strict=True)]
        low, high = np.quantile(means, [0.025, 0.975])
        found += not low <= 0.0 <= high
    assert found / TRIALS > 0.12


def test_p_and_interval_agree():
    rng = np.random.default_rng(1)
    for trial in range(50):
        result = interval(drawn(rng, 4, 50, 0.15, 0.1, 0.5, 0.5), trial, 2_000)
        assert (result.p < 0.05) == (result.low > 0 or result.high < 0)


def test_power_grows_with_the_difference():
    rng = np.random.default_rng(2)
    rates = [
        np.mean([interval(drawn(rng, 8, 100, mean, 0.02, 0.2, 0.2), t, 300).p < 0.05 for t in range(60)])
        for mean in (0.02, 0.1)
    ]
    assert rates[0] < 0.6 < 0.95 < rates[1]


def test_the_variance_is_that_of_the_mean():
    """Method of moments against a simulation of the mean itself."""
    rng = np.random.default_rng(3)
    many = [drawn(rng, 5, 40, 0.0, 0.2, 0.5, 1.0, 2) for _ in range(1_500)]
    means = [np.mean([task.mean() for task in tasks]) for tasks in many]
    parts = [variances(tasks) for tasks in many]
    assert np.mean([part.total for part in parts]) == pytest.approx(np.var(means), rel=0.1)
    assert np.mean([part.seeds for part in parts]) == pytest.approx(0.2**2 / 5 + 1.0 / (5 * 40) / 2, rel=0.1)
    assert np.mean([part.examples for part in parts]) == pytest.approx(0.5**2 / 40 / 2, rel=0.1)


def test_a_copy_differs_by_nothing():
    same = interval([np.zeros((3, 20))])
    assert (same.mean, same.low, same.high, same.p) == (0.0, 0.0, 0.0, 1.0)


def test_the_same_draws_give_the_same_interval():
    tasks = drawn(np.random.default_rng(4), 3, 30, 0.1, 0.1, 0.1, 0.1)
    assert interval(tasks) == interval(tasks)
    assert (deviations(tasks, 1, 50) != deviations(tasks, 2, 50)).any()


def test_holm_is_the_closed_test():
    """A hypothesis is rejected when every set that holds it is, by Bonferroni: Holm's correction says the same."""
    rng = np.random.default_rng(5)
    for _ in range(100):
        p = rng.uniform(0, 0.1, size=5).tolist()
        corrected = holm(p)
        for index in range(5):
            sets = [c for n in range(1, 6) for c in itertools.combinations(range(5), n) if index in c]
            closed = max(min(1.0, len(chosen) * min(p[i] for i in chosen)) for chosen in sets)
            assert corrected[index] == pytest.approx(closed)
    assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])


def test_holm_keeps_the_whole_family_below_its_level():
    rng = np.random.default_rng(6)
    any_found = [min(holm(rng.uniform(size=10).tolist())) < 0.05 for _ in range(2_000)]
    assert 0.03 < np.mean(any_found) < 0.07
    naive = [rng.uniform(size=10).min() < 0.05 for _ in range(2_000)]
    assert np.mean(naive) > 0.3


@pytest.mark.parametrize("common", [0.0, 0.25])
def test_a_table_of_equal_methods_seldom_has_a_sure_row(common):
    """After Holm, eleven rows that share a reference, three seeds; `common`: of the runs' variance, to all tasks."""
    rng = np.random.default_rng(0)

    def method():
        alike = rng.normal(0, common**0.5, (3, 1))
        return [alike + rng.normal(0, (1 - common) ** 0.5, (3, 1)) + rng.normal(0, 0.3, (3, 20)) for _ in range(4)]

    sure = 0
    for trial in range(TRIALS):
        reference = method()
        rows = [[own - other for own, other in zip(method(), reference, strict=True)] for _ in range(11)]
        sure += min(holm([interval(row, trial, 20, apart=True).p for row in rows])) < 0.05
    assert sure / TRIALS <= 0.07


def test_a_share_is_covered():
    rng = np.random.default_rng(7)
    hits = 0
    for trial in range(TRIALS):
        gain = drawn(rng, 6, 60, 1.0, 0.05, 0.3, 0.2)
        noise = drawn(rng, 6, 60, 0.0, 0.03, 0.1, 0.1)
        found = share([0.8 * g + n for g, n in zip(gain, noise, strict=True)], gain, trial, 100)
        hits += found.low <= 0.8 <= found.high
    assert 0.9 <= hits / TRIALS <= 0.99


def test_the_difference_of_two_sets_of_examples_is_covered():
    """Its mean is theirs, its variance that of both."""
    rng = np.random.default_rng(8)
    over, under = (drawn(rng, 4, size, mean, 0.1, 0.3, 0.2)[0] for size, mean in ((40, 0.5), (90, 0.2)))
    found = contrast(over, under)
    assert found.mean(axis=1) == pytest.approx(over.mean(axis=1) - under.mean(axis=1))
    both = variances([over]).examples + variances([under]).examples
    assert variances([found]).examples == pytest.approx(both, rel=0.05)


def test_holm_of_a_part_of_the_family():
    assert holm([0.01, 0.04], 4) == pytest.approx([0.04, 0.12])
    assert holm([0.01, 0.04], 2) == holm([0.01, 0.04])
