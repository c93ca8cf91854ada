"""What a suite may say, and what it is told when it may not."""

from __future__ import annotations

import pytest

from rankwise.bench.suite import suite_from
from rankwise.errors import RequestError
from tests.bench.suites import METHODS, RATES, SUITE


def test_a_suite_is_read():
    suite = suite_from(SUITE, ["capitals"])
    assert suite.seeds == (0, 1) and suite.tuning_tasks == ("capitals",) and suite.margin.share == 0.02
    assert [suite.is_tuned(name) for name in METHODS] == [False, True, False, False]
    assert suite.methods["lora-r4"].rates == [1e-3, 1e-2] and suite.methods["base"].rates == [None]
    assert not suite_from(RATES, ["capitals"]).is_tuned("lora-r4")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"titel": "x"}, "unknown setting 'suite.titel'; did you mean 'title'"),
        ({"tasks": ["capitol"]}, "unknown task 'capitol'; did you mean 'capitals'"),
        ({"tasks": []}, "a suite needs a method, a task and a seed"),
        ({"seeds": 0}, "a suite needs a method, a task and a seed"),
        ({"table": "rate"}, "unknown table 'rate'; did you mean 'rates'"),
        ({"table": "rates"}, "reference has no effect in a table of rates"),
        ({"reference": None}, "reference is missing"),
        ({"reference": "lora-r3"}, "reference: unknown method 'lora-r3'; did you mean 'lora-r"),
        ({"margin": {"base": "base", "to": "lora-r4", "share": 2}}, r"margin.share \(2.*\) must be between 0 and 1"),
        ({"tuning": {"seed": 2}}, r"tuning.seed \(2\) is not one of the suite's seeds"),
        ({"tuning": {"tasks": ["other"]}}, "unknown task 'other'"),
        ({"methods": {**METHODS, "a b": METHODS["full"]}}, "not 'a b'"),
        ({"methods": {**METHODS, "x": {"kind": "ful", "lr": 1}}}, "methods.x: unknown kind 'ful'; did you mean 'full'"),
        ({"methods": {**METHODS, "x": {"kind": "full"}}}, "methods.x: lr is missing"),
        ({"methods": {**METHODS, "x": {"kind": "base", "lr": 1.0}}}, "methods.x: lr has no effect with kind: base"),
        ({"methods": {**METHODS, "x": {"kind": "full", "lr": 1.0, "adapter": {"r": 1}}}}, "adapter has no effect with"),
        ({"methods": {**METHODS, "x": {"lr": [1.0, 1.0]}}}, "must be different rates"),
        ({"methods": {**METHODS, "x": {"lr": 1.0, "train": {"seed": 1}}}}, "train.seed is set by the suite"),
        ({"methods": {**METHODS, "x": {"lr": 1.0, "ada": {}}}}, "unknown setting 'methods.x.ada'"),
        ({"methods": {**METHODS, "x": {"lr": "fast"}}}, "methods.x.lr: 'fast' is no method with rates"),
        ({"methods": {**METHODS, "x": 3}}, "methods.x must be a mapping"),
        ({"answers": {"methods": ["lora-r3"], "seed": 1}}, "answers.methods: unknown method 'lora-r3'; did you mean"),
        ({"answers": {"methods": ["lora-r4"], "seed": 2}}, r"answers.seed \(2\) is not one of the suite's seeds"),
        ({"answers": {"methods": ["lora-r4"], "seed": 0}}, r"answers.seed \(0\) is that on which rates are chosen"),
        ({"answers": {"methods": ["lora-r4"], "seed": 1, "rows": 0}}, r"rows \(0\)"),
        ({"answers": {"methods": [], "seed": 1}}, "must name one at least"),
        ({"answers": {"methods": ["lora-r4"]}}, "answers.seed"),
    ],
)  # fmt: skip
def test_what_is_refused(changes, message):
    with pytest.raises(RequestError, match=message):
        suite_from({**SUITE, **changes}, ["capitals"])


@pytest.mark.parametrize("setting", [{"answers": {"methods": ["full"], "seed": 1}}, {"default_of": "lr"}])
def test_a_table_of_rates_has_no_answers_and_no_default(setting):
    with pytest.raises(RequestError, match=f"{next(iter(setting))} has no effect in table: rates"):
        suite_from({**RATES, **setting}, ["capitals"])
