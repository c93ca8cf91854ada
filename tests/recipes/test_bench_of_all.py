"""Cells on all tasks: made of single adapters, trained at once, in stages, with a new task; each row as it is alone."""

from __future__ import annotations

import dataclasses
import threading
import time
from pathlib import Path
from statistics import fmean

import pytest
import yaml
from filelock import FileLock

from rankwise.bench.store import CELL, DONE, Contents, Record
from rankwise.errors import RequestError
from rankwise.recipes.bench import Bench, NotYet, open_bench
from rankwise.recipes.bench_cell import run_cell
from rankwise.recipes.bench_flops import flops_of_all
from rankwise.recipes.bench_of_all import find_sources, run_of_all
from rankwise.recipes.finetune import train
from rankwise.recipes.run import run_document
from tests.bench.several import METHODS, SUITE, write_several
from tests.bench.suites import write_suite
from tests.recipes.task_runs import ANSWERS

NO_CELLS = Contents()
SIZES = {"valid": 4, "test": 5}


@pytest.fixture(scope="module")
def bench(tmp_path_factory):
    folder = write_several(tmp_path_factory.mktemp("several"))
    fixed = {**METHODS, "joint": {**METHODS["joint"], "lr": 2e-2}}  # rates are not chosen here
    write_suite(folder, "fixed", {**SUITE, "methods": fixed})
    return open_bench(str(folder / "suites" / "fixed.yaml"))


@pytest.fixture(scope="module")
def cell(bench):
    """What a method's cell of seed 0 comes to, computed once in this process."""
    made = {}

    def found(method):
        if method not in made:
            asked = bench.cell_of_all(method, 0, bench.chosen_rate(method, NO_CELLS), NO_CELLS)
            work = bench.work(asked, NO_CELLS)
            find_sources(work)
            made[method] = run_of_all(work)
        return made[method]

    return found


@pytest.fixture(scope="module")
def singles(bench):
    return {task: run_cell(bench.cell("singles", task, 0, 2e-2).run, "adapter") for task in ANSWERS}


def of_task(outcome, task, split="test"):
    return outcome["losses"][f"{task}/{split}"]


def test_a_hard_gate_is_each_adapter_alone(cell, singles):
    hard = cell("hard")
    for task, alone in singles.items():
        for split in ("train", "valid", "test"):
            assert of_task(hard, task, split) == pytest.approx(alone["losses"][split], rel=1e-4)
            assert hard["units"][f"{task}/{split}"] == alone["units"][split]
    parameters = sum(alone["figures"]["trainable_parameters"] for alone in singles.values())
    assert hard["figures"]["trainable_parameters"] == parameters


def test_an_inferred_gate_takes_the_adapter_that_it_finds(cell, singles):
    """A row that is routed right has the single adapter's loss; nobody has told it the task."""
    inferred = cell("inferred")
    shares = []
    for task, alone in singles.items():
        routed = inferred["routed"][f"{task}/test"]
        for right, loss, single in zip(routed, of_task(inferred, task), alone["losses"]["test"], strict=True):
            assert not right or loss == pytest.approx(single, rel=1e-4)
        shares += routed
    assert set(shares) <= {0, 1} and sum(shares) > 0


def test_combined_adapters(cell):
    uniform, ties = cell("uniform"), cell("ties")
    assert uniform["losses"] != ties["losses"]
    assert uniform["figures"]["trainable_parameters"] > ties["figures"]["trainable_parameters"]
    assert (uniform["figures"]["steps"], set(uniform["losses"])) == (0, set(cell("hard")["losses"]))


def test_a_joint_cell_is_the_run_that_train_does(bench, cell, tmp_path):
    asked = bench.cell_of_all("joint", 0, 2e-2, NO_CELLS)
    train({**run_document(asked.run), "output": str(tmp_path / "out")}, quiet=True)
    metrics = yaml.safe_load((tmp_path / "out" / "summary.json").read_text())["tasks"]["losses"]
    joint = cell("joint")
    for task in ANSWERS:
        pairs = list(zip(of_task(joint, task, "valid"), joint["units"][f"{task}/valid"], strict=True))
        mean = sum(loss * count for loss, count in pairs) / sum(count for _, count in pairs)
        assert mean == pytest.approx(metrics[task], rel=1e-4)


