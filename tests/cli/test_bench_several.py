"""`rankwise bench` on a suite of several tasks: the table of a store that is written by hand, and a whole run."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from rankwise.bench.store import CELL, DONE
from rankwise.cli.main import main
from rankwise.recipes.bench import open_bench
from tests.bench.several import METHODS, write_several
from tests.recipes.task_runs import ANSWERS

LEVELS = {"base": 1.0, "uniform": 0.1, "joint": -0.05}
FIGURES = {
    "trainable_parameters": 10, "adapter_bytes": 100, "steps": 1, "tokens": 9, "trained_tokens": 5, "cpu_s": 2.0,
    "peak_memory_bytes": 1000, "load_average": 0.5, "wall_s": 3.0, "flops": 7,
}  # fmt: skip


@pytest.fixture(scope="module")
def empty(tmp_path_factory):
    return write_several(tmp_path_factory.mktemp("several"))


def suite_of(folder):
    return folder / "suites" / "several.yaml"


def line_of(bench, cell):
    """A cell's line with losses by chance around the method's level; what is asked for twice is the same."""
    rng = np.random.default_rng(int(cell.identity, 16) % 2**32)
    level, losses, routed = LEVELS.get(cell.method, 0.0), {}, {}
    for split, size in (("train", 14), ("valid", 4), ("test", 40)):
        for task in ANSWERS if cell.every is not None else [cell.task]:
            number = list(ANSWERS).index(task)
            hard = np.random.default_rng(number).gamma(2.0, 0.3, size)
            key = split if cell.every is None else f"{task}/{split}"
            losses[key] = (hard + level + rng.normal(0, 1e-5, size)).tolist()
            if cell.method == "inferred":
                routed[key] = [1] * (size // 2) + [0] * (size - size // 2)
    for task in list(ANSWERS)[:-1] if cell.method == "progressive" else []:
        losses[f"{task}/test-own"] = [loss - 0.2 for loss in losses[f"{task}/test"]]
    if cell.method == "vector":
        new = list(ANSWERS)[-1]
        losses[f"{new}/test-before"] = [loss + 0.2 for loss in losses[f"{new}/test"]]
    return {
        "kind": CELL, "cell": cell.identity, "family": cell.family, "code": bench.code_for(cell.settings).name,
        "name": cell.name, "settings": cell.settings, "versions": {"torch": "2"}, "machine": "none", "status": DONE,
        "figures": FIGURES, "losses": losses, "units": {}, "correct": {}, **({"routed": routed} if routed else {}),
    }  # fmt: skip


@pytest.fixture
def filled(empty, tmp_path):
    """A bench whose store holds every cell: those of the grid first, as a runner finds them."""
    shutil.copytree(empty.parent, tmp_path / "copy")
    bench = open_bench(str(suite_of(tmp_path / "copy" / "bench")))
    for _ in range(2):
        known = bench.store.read()
        for cell in bench.plan(known):
            code = bench.code_for(cell.settings)
            bench.store.append(line_of(bench, cell), code.name, code.files)
    return bench.folder


def report(folder, capsys):
    capsys.readouterr()
    assert main(["bench", "report", str(suite_of(folder)), "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def test_the_table(filled, capsys):
    result = report(filled, capsys)
    assert (result["missing"], result["stale"]) == (0, 0)
    assert result["cells"] == 2 * (2 * 3 + 9) + 1 - 3  # base has no seeds; the grid has a rate more
    rows = {row["method"]: row for row in result["rows"]}
    assert list(rows) == list(METHODS)
    words = {name: rows[name]["verdict"] for name in ("base", "uniform", "joint", "singles")}
    assert words == {"base": "worse", "uniform": "worse", "joint": "better", "singles": "reference"}
    assert rows["uniform"]["tasks"] == dict.fromkeys(ANSWERS, "worse")
    # of three cells, or of one on all tasks
    assert (rows["singles"]["trainable_parameters"], rows["joint"]["trainable_parameters"]) == (30, 10)
    assert (rows["singles"]["flops"], rows["joint"]["flops"]) == (21, 7)
    text = Path(result["table"]).read_text()
    assert all(sentence in text for sentence in result["sentences"])
    for part in (
        "progressive forgets: test loss +0.2000 nats", "the vector alone changes the test loss of doubled by -0.2",
        "inferred finds the task of 50.0% of test rows (capitals 50.0%", "that of joint", "| own first stage |",
        "uniform's worst task is ", "uniform by task, against singles: worse on capitals, backwards, doubled.",
    ):  # fmt: skip
        assert part in text, part
    assert Path(result["picture"]).read_bytes().startswith(b"\x89PNG")
    assert report(filled, capsys) == result and Path(result["table"]).read_text() == text


def test_a_table_of_which_nothing_or_half_has_been_run(filled, capsys):
    store = filled / "store.jsonl"
    lines = store.read_text().splitlines(keepends=True)
    store.write_text("".join(line for line in lines if "/1" not in json.loads(line)["name"]))
    result = report(filled, capsys)
    assert {row["verdict"] for row in result["rows"]} == {"undecided", "reference"}
    assert result["missing"] == 3 + 9
    store.unlink()
    result = report(filled, capsys)
    # the base once on each task, for it has no new head; of the grid, a cell at the rate that is not chosen
    assert (result["cells"], result["missing"], result["picture"]) == (0, 3 + 2 * (3 + 9) + 1, None)


@pytest.mark.slow
def test_a_whole_run(empty, tmp_path, capsys):
    """In workers, stopped and gone on with; adapters that others begin with are kept, and lie outside of the store."""
    shutil.copytree(empty.parent, tmp_path / "copy")
    folder = tmp_path / "copy" / "bench"
    assert main(["bench", "run", str(suite_of(folder)), "--limit", "6"]) == 0
    assert main(["bench", "run", str(suite_of(folder))]) == 0
    capsys.readouterr()
    assert main(["bench", "run", str(suite_of(folder)), "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert (result["run"], result["left"], result["waiting"]) == (0, 0, [])
    assert len([path for path in (folder / "adapters").iterdir() if path.is_dir()]) == 6
    result = report(folder, capsys)
    assert (result["missing"], result["stale"]) == (0, 0) and all(row["flops"] is not None for row in result["rows"])
    for name in ("soft", "hard", "vector"):
        assert main(["bench", "check", str(suite_of(folder)), "--only", f"{name}/all/0"]) == 0
