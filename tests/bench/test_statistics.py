"""The statistics on numbers whose truth is known: the size of the test, coverage, and that it can fail."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from rankwise.bench.statistics import deviations, holm, interval, lowest, share, variances

TRIALS = 600
"""The standard error of a rate of 5 % is then 0.9 points."""


def drawn(rng, num_seeds, size, mean, of_seed, of_example, rest, num_tasks=1):
    """Differences with these standard deviations of seeds (the same on every task), examples and the rest."""
    seeds = rng.normal(0, of_seed, (num_seeds, 1))
    return [
        mean + seeds + rng.normal(0, of_example, (1, size)) + rng.normal(0, rest, (num_seeds, size))
        for _ in range(num_tasks)
    ]


def missed(mean, *shape, num_tasks=1, seed=0):
    """How often the 95 % interval leaves the true mean out."""
    rng = np.random.default_rng(seed)
    found = 0
    for trial in range(TRIALS):
        result = interval(drawn(rng, shape[0], shape[1], mean, *shape[2:], num_tasks), trial, 100)
        found += not result.low <= mean <= result.high
    return found / TRIALS


@pytest.mark.parametrize(
    ("shape", "num_tasks"),
    [
        ((3, 60, 0.3, 0.3, 0.3), 1),  # seeds decide: three of them
        ((3, 60, 0.05, 1.0, 0.5), 2),  # examples decide
        ((8, 60, 0.1, 0.5, 1.0), 1),  # all three matter
        ((8, 40, 0.05, 0.5, 1.0), 4),
    ],
)
def test_five_in_a_hundred_intervals_miss(shape, num_tasks):
    assert 0.015 <= missed(0.2, *shape, num_tasks=num_tasks) <= 0.08


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


def test_a_share_is_covered():
    rng = np.random.default_rng(7)
    hits = 0
    for trial in range(TRIALS):
        gain = drawn(rng, 6, 60, 1.0, 0.05, 0.3, 0.2)
        noise = drawn(rng, 6, 60, 0.0, 0.03, 0.1, 0.1)
        found = share([0.8 * g + n for g, n in zip(gain, noise, strict=True)], gain, trial, 100)
        hits += found.low <= 0.8 <= found.high
    assert 0.9 <= hits / TRIALS <= 0.99


def test_the_lowest_choice():
    rng = np.random.default_rng(8)
    noise = drawn(rng, 4, 50, 0.0, 0.01, 0.1, 0.01)
    found = lowest({1e-4: [noise[0] + 1.0], 1e-3: [noise[0]], 1e-2: [noise[0] + rng.normal(0, 0.1, (4, 50))]}, 0, 200)
    assert found[1e-4] == 0.0 and sum(found.values()) == pytest.approx(1.0)
    assert 0.02 < found[1e-3] < 0.98
