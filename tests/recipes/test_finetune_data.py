"""Splits, mixes and the cache in whole runs."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml

from rankwise.errors import RequestError
from rankwise.recipes.finetune import train
from tests.data.builders import write_rows
from tests.recipes.runs import adapter_bytes, interrupting, metrics, settings, unmeasured


def rows(path: Path, count: int, word: str = "row") -> str:
    return write_rows(path, [{"prompt": f"{word} {n}", "completion": "abc"[n % 3] * (n % 7 + 1)} for n in range(count)])


def run(files: Path, output: Path, data: dict, **more) -> dict:
    short = {"steps": 4, "samples": None, "sample_tokens": None, "evaluate_every": "auto", **more}
    return settings(files, output, data={"valid": None, **data}, train=short)


def said(capsys) -> str:
    return capsys.readouterr().err


def test_rows_are_held_out_and_that_is_said(files, tmp_path, capsys) -> None:
    data = {"train": rows(tmp_path / "rows.jsonl", 200)}
    summary = train(run(files, tmp_path / "out", data))
    text = said(capsys)
    assert "valid: no file given, so 10 rows of the training files are held out by a hash of what they say" in text
    assert "data      190 rows" in text
    assert summary["best_valid_loss"] is not None
    resolved = yaml.safe_load((tmp_path / "out" / "run.yaml").read_text())
    assert resolved["data"]["valid_split"] == 10
    train({**resolved, "output": str(tmp_path / "again")})
    assert adapter_bytes(tmp_path / "again") == adapter_bytes(tmp_path / "out")


def test_few_rows_are_all_trained_on_and_that_is_said(files, tmp_path, capsys) -> None:
    summary = train(run(files, tmp_path / "out", {"train": rows(tmp_path / "rows.jsonl", 99)}))
    assert "valid: none, so nothing is measured while training" in said(capsys)
    assert summary["best_valid_loss"] is None
    with pytest.raises(RequestError, match=r"train.samples \(2\) has no effect without data.valid .of 99 rows"):
        train(run(files, tmp_path / "no", {"train": str(tmp_path / "rows.jsonl")}, samples=2))


@pytest.mark.parametrize(("split", "by", "count"), [(0.2, "hash", None), (7, "row", 7), (0, "hash", 0)])
def test_splits_as_asked_for(files, tmp_path, capsys, split, by: str, count: int | None) -> None:
    data = {"train": rows(tmp_path / "rows.jsonl", 150), "valid_split": split, "split_by": by}
    summary = train(run(files, tmp_path / "out", data))
    assert (summary["best_valid_loss"] is None) == (split == 0)
    if count:
        assert f"data      {150 - count} rows" in said(capsys)


def test_groups_stay_together(files, tmp_path, capsys) -> None:
    path = write_rows(
        tmp_path / "rows.jsonl",
        [{"prompt": f"p {n}", "completion": "c", "speaker": f"s{n % 10}"} for n in range(120)],
    )
    train(run(files, tmp_path / "out", {"train": path, "valid_split": 20, "split_by": "speaker"}))
    text = said(capsys)
    assert (
        "data      96 rows" in text
        and "24 rows of the training files are held out by a hash of their 'speaker'" in text
    )
    with pytest.raises(RequestError, match=r"spaeker, by which data.split_by splits, is missing"):
        train(run(files, tmp_path / "no", {"train": path, "valid_split": 20, "split_by": "spaeker"}))


def test_a_split_that_leaves_nothing_is_refused(files, tmp_path) -> None:
    path = rows(tmp_path / "rows.jsonl", 12)
    with pytest.raises(RequestError, match=r"data.valid_split \(12\) leaves no row"):
        train(run(files, tmp_path / "out", {"train": path, "valid_split": 12}))
    with pytest.raises(RequestError, match=r"data.valid_split \(1e-09\) holds no row out of 12 rows"):
        train(run(files, tmp_path / "out", {"train": path, "valid_split": 1e-9}))


def mixed(folder: Path) -> list[dict]:
    return [
        {"path": rows(folder / "a.jsonl", 20, "a"), "weight": 3},
        {"path": rows(folder / "b.jsonl", 40, "b"), "weight": 1, "name": "bees"},
    ]


def test_a_mix_trains_and_resumes_to_the_bit(files, tmp_path, capsys) -> None:
    data = {"train": mixed(tmp_path), "valid_split": 0}
    straight = run(files, tmp_path / "straight", data, steps=12)
    train(straight)
    assert "an epoch draws: a 45 of 20 rows (75%), bees 15 of 40 rows (25%)" in said(capsys)
    broken = run(files, tmp_path / "broken", data, steps=12)
    with pytest.raises(Exception, match="stopped after step 5"):
        train(broken, on_step=interrupting(5))
    train(broken, resume=True)
    assert adapter_bytes(tmp_path / "broken") == adapter_bytes(tmp_path / "straight")
    other = json.loads(json.dumps(broken))
    other["data"]["train"][0]["weight"] = 2
    other["train"]["steps"] = 13
    with pytest.raises(RequestError, match=r"finished|data.sources was"):
        train(other, resume=True)


def test_workers_and_the_cache_may_change_between_runs(files, tmp_path) -> None:
    """Issue 5.3: resume, bit for bit, with another number of workers."""
    data = {"train": rows(tmp_path / "rows.jsonl", 200)}
    train(run(files, tmp_path / "straight", {**data, "workers": 1, "cache": "off"}, steps=10))
    broken = run(files, tmp_path / "broken", {**data, "workers": 2, "cache": str(tmp_path / "cache")}, steps=10)
    with pytest.raises(Exception, match="stopped after step 5"):
        train(broken, on_step=interrupting(5))
    broken["data"]["workers"] = 1
    train(broken, resume=True)  # from the cache
    assert adapter_bytes(tmp_path / "broken") == adapter_bytes(tmp_path / "straight")
    assert unmeasured(metrics(tmp_path / "broken")) == unmeasured(metrics(tmp_path / "straight"))


@pytest.mark.parametrize(
    ("data", "words"),
    [
        ({"train": [{"path": "a", "weight": 1}, {"path": "b", "epochs": 2}]}, "weight of 'a' and the epochs of 'b'"),
        ({"train": [{"path": "a", "weight": 1}]}, "has no effect on one source"),
        ({"train": [{"path": "a", "wait": 1}, "b"]}, r"data.train\[0\].wait'; did you mean 'weight'"),
        ({"train": [{"weight": 1}, "b"]}, r"missing setting 'data.train\[0\].path'"),
        ({"train": [{"path": "a", "weight": 0}, "b"]}, "must be more than 0"),
        ({"train": [{"path": "a/x.jsonl"}, {"path": "b/x.jsonl"}]}, "two sources of data.train are called 'x'"),
        ({"train": "a", "mixing_temperature": 2.0}, "data.mixing_temperature has no effect on one source"),
        ({"train": ["a", {"path": "b"}], "mixing_temperature": 0.5}, "must be 1 or more"),
        ({"train": "a", "valid_split": 1.5}, "fraction between 0 and 1"),
        ({"train": "a", "valid_split": "many"}, "a fraction, a number of rows, or auto"),
        ({"train": "a", "valid_split": -1}, "must be 0 or more"),
        ({"train": "a", "valid": "b", "valid_split": 0.1}, "data.valid gives the rows"),
        ({"train": "a", "valid": "b", "split_by": "row"}, "has no effect: data.valid gives the rows"),
        ({"train": "a", "workers": 0}, "data.workers must be 1 or more"),
        ({"train": "a", "workers": "many"}, "data.workers must be a number"),
        ({"train": "a", "cache": ""}, "data.cache is empty"),
    ],
)  # fmt: skip
def test_wrong_settings(data: dict, words: str) -> None:
    from rankwise.recipes.run import read_run

    with pytest.raises(RequestError, match=words):
        read_run({"data": data})


def test_a_run_file_with_sources_is_read_back(tmp_path, monkeypatch) -> None:
    from rankwise.recipes.run import read_run, run_document

    monkeypatch.chdir(tmp_path)
    run = read_run({"data": {"train": [{"path": "a.jsonl", "epochs": 2}, "b.jsonl"], "cache": "kept"}})
    assert run.data.train_paths == [str(tmp_path / "a.jsonl"), str(tmp_path / "b.jsonl")]
    assert [source.name for source in run.data.sources] == ["a", "b"]
    assert run.data.cache == str(tmp_path / "kept")
    assert read_run(run_document(run)) == run
