"""Data sets through `datasets`: from a folder, from the cache, and one line when they can't be had."""

from __future__ import annotations

import builtins
from pathlib import Path

import pytest

from rankwise.data import hub_rows
from rankwise.data.hub_rows import hub_hash, load_hub
from rankwise.data.rows import read_rows
from rankwise.errors import RequestError
from tests.data.builders import turns, write_rows


@pytest.fixture
def dataset(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A data set of two splits, and a cache of its own."""
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    folder = tmp_path / "owner" / "name"
    folder.mkdir(parents=True)
    write_rows(folder / "train.jsonl", [{"prompt": f"q{i}", "completion": f"a{i}"} for i in range(1200)])
    write_rows(folder / "test.jsonl", [{"prompt": "q", "completion": ""}])
    return folder


def test_rows_of_a_split(dataset):
    found = read_rows(f"hf:{dataset}/train")
    assert (len(found.rows), found.problems) == (1200, ())
    assert (found.rows[-1].line, found.rows[-1].turns) == (1200, turns("q1199", "a1199"))
    assert found.rows[0].file == f"hf:{dataset}/train"
    assert found.why.endswith("the first 1,000 rows have prompt and completion; Hub data set)")
    assert [str(problem) for problem in read_rows(f"hf:{dataset}/test").problems] == [
        f"hf:{dataset}/test:1: completion is empty"
    ]
    assert len(read_rows(f"hf:{dataset}/train[:10]").rows) == 10


def test_the_hash_is_of_the_rows(dataset):
    assert hub_hash(f"hf:{dataset}/train[:5]") == hub_hash(f"hf:{dataset}/train[:5]")
    assert hub_hash(f"hf:{dataset}/train[:5]") != hub_hash(f"hf:{dataset}/train[5:10]")


def test_a_split_that_is_not_there(dataset):
    with pytest.raises(RequestError, match=r"can't be had: Unknown split .*; check its name, configuration and split"):
        read_rows(f"hf:{dataset}/nothing")


@pytest.mark.parametrize("reference", ["hf:", "hf:imdb", "hf:imdb/train", "hf:a/b/c/d", "hf:a b/c/d", "hf:a/b:/c"])
def test_references_that_are_none(reference):
    with pytest.raises(RequestError, match="must be written hf:owner/name/split"):
        load_hub(reference)


def test_references_say_configuration_and_revision(monkeypatch):
    import datasets

    asked = []
    monkeypatch.setattr(hub_rows, "_check_reachable", lambda reference, name: None)
    monkeypatch.setattr(datasets, "load_dataset", lambda *args, **named: asked.append((args, named)))
    load_hub("hf:owner/name:main.2@v1.0/train[:10%]")
    load_hub("hf:owner/name/test")
    assert asked == [
        (("owner/name", "main.2"), {"split": "train[:10%]", "revision": "v1.0"}),
        (("owner/name", None), {"split": "test", "revision": None}),
    ]


def test_without_network(monkeypatch):
    from huggingface_hub import HfApi, constants

    def unreachable(self, *args, **named):
        raise OSError("no route to host")

    monkeypatch.setattr(HfApi, "dataset_info", unreachable)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    hub_rows._check_reachable.cache_clear()
    with pytest.raises(RequestError) as error:
        read_rows("hf:owner/name/train")
    assert error.value.message == (
        "data set 'hf:owner/name/train' can't be had: the Hub cannot be reached (OSError); with HF_HUB_OFFLINE=1 "
        "a copy in the local cache is used"
    )


def test_without_the_package(monkeypatch):
    imported = builtins.__import__

    def without(name, *args, **named):
        if name == "datasets":
            raise ImportError(name)
        return imported(name, *args, **named)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(RequestError, match=r"needs the package datasets: pip install 'rankwise\[hub\]'"):
        read_rows("hf:owner/name/train")
