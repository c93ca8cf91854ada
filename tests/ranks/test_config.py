"""The `ranks:` section: what each policy reads, and what is refused."""

from __future__ import annotations

from dataclasses import fields

import pytest

from rankwise.errors import RequestError
from rankwise.ranks.config import FIELDS, Budget, RanksConfig

NEEDED = {
    "layered": {"budget": 1000},
    "spectrum": {"budget": 1000},
    "adaptive": {"budget": 1000},
    "grow": {"max": 8, "every": 10},
}
VALUES = {
    "plan": {"q": 3}, "depth": "up", "budget": 10_000, "min": 1, "max": 8, "start": 2, "every": "2 epochs", "by": 2,
    "where": "top-2", "measure": "gradient", "batches": 2, "settle": 0.1, "alpha": "scale",
}  # fmt: skip


def test_every_setting_is_read_by_a_policy():
    names = {item.name for item in fields(RanksConfig)} - {"policy"}
    assert {name for read in FIELDS.values() for name in read} == names == set(VALUES)


@pytest.mark.parametrize("policy", FIELDS)
def test_a_setting_that_the_policy_does_not_read_is_refused_and_those_that_it_reads_are_named(policy):
    for name in set(VALUES) - set(FIELDS[policy]):
        with pytest.raises(RequestError, match=rf"ranks\.{name} has no effect with ranks\.policy: {policy}") as caught:
            RanksConfig(policy=policy, **{**NEEDED.get(policy, {}), name: VALUES[name]})
        assert all(read in str(caught.value) for read in FIELDS[policy])


@pytest.mark.parametrize("policy", sorted(NEEDED))
def test_what_a_policy_can_not_do_without(policy):
    with pytest.raises(RequestError, match=r"missing setting 'ranks\.\w+'|needs ranks\.plan"):
        RanksConfig(policy=policy)


@pytest.mark.parametrize(
    ("policy", "settings", "message"),
    [
        ("layered", {"budget": 0}, r"ranks.budget must be above 0, not 0"),
        ("layered", {"budget": "4 apples"}, r"parameters, or bytes such as \"4MB\", not '4 apples'"),
        ("layered", {"budget": "-3"}, "not '-3'"),
        ("layered", {"budget": 9, "min": 0}, "ranks.min must be at least 1, not 0"),
        ("layered", {"budget": 9, "min": 4, "max": 2}, r"ranks.min \(4\) is above ranks.max \(2\)"),
        ("layered", {"depth": "upp"}, "ranks.depth can't be 'upp'; did you mean 'up'"),
        ("layered", {"plan": {"q": -1}}, r"ranks.plan\['q'\] must be a whole number, 0 to leave the layer out, not -1"),
        ("layered", {"plan": {"q(": 1}}, "not a regular expression"),
        ("layered", {"plan": {"q": 0}}, "gives no layer a rank"),
        ("layered", {"plan": {"q": 1}, "depth": "up"}, "ranks.depth has no effect beside ranks.plan"),
        ("layered", {"plan": {"q": 1}, "min": 2}, "ranks.min has no effect on a ranks.plan without ranks.budget"),
        ("layered", {"depth": "up", "alpha": "half"}, "ranks.alpha can't be 'half'"),
        ("spectrum", {"budget": 9, "measure": "effective-rank"}, "ranks.measure can't be 'effective-rank'"),
        ("grow", {"max": 8, "every": "0 epochs"}, "ranks.every must be"),
        ("grow", {"max": 8, "every": "often"}, "ranks.every must be"),
        ("grow", {"max": 8, "every": 5, "start": 9}, r"ranks.start \(9\) is above ranks.max"),
        ("grow", {"max": 8, "every": 5, "where": "top-0"}, "ranks.where must be"),
        ("grow", {"max": 8, "every": 5, "where": "top"}, "ranks.where must be"),
        ("adaptive", {"budget": 9, "settle": 1.0}, "ranks.settle must be at least 0 and below 1"),
        ("adaptive", {"budget": 9, "start": 1, "min": 2}, r"ranks.start \(1\) is below ranks.min"),
        ("fixd", {}, "did you mean 'fixed'"),
    ],
)  # fmt: skip
def test_bad_values_are_one_line(policy, settings, message):
    with pytest.raises(RequestError, match=message):
        RanksConfig(policy=policy, **settings)


@pytest.mark.parametrize(
    ("text", "amount", "in_bytes"),
    [
        (400_000, 400_000, False), ("4e5", 400_000, False), ("400_000", 400_000, False), ("4MB", 4_000_000, True),
        ("3.5 MiB", 3_670_016, True), ("800kb", 800_000, True), ("12 B", 12, True),
    ],
)  # fmt: skip
def test_budgets(text, amount, in_bytes):
    assert Budget.parse(text) == Budget(amount, in_bytes)
