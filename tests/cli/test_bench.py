"""`rankwise bench run`, `report` and `check` on tiny cells: the store, the table, the documents and exit codes."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml
from filelock import FileLock

from rankwise.bench.code_version import CodeVersion
from rankwise.bench.store import Store
from rankwise.cli.main import main
from rankwise.evaluate.answers import score
from rankwise.recipes.bench import Bench, matches, open_bench
from tests.bench.suites import METHODS, SUITE, write_bench, write_suite

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def bench(tmp_path_factory):
    """A bench whose suite has been run."""
    folder = write_bench(tmp_path_factory.mktemp("bench"))
    assert main(["bench", "run", str(folder / "suites" / "tiny.yaml")]) == 0
    return folder


@pytest.fixture
def copy(bench, tmp_path):
    """A copy of it, with the same content and other paths."""
    shutil.copytree(bench.parent, tmp_path / "copy")
    return tmp_path / "copy" / "bench"


@pytest.fixture
def document(capsys):
    def called(*argv, code=0):
        capsys.readouterr()
        assert main([*map(str, argv), "--json"]) == code
        return json.loads(capsys.readouterr().out)

    return called


def suite_of(folder, name="tiny"):
    return folder / "suites" / f"{name}.yaml"


def test_the_store_holds_each_cell_once_with_its_figures(bench):
    records = Store(bench / "store.jsonl").read().records
    names = sorted(record.body["name"] for record in records)
    assert len(names) == len({record.cell for record in records}) == 8
    assert [name for name in names if name.startswith("base")] == ["base/capitals/0"]  # no head to draw: seeds are one
    assert sum(name.startswith("lora-r4/capitals/0@") for name in names) == 2  # its grid
    assert sum(name.startswith("lora-r4/capitals/1@") for name in names) == 1  # the chosen rate
    for record in records:
        assert {"cpu_s", "wall_s", "peak_memory_bytes", "load_average", "tokens", "steps"} <= set(record.figures)
        assert {"trainable_parameters", "adapter_bytes"} <= set(record.figures)
        assert (record.figures["flops"] > 0) == (record.figures["steps"] > 0)
        assert [len(record.losses[split]) for split in ("train", "valid", "test")] == [16, 6, 8]
        assert record.body["machine"] and record.body["versions"]["torch"] and record.body["settings"]["data.test"]


def test_nothing_is_run_twice_wherever_the_bench_lies(copy, document):
    before = (copy / "store.jsonl").read_bytes()
    result = document("bench", "run", suite_of(copy))
    assert (result["run"], result["left"], result["failed"], result["waiting"]) == (0, 0, [], [])
    assert (copy / "store.jsonl").read_bytes() == before


def test_the_table_its_sentences_and_picture(bench, document, capsys):
    result = document("bench", "report", suite_of(bench))
    rows = {row["method"]: row for row in result["rows"]}
    assert list(rows) == list(METHODS) and rows["lora-r4"]["verdict"] == "reference"
    assert (result["cells"], result["stale"], result["missing"]) == (8, 0, 0)
    text = Path(result["table"]).read_text()
    assert all(row["sentence"] in text for row in rows.values()) and "![" in text
    assert "learning rate of methods with a grid is that of the lowest validation loss on seed 0" in text
    assert Path(result["picture"]).read_bytes().startswith(b"\x89PNG")
    document("bench", "report", suite_of(bench))
    assert Path(result["table"]).read_text() == text
    assert main(["bench", "report", str(suite_of(bench))]) == 0
    assert rows["full"]["sentence"] in capsys.readouterr().out


def test_cells_of_before_operations_were_counted_are_read(copy, document):
    store = Store(copy / "store.jsonl")
    records = store.read().records
    store.path.unlink()
    for record in records:
        line = {key: value for key, value in record.body.items() if key not in ("sha256", "code_files")}
        line["figures"] = {key: value for key, value in line["figures"].items() if key != "flops"}
        store.append(line, record.code, {})
    result = document("bench", "report", suite_of(copy))
    text = Path(result["table"]).read_text()
    assert "| FLOPs |" in text and "e+" not in text.split("FLOPs")[1].split("verdict")[1].split("\n\n")[0]
    assert (result["cells"], result["stale"]) == (8, 0)


def test_the_table_of_rates(copy, document):
    """Its cells are those of the other suite, but for one seed at one rate."""
    assert document("bench", "run", suite_of(copy, "rates"))["run"] == 1
    result = document("bench", "report", suite_of(copy, "rates"))
    assert {row["method"]: set(row["losses"]) for row in result["rows"]} == {
        "lora-r4": {"0.001", "0.01"}, "full": {"0.01"}
    }  # fmt: skip
    assert result["picture"] is None and "Independence of rank" in Path(result["table"]).read_text()


def test_answers_of_headline_rows_stand_beside_their_losses(copy, document):
    answers = {"methods": ["base", "lora-r4"], "seed": 1, "rows": 3, "max_new_tokens": 4}
    suite = write_suite(copy, "answers", {**SUITE, "answers": answers, "default_of": "lr"})
    assert document("bench", "run", suite)["run"] == 2  # one of each; the others are those of the suite without answers
    cells = {(r.body["name"].split("@")[0], "answers" in r.body): r for r in Store(copy / "store.jsonl").read().records}
    plain, told = (cells["lora-r4/capitals/1", given] for given in (False, True))
    assert told.losses == plain.losses and told.code != plain.code
    found = told.body["answers"]
    references = [json.loads(line)["completion"] for line in (copy.parent / "test.jsonl").read_text().splitlines()[:3]]
    assert (found["rows"], found["max_new_tokens"], len(found["texts"])) == (3, 4, 3)
    assert {name: found[name] for name in ("chrf", "bleu")} == score(found["texts"], references, ("chrf", "bleu"))
    result = document("bench", "report", suite)
    rows = {row["method"]: row["answers"] for row in result["rows"]}
    assert rows["lora-r4"] == {"chrF": found["chrf"], "BLEU": found["bleu"]} and set(rows["base"]) == {"chrF", "BLEU"}
    assert rows["lora-r2"] == rows["full"] == {} and result["missing"] == 0
    text = Path(result["table"]).read_text()
    assert result["sentences"][-1].startswith("The default of lr") and result["sentences"][-1] in text
    assert "| chrF | BLEU |" in text and "to the first 3 test rows of each task on seed 1" in text
    again = ("bench", "check", suite, "--only", "lora-r4/capitals/1", "--workers", "1")
    assert all(entry["exact"] for entry in document(*again)["cells"])
    store = Store(copy / "store.jsonl")
    records = store.read().records
    store.path.unlink()
    for record in records:
        line = {key: value for key, value in record.body.items() if key not in ("sha256", "code_files")}
        line |= {"answers": {**line["answers"], "chrf": 1.5}} if "answers" in line else {}
        store.append(line, record.code, {})
    (entry,) = document(*again, code=1)["cells"]  # the losses are the same, the answers are not
    assert not entry["exact"] and entry["max_abs_diff"] == 0


@pytest.mark.parametrize("objective", ["classification", "text"])
def test_what_asks_for_no_answers_has_none(objective, tmp_path, capsys):
    folder = write_bench(tmp_path)
    tasks = yaml.safe_load((folder / "tasks.yaml").read_text())
    tasks["capitals"]["train"]["objective"] = objective
    (folder / "tasks.yaml").write_text(yaml.safe_dump(tasks))
    suite = write_suite(folder, "answers", {**SUITE, "answers": {"methods": ["full"], "seed": 1}})
    assert main(["bench", "run", str(suite)]) == 2
    assert f"answers has no effect: 'capitals' is of objective {objective}" in capsys.readouterr().err


def test_a_stored_cell_comes_out_the_same_again(bench, document):
    result = document("bench", "check", suite_of(bench), "--only", "lora-r2/capitals/1")
    assert [(entry["cell"], entry["exact"]) for entry in result["cells"]] == [("lora-r2/capitals/1@0.01", True)]


def test_other_code_makes_cells_stale_until_checked(copy, document, monkeypatch):
    code = open_bench(str(suite_of(copy))).code
    other = CodeVersion("other", {**code.files, "rankwise.adapters.lora": "changed"})
    monkeypatch.setattr(Bench, "code", property(lambda self: other))
    result = document("bench", "report", suite_of(copy))
    assert result["stale"] == 8 and all(row["stale"] for row in result["rows"])
    assert "rankwise.adapters.lora" in Path(result["table"]).read_text()
    checked = document("bench", "check", suite_of(copy))
    assert len(checked["cells"]) == 4 and all(entry["exact"] for entry in checked["cells"])  # one of each method
    assert document("bench", "report", suite_of(copy))["stale"] == 0
    assert document("bench", "run", suite_of(copy))["run"] == 0


def test_a_result_that_differs_is_said_and_stays_stale(copy, document, monkeypatch, capsys):
    lines = (copy / "store.jsonl").read_text().splitlines()
    kept = [json.loads(line) for line in lines if json.loads(line)["name"].startswith("lora-r2/capitals/0")]
    (copy / "store.jsonl").unlink()
    kept[0]["losses"]["test"][0] += 1e-3
    store = Store(copy / "store.jsonl")
    store.append({key: value for key, value in kept[0].items() if key not in ("sha256", "code_files")}, "old", {})
    result = document("bench", "check", suite_of(copy), "--only", "lora-r2", code=1)
    assert result["cells"][0]["exact"] is False and result["cells"][0]["max_abs_diff"] == pytest.approx(1e-3)
    assert "came out otherwise than stored" in result["error"]["message"]
    assert not store.read().same


def test_a_failing_cell_is_recorded_and_run_again_on_request_only(copy, document):
    bad = {**METHODS, "bad": {"adapter": {"r": 2}, "lr": 1e30}}
    write_suite(copy, "bad", {**SUITE, "methods": bad})
    result = document("bench", "run", suite_of(copy, "bad"), "--only", "bad/capitals/0", code=1)
    assert result["failed"] == ["bad/capitals/0@1e+30"] and "1 cell failed" in result["error"]["message"]
    known = Store(copy / "store.jsonl").read().records[-1]
    assert known.status == "failed" and "step" in known.body["reason"]
    again = ("bench", "run", suite_of(copy, "bad"), "--only", "bad/capitals/0")
    assert document(*again)["failed"] == []
    assert document(*again, "--retry-failed", code=1)["failed"]
    report = document("bench", "report", suite_of(copy, "bad"))
    row = next(row for row in report["rows"] if row["method"] == "bad")
    assert row["sentence"] == "bad is undecided against lora-r4: 1 of their runs failed."
    assert "1 cell failed" in Path(report["table"]).read_text()


def test_what_is_left_and_waiting(copy, document):
    (copy / "store.jsonl").unlink()
    result = document("bench", "run", suite_of(copy), "--limit", 1, "--workers", 1)
    assert result["run"] == 1 and result["waiting"] == ["lora-r4"]
    report = document("bench", "report", suite_of(copy))
    assert report["missing"] == 7 and {row["verdict"] for row in report["rows"]} == {"undecided", "reference"}


@pytest.mark.slow
def test_a_runner_that_is_killed_leaves_a_whole_store_and_no_workers(copy):
    (copy / "store.jsonl").unlink()
    slow = {**SUITE, "methods": {**METHODS, "full": {"kind": "full", "lr": 1e-2, "train": {"steps": 100_000}}}}
    write_suite(copy, "slow", slow)
    command = [sys.executable, "-m", "rankwise", "bench", "run", str(suite_of(copy, "slow")), "--only", "base", "full"]
    runner = subprocess.Popen(command, cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)}, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    while not (copy / "store.jsonl").exists() and time.monotonic() < deadline:
        time.sleep(0.1)
    time.sleep(0.5)
    children = _descendants(runner.pid)
    runner.send_signal(signal.SIGKILL)
    runner.wait()
    assert children
    while any(_is_alive(pid) for pid in children) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not any(_is_alive(pid) for pid in children)
    contents = Store(copy / "store.jsonl").read()
    assert contents.torn == 0 and {record.body["name"] for record in contents.records} <= {"base/capitals/0"}
    assert main(["bench", "run", str(suite_of(copy)), "--only", "base"]) == 0  # the lock went with it


def _descendants(pid):
    found = []
    for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split():
        found += [int(child), *_descendants(int(child))]
    return found


def _is_alive(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["run", "none"], "there is no suite 'none'"),
        (["run", "SUITE", "--only", "lora-r5"], "--only lora-r5 matches no cell; did you mean 'lora-r"),
        (["run", "SUITE", "--workers", "0"], "must be a whole number from 1"),
        (["check", "EMPTY"], "no finished cell of 'empty' to run again"),
        (["report", "LONE"], "there is no tasks.yaml in"),
        (["run", "WRONG"], "lora-r4 on capitals: adapter.r"),
    ],
)
def test_wrong_requests(copy, capsys, words, message):
    write_suite(copy, "empty", {**SUITE, "methods": {**METHODS, "lora-r4": {"adapter": {"r": 3}, "lr": 1.0}}})
    write_suite(copy, "wrong", {**SUITE, "methods": {**METHODS, "lora-r4": {"adapter": {"r": 0}, "lr": 1.0}}})
    if words[0] == "check":
        (copy / "store.jsonl").unlink()
    (copy / "alone" / "suites").mkdir(parents=True)
    names = {"SUITE": suite_of(copy), "EMPTY": suite_of(copy, "empty"), "WRONG": suite_of(copy, "wrong"),
             "LONE": shutil.copy(suite_of(copy), copy / "alone" / "suites")}  # fmt: skip
    assert main(["bench", *(str(names.get(word, word)) for word in words)]) == 2
    assert message in capsys.readouterr().err


def test_one_runner_at_a_time(copy, capsys):
    with FileLock(f"{copy / 'store.jsonl'}.runner.lock"):
        assert main(["bench", "run", str(suite_of(copy))]) == 2
    assert "another run is at work on" in capsys.readouterr().err


def test_patterns():
    name = "lora-r4/movies/0@0.001"
    assert all(matches(p, name) for p in ("lora-r4", "lora-*", "*/movies", "lora-r4/movies/0", name, "*/*/0"))
    assert not any(matches(p, name) for p in ("lora", "lora-r4/tweets", "*/*/1", "movies", "lora-r4/movies/0@0.01"))