def test_total_parameters_are_equal(cell):
    """Singles of rank r for each of T tasks have as many as one joint adapter of rank T r."""
    counts = {method: cell(method)["figures"]["trainable_parameters"] for method in ("hard", "joint", "progressive")}
    assert len(set(counts.values())) == 1


def test_a_soft_gate_learns_its_shares_alone(cell):
    soft = cell("soft")
    assert soft["figures"]["steps"] == 3
    assert 0 < soft["figures"]["trained_parameters"] < 20 < soft["figures"]["trainable_parameters"]


def test_stages_are_measured_after_each_tasks_own(cell):
    progressive = cell("progressive")
    first, second, last = ANSWERS
    keys = set(progressive["losses"])
    assert {f"{first}/test-own", f"{second}/test-own"} <= keys and f"{last}/test-own" not in keys
    assert of_task(progressive, first, "test-own") != of_task(progressive, first)
    assert not any(key.endswith("test-own") for key in cell("joint")["losses"])


def test_a_new_task_is_learned_by_its_vector(cell):
    vector = cell("vector")
    new = list(ANSWERS)[-1]
    assert of_task(vector, new, "test-before") != of_task(vector, new)
    assert f"{next(iter(ANSWERS))}/test-before" not in vector["losses"]
    figures = vector["figures"]
    assert figures["new_task_steps"] == 3 and 0 < figures["new_task_parameters"] < figures["trainable_parameters"] / 10
    assert fmean(of_task(vector, new, "train")) != fmean(of_task(cell("embedding"), new, "train"))


def test_the_same_again_to_the_last_bit(bench, cell, tmp_path):
    """Also where the adapters that it begins with are trained anew."""
    elsewhere = dataclasses.replace(bench, folder=tmp_path)
    asked = bench.cell_of_all("soft", 0, 0.5, NO_CELLS)
    work = elsewhere.work(asked, NO_CELLS)
    find_sources(work)
    assert all(Path(source.folder).is_relative_to(tmp_path) for source in work.sources.values())
    assert run_of_all(work) == cell("soft")


def test_what_another_worker_is_making_comes_last(bench, tmp_path):
    """The first adapter's lock is let go when the others are there: whoever waits for it first never ends."""
    work = dataclasses.replace(bench, folder=tmp_path).work(bench.cell_of_all("soft", 0, 0.5, NO_CELLS), NO_CELLS)
    first, *others = (Path(source.folder) for source in work.sources.values())
    first.parent.mkdir(parents=True)
    lock = FileLock(f"{first}.lock", thread_local=False)
    lock.acquire()
    made = threading.Thread(target=find_sources, args=(work,), daemon=True)
    made.start()
    try:
        deadline = time.monotonic() + 60
        while not all(other.exists() for other in others) and time.monotonic() < deadline:
            time.sleep(0.05)
        assert others and all(other.exists() for other in others) and not first.exists()
    finally:
        lock.release()
    made.join(60)
    assert first.exists()


def test_operations(bench, cell):
    def flops(method):
        asked = bench.cell_of_all(method, 0, bench.chosen_rate(method, NO_CELLS), NO_CELLS)
        return flops_of_all(bench.work(asked, NO_CELLS), cell(method)["figures"])

    assert flops("ties") == flops("hard") == 0 < flops("inferred") < flops("soft") < flops("joint")
    assert flops("joint") == pytest.approx(flops("progressive"), rel=0.2)
    assert flops("vector") > 0


# --- what names a cell -----------------------------------------------------------------------------------------------


def settings(bench, method, seed=0):
    return bench.cell_of_all(method, seed, bench.chosen_rate(method, NO_CELLS), NO_CELLS)


