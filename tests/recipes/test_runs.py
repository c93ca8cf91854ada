"""`rankwise runs`: whatever lies below a folder, each run has its row."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from filelock import FileLock

from rankwise.cli import runs as command
from rankwise.cli.main import main
from rankwise.errors import WorkError
from rankwise.recipes.finetune import train
from rankwise.recipes.runs import SORTS, STATUSES, is_held, list_runs
from rankwise.train.interrupt import Interrupted
from tests.recipes.runs import interrupting, metrics, settings

ROW = {
    "name", "path", "status", "step", "steps", "best_valid_loss", "final_loss", "when", "problem",
}  # fmt: skip


def failing(step: Any) -> None:
    if step.number == 5:
        raise WorkError("the loss is\nnan")


@pytest.fixture(scope="module")
def below(files: Path, straight: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Runs of every kind, and what is none."""
    root = tmp_path_factory.mktemp("all")
    shutil.copytree(straight, root / "group" / "finished")
    with pytest.raises(Interrupted):
        train(settings(files, root / "stopped"), on_step=interrupting(5), quiet=True)
    with pytest.raises(WorkError):
        train(settings(files, root / "failed"), on_step=failing, quiet=True)
    shutil.copytree(root / "stopped", root / "killed")
    status = json.loads((root / "killed" / "status.json").read_text())
    (root / "killed" / "status.json").write_text(json.dumps({**status, "status": "running"}))
    shutil.copytree(root / "killed", root / "older")
    (root / "older" / "status.json").unlink()  # of a version that wrote none
    for name, harm in {"cut": "summary.json", "odd": "metrics.jsonl", "binary": "status.json"}.items():
        shutil.copytree(root / "group" / "finished", root / "broken" / name)
        (root / "broken" / name / harm).write_bytes({"binary": b"\xff\xfe"}.get(name, b'{"step": 1\n'))
    (root / "plans").mkdir()
    (root / "plans" / "run.yaml").write_text("data: {train: x}\n")  # a run file alone is no run
    (root / ".hidden").mkdir()
    shutil.copytree(straight, root / ".hidden" / "run")
    return root


def rows_of(folder: Path, sort: str = "name") -> dict[str, dict[str, Any]]:
    return {row["name"]: row for row in list_runs(str(folder), sort)["runs"]}


def test_every_run_has_its_row(below: Path, straight: Path) -> None:
    rows = rows_of(below)
    assert {name: row["status"] for name, row in rows.items()} == {
        "broken/binary": "broken", "broken/cut": "broken", "broken/odd": "broken", "failed": "failed",
        "group/finished": "finished", "killed": "interrupted", "older": "interrupted", "stopped": "stopped",
    }  # fmt: skip
    assert all(set(row) == ROW for row in rows.values())
    summary = json.loads((straight / "summary.json").read_text())
    finished = rows["group/finished"]
    assert (finished["step"], finished["steps"]) == (12, 12) and finished["problem"] is None
    assert finished["best_valid_loss"] == summary["best_valid_loss"] and finished["final_loss"] == summary["final_loss"]
    assert (rows["stopped"]["step"], rows["stopped"]["steps"]) == (5, 12)
    assert (rows["older"]["step"], rows["older"]["steps"]) == (5, 12)
    assert rows["stopped"]["final_loss"] == metrics(below / "stopped")[-1]["loss"]
    assert rows["failed"]["problem"].startswith("the loss is nan")
    assert rows["broken/cut"]["problem"] == "summary.json is cut off or not JSON"
    assert rows["broken/odd"]["problem"] == "metrics.jsonl, line 1: not JSON"
    assert rows["broken/binary"]["problem"] == "status.json is cut off or not JSON"


def test_a_live_run_is_running_and_is_not_disturbed(below: Path) -> None:
    lock = FileLock(below / "stopped" / ".lock")
    with lock:
        assert rows_of(below)["stopped"]["status"] == "running" and is_held(below / "stopped" / ".lock")
    assert not is_held(below / "stopped" / ".lock") and not is_held(below / "no such lock")
    with open(below / "stopped" / ".lock", "rb"):  # open is not held
        assert rows_of(below)["stopped"]["status"] == "stopped"


def test_a_folder_that_can_not_be_read_has_a_row(below: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    scandir = os.scandir

    def closed(path: Any) -> Any:
        if Path(path).name == "group":
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", closed)
    rows = rows_of(below)
    assert rows["group"]["status"] == "broken" and rows["group"]["problem"] == "can't be read: Permission denied"
    assert len(rows) == 8


def test_order(below: Path) -> None:
    assert tuple(SORTS) == command.SORTS
    for sort in SORTS:
        assert len(rows_of(below, sort)) == 8
    best = [row["best_valid_loss"] for row in rows_of(below, "best").values()]
    known = [value for value in best if value is not None]
    assert known == sorted(known) and best[len(known) :] == [None] * (8 - len(known)) != []
    statuses = [STATUSES.index(row["status"]) for row in rows_of(below, "status").values()]
    assert statuses == sorted(statuses)
    os.utime(below / "killed" / "metrics.jsonl", (2e9, 2e9))
    assert next(iter(rows_of(below, "when"))) == "killed"


def test_the_command(below: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["runs", str(below), "--json"]) == 0
    assert len(json.loads(capsys.readouterr().out)["runs"]) == 8
    assert main(["runs", str(below / "stopped")]) == 0
    out = capsys.readouterr().out
    assert "stopped" in out and "5/12" in out and "1 run in" in out
    assert main(["runs", str(below / "failed")]) == 0
    assert "failed: the loss is nan" in capsys.readouterr().out
    assert main(["runs", str(tmp_path)]) == 0
    assert "no runs in" in capsys.readouterr().out
    assert main(["runs", str(tmp_path / "none")]) == 2
    assert "there is no folder" in capsys.readouterr().err
    assert main(["runs", str(below), "--sort", "luck"]) == 2


def test_it_needs_no_torch(below: Path) -> None:
    code = (
        "import sys; from rankwise.cli.main import main; code = main(sys.argv[1:]); "
        "sys.exit(code or 'torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code, "runs", str(below)], capture_output=True, text=True)
    assert done.returncode == 0 and "8 runs in" in done.stdout, done.stderr
