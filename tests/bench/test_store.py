"""The store: crash-safe, locked, checked, and honest about code that has changed."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from rankwise.bench.store import Store
from rankwise.errors import RequestError, WriteError

ROOT = Path(__file__).parents[2]


def line(cell="c1", code="v1", status="done", **more):
    return {
        "kind": "cell",
        "cell": cell,
        "family": "f",
        "code": code,
        "status": status,
        "losses": {"test": [0.1]},
        **more,
    }


@pytest.fixture
def store(tmp_path):
    return Store(tmp_path / "deep" / "store.jsonl")


def test_what_is_written_is_read(store):
    assert store.read().records == []
    assert store.append(line(losses={"test": [0.1, 1e-7, 3.0]}), "v1", {"a": "1"})
    assert store.append(line("c2"), "v1", {"a": "1"})
    contents = store.read()
    assert contents.find("c1", "v1").losses == {"test": [0.1, 1e-7, 3.0]}
    assert [record.cell for record in contents.records] == ["c1", "c2"] and contents.codes == {"v1": {"a": "1"}}
    assert store.path.read_text().count("code_files") == 1


def test_a_finished_cell_is_not_written_again_and_a_failed_one_is(store):
    assert store.append(line(status="failed", reason="x"), "v1", {})
    assert store.read().find("c1", "v1") is None and store.read().find("c1", "v1", "failed")
    assert store.append(line(), "v1", {})
    before = store.path.read_bytes()
    assert not store.append(line(), "v1", {})
    assert store.path.read_bytes() == before


def test_other_code_makes_results_stale_until_it_is_shown_to_give_the_same(store):
    store.append(line(), "v1", {"a": "1", "b": "1"})
    contents = store.read()
    assert contents.find("c1", "v2") is None and contents.stale("c1", "v2").code == "v1"
    assert contents.stale("c1", "v1") is None
    assert contents.changed_files("v1", {"a": "1", "b": "2", "c": "1"}) == ["b", "c"]
    store.append({"kind": "same", "old": "v1", "new": "v2", "families": ["other"], "cells": []}, "v2", {})
    assert store.read().find("c1", "v2") is None
    store.append({"kind": "same", "old": "v1", "new": "v2", "families": ["f"], "cells": ["c1"]}, "v2", {})
    assert store.read().find("c1", "v2").code == "v1" and store.read().stale("c1", "v2") is None


@pytest.mark.parametrize("cut", [1, 20])
def test_a_torn_last_line_is_seen_and_dropped(store, cut):
    store.append(line(), "v1", {})
    whole = store.path.read_bytes()
    store.append(line("c2"), "v1", {})
    store.path.write_bytes(store.path.read_bytes()[:-cut])
    contents = store.read()
    assert contents.torn > 0 and [record.cell for record in contents.records] == ["c1"]
    store.append(line("c3"), "v1", {})
    contents = store.read()
    assert contents.torn == 0 and [record.cell for record in contents.records] == ["c1", "c3"]
    assert store.path.read_bytes().startswith(whole)


def test_changed_and_broken_lines_are_refused_by_number(store):
    store.append(line(), "v1", {})
    store.append(line("c2"), "v1", {})
    good = store.path.read_text()
    store.path.write_text(good.replace("0.1", "0.2", 1))
    with pytest.raises(RequestError, match=r"line 1 was changed after it was written"):
        store.read()
    store.path.write_text(good + "{}\n")
    with pytest.raises(RequestError, match=r"line 3 is no line of a store"):
        store.read()
    store.path.write_text("\n" + good)
    with pytest.raises(RequestError, match="line 1 is no line"):
        store.append(line("c4"), "v1", {})


def test_a_store_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(WriteError, match="file"):
        Store(tmp_path / "file" / "store.jsonl").append(line(), "v1", {})


def test_two_writers_do_not_mix(store):
    script = (
        "import sys; from pathlib import Path; from rankwise.bench.store import Store\n"
        "store = Store(Path(sys.argv[1]))\n"
        "for n in range(25):\n"
        "    cell = {'kind': 'cell', 'cell': f'{sys.argv[2]}-{n}', 'family': 'f', 'code': 'v', 'status': 'done',\n"
        "            'losses': {'test': [0.5] * 2000}}\n"
        "    assert store.append(cell, 'v', {})\n"
        "    store.append({**cell, 'cell': f'both-{n}'}, 'v', {})\n"
    )
    writers = [
        subprocess.Popen([sys.executable, "-c", script, str(store.path), name], cwd=ROOT, env={"PYTHONPATH": str(ROOT)})
        for name in ("a", "b")
    ]
    assert [writer.wait() for writer in writers] == [0, 0]
    cells = [record.cell for record in store.read().records]
    assert len(cells) == len(set(cells)) == 75
    assert all(json.loads(text) for text in store.path.read_text().splitlines())
