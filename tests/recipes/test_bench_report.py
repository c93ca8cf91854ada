"""What a report says, and what a runner counts, from a store that was filled with known numbers: nothing is trained."""

from __future__ import annotations

import dataclasses
import multiprocessing
import os
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from rankwise.bench.store import DONE, FAILED, Contents
from rankwise.bench.suite import Margin
from rankwise.recipes.bench import open_bench
from rankwise.recipes.bench_facts import margin_fact
from rankwise.recipes.bench_report import bench_report
from rankwise.recipes.bench_results import num_failed, num_missing
from rankwise.recipes.bench_run import Runner, Worker, checked, instructions, line_of, machine, outcome_of
from rankwise.say import silent
from tests.bench.several import write_several
from tests.bench.suites import write_bench

SUITES = sorted((Path(__file__).parents[2] / "benchmarks" / "quality" / "suites").glob("*.yaml"))
LEVELS = {"base": 2.0, "lora-r4": 1.0, "lora-r2": 1.1, "full": 0.9}
GAP = 0.25
CPU_S = 90.0


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    return write_bench(tmp_path_factory.mktemp("bench"))


@pytest.fixture
def bench(made, tmp_path):
    """A bench of four methods on one task, with an empty store of its own."""
    (tmp_path / "suites").symlink_to(made / "suites")
    (tmp_path / "tasks.yaml").write_text((made / "tasks.yaml").read_text().replace("../", f"{made.parent}/"))
    return open_bench(str(tmp_path / "suites" / "tiny.yaml"))


def level_of(cell):
    """Rates of a grid differ: the higher one is better."""
    return LEVELS[cell.method] + (0.5 if cell.lr == 1e-3 else 0.0)


def fill(bench, cells):
    """Known losses in the store: validation is `GAP` above training, on every example."""
    for cell in cells:
        hard = np.random.default_rng(cell.seed).normal(0, 1e-3)
        losses = {"train": [level_of(cell) + hard] * 16}
        losses |= {
            split: [value + GAP for value in losses["train"][:size]] for split, size in (("valid", 6), ("test", 8))
        }
        code = bench.code_for(cell.settings)
        figures = {"trainable_parameters": 10, "adapter_bytes": 40, "peak_memory_bytes": 2**20, "cpu_s": CPU_S,
                   "load_average": 1.0}  # fmt: skip
        line = {
            "kind": "cell", "cell": cell.identity, "family": cell.family, "code": code.name, "name": cell.name,
            "settings": cell.settings, "status": "done", "losses": losses, "correct": {}, "figures": figures,
            "machine": "M", "versions": {"torch": "0"},
        }  # fmt: skip
        bench.store.append(line, code.name, code.files)


def fill_all(bench):
    for _ in range(2):  # the grid first: then the rate is chosen
        known = bench.store.read()
        fill(bench, [cell for cell in bench.plan(known) if not bench.is_done(cell, known)])


def test_facts_and_figures_of_a_report(bench):
    fill_all(bench)
    result = bench_report(str(bench.folder / "suites" / "tiny.yaml"))
    rows = {row["method"]: row for row in result["rows"]}
    assert all(row["gap"] == pytest.approx(GAP) for row in rows.values())
    text = Path(result["table"]).read_text()
    assert f"| +{GAP:.4f} |" in text
    assert 'Margin of "no worse": 2% of the gain from base to lora-r4 on validation rows, 0.0200 nats.' in text
    assert "0.01 (of 0.001, 0.01, at the edge)" in text
    assert "8 cells of this table are in the store, 0 are missing; 12 CPU-minutes of training and measuring." in text
    assert "All suites of the store together: 8 cells; 0.2 CPU-hours." in text
    assert "The learning rate of methods with a grid is that of the lowest validation loss on seed 0" in text
    assert rows["full"]["overfits"] is None and rows["lora-r4"]["overfits"] == "undecided"
    assert "lora-r4 against full in overfitting: undecided, gap" in text
    assert (result["missing"], result["cpu_s"]) == (0, 8 * CPU_S)


def test_without_a_gain_there_is_no_margin():
    one = {"valid": {"t": {0: [1.0, 2.0], 1: [1.0, 2.0]}}, "test": {"t": {0: [1.0, 2.0], 1: [1.0, 2.0]}}}
    none = margin_fact(Margin("a", "b"), {"a": one, "b": one}, ["t"])
    assert none.endswith('validation rows, which is none: "no worse" is never said.')
    later = margin_fact(Margin("a", "b"), {"a": one, "b": {}}, ["t"])
    assert later.endswith("not known before two seeds of both have been run.")


def test_machine_time_is_of_all_that_was_computed(bench):
    fill_all(bench)
    first = bench.store.read().records[0]
    bench.store.append({**first.body, "code": "older"}, "older", bench.code.files)
    text = Path(bench_report(str(bench.folder / "suites" / "tiny.yaml"))["table"]).read_text()
    assert "All suites of the store together: 8 cells; 0.2 CPU-hours, with 1 that were computed again." in text


def test_a_grid_that_is_not_trained_is_missing(bench):
    report = dataclasses.replace(bench, accepts_stale=True)
    assert num_missing(report, Contents()) == 8  # one base, three of lora-r4 with its grid, two of each other
    fill(bench, [bench.cell("lora-r4", "capitals", 0, 1e-3)])
    assert num_missing(report, bench.store.read()) == 7
    fill(bench, [bench.cell("lora-r4", "capitals", 0, 1e-2)])
    assert num_missing(report, bench.store.read()) == 6