def test_identities(bench):
    """All methods and seeds have cells of their own; a family has the seeds of one method."""
    cells = [settings(bench, name, seed) for name, m in bench.suite.methods.items() if m.is_of_all for seed in (0, 1)]
    assert len({cell.identity for cell in cells}) == len(cells)
    assert len({cell.family for cell in cells}) == len(cells) / 2
    assert not any("/" in str(value) for value in settings(bench, "joint").settings.values())  # no path


def test_the_order_of_tasks_counts(bench):
    turned = dataclasses.replace(bench.suite, tasks=tuple(reversed(bench.suite.tasks)))
    other = dataclasses.replace(bench, suite=turned)
    assert settings(other, "joint").identity != settings(bench, "joint").identity


def record_of(bench: Bench, cell, valid: float) -> Record:
    losses = {f"{task}/valid": [valid] for task in ANSWERS} if cell.every else {"valid": [valid]}
    body = {"kind": CELL, "losses": losses, "settings": cell.settings}
    return Record(cell.identity, cell.family, bench.code_for(cell.settings).name, DONE, body)


def test_a_rate_that_is_another_methods_and_what_waits_for_it(bench):
    bench = open_bench(str(bench.folder / "suites" / "several.yaml"))
    with pytest.raises(NotYet, match=r"joint/all/0@0\.001"):
        bench.chosen_rate("embedding", NO_CELLS)
    assert list(bench.cells("embedding", NO_CELLS)) == []
    grid = bench.tuning_cells("joint", NO_CELLS)
    known = Contents([record_of(bench, cell, loss) for cell, loss in zip(grid, (0.3, 0.4), strict=True)])
    assert bench.chosen_rate("embedding", known) == 1e-3
    names = [cell.name for cell in bench.cells("embedding", known)]
    assert names == ["embedding/all/0@0.001", "embedding/all/1@0.001"]


def test_what_can_not_be(bench):
    def asked(change):
        methods = {**METHODS, "x": change}
        path = write_suite(bench.folder, "wrong", {**SUITE, "methods": methods})
        found = open_bench(str(path))
        return found.cell_of_all("x", 0, found.suite.methods["x"].rates[0], NO_CELLS)

    joint = METHODS["joint"] | {"lr": 1e-2}
    for change, message in (
        ({"kind": "gate", "gate": {"mode": "hard"}}, "kind: gate needs singles"),
        (
            {"kind": "gate", "singles": "joint", "gate": {"mode": "hard"}},
            "singles: 'joint' is no method of kind: adapter",
        ),
        ({"kind": "combine", "singles": "singles"}, "combine.method is missing"),
        (
            {"kind": "combine", "singles": "singles", "combine": {"method": "sum"}, "lr": 1.0},
            "lr has no effect with kind",
        ),
        ({**joint, "combine": {"method": "sum"}}, "combine has no effect with kind: tasks"),
        ({**joint, "singles": "singles"}, "adapter has no effect with singles"),
        ({**joint, "new_task": {}}, "new_task is of task embeddings"),
        ({**joint, "tasks": {"data": {}}}, "tasks.data is said by the suite"),
        ({**joint, "lr": "base"}, "lr: 'base' is no method with rates of its own"),
        ({**joint, "tasks": {"gates": {}}}, "x: unknown setting 'tasks.gates'; did you mean"),
    ):
        with pytest.raises(RequestError, match=message):
            asked(change)
    with pytest.raises(RequestError, match="behind needs it before"):
        references = {"by": "behind", "references": dict.fromkeys(ANSWERS, 1.0)}
        run_of_all(bench.work(asked({**joint, "tasks": {"sampling": references}}), NO_CELLS))
    with pytest.raises(RequestError, match="kind: gate is for table: tasks"):
        open_bench(str(write_suite(bench.folder, "wrong", {**SUITE, "table": "comparison"})))


def test_tasks_that_differ_in_more_than_their_files(bench):
    tasks = {**bench.tasks, "doubled": {**bench.tasks["doubled"], "train": {"steps": 9, "precision": "fp32"}}}
    with pytest.raises(RequestError, match="'capitals' and 'doubled' differ in more than their files"):
        settings(dataclasses.replace(bench, tasks=tasks), "joint")
