"""What a suite may say, and what it is told when it may not."""

from __future__ import annotations

import re

import pytest
import yaml

from rankwise.bench.suite import suite_from
from rankwise.errors import RequestError
from rankwise.recipes.bench import open_bench
from tests.bench.suites import METHODS, RATES, SUITE, write_suite

TASK = {"model": {"name": "m"}, "data": {"train": "train.jsonl", "valid": "valid.jsonl", "test": "test.jsonl"}}


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


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"methods": ["lora"]}, "methods must be a mapping of names to settings, not ['lora']"),
        ({"methods": {**METHODS, 8: METHODS["full"]}}, "a method's name must be text, not 8; put it in quotes"),
        ({"methods": {**METHODS, "x": {"lr": []}}}, "methods.x.lr is an empty list; give a rate, or several"),
        ({"tasks": ["capitals", "capitals"]}, "tasks: 'capitals' stands there twice; leave one out"),
        ({"tuning": {"tasks": ["capitals"] * 2}}, "tuning.tasks: 'capitals' stands there twice; leave one out"),
        ({"answers": {"methods": ["full", "full"], "seed": 1}}, "answers.methods: 'full' stands there twice"),
        ({"methods": {**METHODS, "lora-r4": METHODS["full"]}, "tuning": {"seed": 1}}, "tuning has no effect: no"),
        ({"margin": {"base": "full", "to": "full"}}, "margin: from 'full' to 'full' there is no gain; name two"),
        ({"share_of": {"base": "full", "to": "full"}}, "share_of: from 'full' to 'full' there is no gain; name two"),
        (
            {"methods": {**METHODS, "x": {"lr": "lora-r4"}, "y": {"lr": "x"}}},
            "methods.y.lr: 'x' has the rates of 'lora-r4' itself; name that one",
        ),
        ({**RATES, "methods": METHODS}, "methods.base: kind: base has no rate to compare; leave it out of table"),
        ({**RATES, "tuning": {"seed": 1}}, "tuning has no effect: no method has rates to choose from; leave it out"),
    ],
)  # fmt: skip
def test_what_would_mislead_is_refused(tmp_path, changes, message):
    document = {} if "table" in changes else SUITE
    (tmp_path / "tasks.yaml").write_text(yaml.safe_dump({"capitals": TASK}))
    path = write_suite(tmp_path, "wrong", {**document, **changes})
    with pytest.raises(RequestError, match=re.escape(message)):
        open_bench(str(path))


@pytest.mark.parametrize(
    ("tasks", "message"),
    [
        ({"a": {**TASK, "adapter": {}}}, "tasks.yaml: 'a' must hold a run file's model:, data: and train:, without"),
        ({"a": {**TASK, "data": {"train": "t", "test": "t"}}}, "tasks.yaml: 'a' has no data.valid, and a bench"),
        ({"a": {"model": {}}}, "tasks.yaml: 'a' has no data.train"),
    ],
)
def test_tasks_without_what_a_cell_needs_are_refused(tmp_path, tasks, message):
    (tmp_path / "tasks.yaml").write_text(yaml.safe_dump({"capitals": TASK, **tasks}))
    with pytest.raises(RequestError, match=re.escape(message)):
        open_bench(str(write_suite(tmp_path, "right", SUITE)))