def runner_of(bench, only=(), limit=None, said=None):
    return Runner(bench, only, 2, False, limit, silent if said is None else said.append)


@pytest.mark.parametrize(
    ("only", "left"),
    [([], 8), (["base"], 1), (["lora-r4"], 3), (["lora-r4/*/0"], 2), (["lora-r4/*/1"], 1), (["full", "base"], 3)],
)
def test_what_is_left_is_of_the_cells_that_were_asked_for(bench, only, left):
    assert runner_of(bench, only).num_left(Contents()) == left
    assert runner_of(bench, only, limit=2).num_left(Contents()) == min(left, 2)


def test_how_long_the_rest_takes(bench):
    said = []
    runner = runner_of(bench, said=said)
    runner.say_left(Contents())
    assert said == []  # nothing has been timed yet
    runner.durations = [50.0, 70.0]
    runner.say_left(Contents())
    assert said == ["8 cells left, about 4:00"]  # of 60 s each, two at a time


def test_cells_that_wait_for_the_rate_of_others_are_counted(tmp_path):
    folder = write_several(tmp_path)
    bench = open_bench(str(folder / "suites" / "several.yaml"))
    known = Contents()
    suite = bench.suite
    cells = sum(len(suite.seeds) * (1 if method.is_of_all else len(suite.tasks)) for method in suite.methods.values())
    cells += 1  # the rate of joint's grid that is not chosen
    cells -= len(suite.tasks) * (len(suite.seeds) - 1)  # without a head to draw, base's seeds are one
    assert len(bench.plan(known)) + len(bench.unplanned(known)) == cells
    assert all(name.startswith("vector/all/") for name in bench.unplanned(known, ["vector"]))


def test_a_loss_that_is_no_number_is_a_failure_with_its_reason():
    good = {"status": DONE, "losses": {"train": [0.5], "test": [0.1, 0.2]}}
    assert checked(good) is good
    bad = {"status": DONE, "losses": {"train": [0.5], "test": [0.1, float("nan"), float("inf")]}}
    assert checked(bad) == {"status": FAILED, "reason": "test loss of 2 rows of 3 is no finite number"}
    failed = {"status": FAILED, "reason": "x"}
    assert checked(failed) is failed


@pytest.mark.parametrize("sent", [b"", b"\0\0\1\0half of a message"], ids=["before", "amid"])
def test_a_worker_that_dies_leaves_a_reason(bench, sent):
    ours, theirs = multiprocessing.Pipe(duplex=False)
    os.write(theirs.fileno(), sent)
    theirs.close()
    killed = SimpleNamespace(join=lambda: None, exitcode=-9)
    outcome = outcome_of(Worker(bench.cell("full", "capitals", 0, 1e-2), killed, ours, None))
    assert outcome == {"status": FAILED, "reason": "the worker died with signal 9 (out of memory?)"}


def test_a_cell_that_failed_at_the_chosen_rate_leaves_its_row_undecided(bench):
    cell = bench.cell("lora-r2", "capitals", 1, 1e-2)
    for _ in range(2):
        known = bench.store.read()
        fill(bench, [one for one in bench.plan(known) if not bench.is_done(one, known) and one.name != cell.name])
    line = line_of(bench, cell, {"status": FAILED, "reason": "diverged"}, 1.0)
    bench.store.append(line, bench.code.name, bench.code.files)
    known = bench.store.read()
    assert num_failed(bench, known) == {"lora-r2": 1}
    report = bench_report(str(bench.folder / "suites" / "tiny.yaml"))
    assert "7 cells of this table are in the store, 1 are missing (1 of them failed, see below);" in Path(
        report["table"]
    ).read_text(encoding="utf-8")
    (row,) = (row for row in report["rows"] if row["method"] == "lora-r2")
    assert row["verdict"] == "undecided" and "1 of their runs failed" in row["sentence"]


@pytest.mark.parametrize("path", SUITES, ids=lambda path: path.stem)
def test_committed_suites_can_be_planned_and_read_their_store(path):
    bench = open_bench(str(path))
    assert bench.plan(Contents())
    known = bench.store.read()
    assert known.records and known.torn == 0
    report = dataclasses.replace(bench, accepts_stale=True)
    num_cells = len({cell.identity for cell in report.plan(known)}) + len(report.unplanned(known))
    assert 0 <= num_missing(report, known) <= num_cells


@pytest.mark.parametrize(
    ("widest", "flags", "said"),
    [
        ("AVX2", ["avx2", "sha_ni"], "AVX2, no bf16 instructions"),
        ("AVX512", ["avx512f", "avx512_bf16"], "AVX512, AVX512-BF16"),
        ("AVX512", ["avx512_bf16", "amx_bf16", "amx_tile"], "AVX512, AVX512-BF16 and AMX-BF16"),
        ("DEFAULT", ["asimd", "bf16"], "DEFAULT, BF16"),
    ],
)
def test_a_machine_is_told_from_others_of_its_name(widest, flags, said):
    assert instructions(widest, flags) == said
    assert "bf16" in machine().lower() and "core" in machine()
