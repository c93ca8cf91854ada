"""A disk that is full at any write of a run: one line, nothing lost, and what is resumed ends in the straight run."""

from __future__ import annotations

import builtins
import errno
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from filelock import FileLock
from safetensors.torch import load_file

from rankwise import files as files_module
from rankwise.errors import RankwiseError, RequestError, WorkError, WriteError
from rankwise.recipes import finetune
from rankwise.recipes.finetune import train
from rankwise.train import log
from rankwise.train.state import checkpoint_folders
from tests.recipes.runs import adapter_bytes, metrics, settings, unmeasured

STEPS = 4


def run_of(files: Path, output: Path, **more: Any) -> dict[str, Any]:
    changes = {"steps": STEPS, "save_every": 2, "evaluate_every": 2, "samples": 1, "sample_tokens": 2}
    return settings(files, output, train={**changes, **more})


@pytest.fixture(scope="module")
def whole(files: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("whole") / "out"
    train(run_of(files, output), quiet=True)
    return output


class _FullAfterHalf:
    """A file that takes half of what is written to it."""

    def __init__(self, file: Any) -> None:
        self._file = file

    def __enter__(self) -> _FullAfterHalf:
        return self

    def __exit__(self, *error: object) -> None:
        self._file.close()

    def write(self, text: str) -> None:
        self._file.write(text[: len(text) // 2])
        raise OSError(errno.ENOSPC, "No space left on device")


def fill(monkeypatch: pytest.MonkeyPatch, name: str, times: int) -> None:
    """From the `times`-th write of the file or folder `name` on the disk is full, for that one."""
    seen: list[str] = []
    sync = files_module._sync

    def full_sync(path: Path) -> None:
        outermost = next((part for part in path.parts if part.startswith(".") and part.endswith(".tmp")), "")
        if outermost.startswith(f".{name}."):
            seen.append(name)
            if len(seen) >= times:
                raise OSError(errno.ENOSPC, "No space left on device")
        sync(path)

    def full_open(path: Path, mode: str, encoding: str) -> Any:
        file = builtins.open(path, mode, encoding=encoding)  # noqa: SIM115 (the caller closes it)
        if path.name != name:
            return file
        seen.append(name)
        return file if len(seen) < times else _FullAfterHalf(file)

    monkeypatch.setattr(files_module, "_sync", full_sync)
    monkeypatch.setattr(log, "open", full_open, raising=False)


WRITES = [
    ("run.yaml", 1), ("status.json", 1), ("provenance.json", 1), ("metrics.jsonl", 1), ("metrics.jsonl", 3),
    ("samples.jsonl", 1), ("step-2", 1), ("step-4", 1), ("adapter", 1), ("provenance.json", 2), ("status.json", 2),
    ("summary.json", 1),
]  # fmt: skip


@pytest.mark.parametrize(("name", "times"), WRITES)
def test_full_at_each_write(
    name: str, times: int, files: Path, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = tmp_path / "out"
    with monkeypatch.context() as patch, pytest.raises(WorkError) as error:
        fill(patch, name, times)
        train(run_of(files, output), quiet=True)
    message = error.value.message
    assert error.value.code == 1 and "No space left on device" in message and name in message and ".tmp" not in message
    saved = checkpoint_folders(output)
    if saved:
        assert f"the last checkpoint is '{saved[-1]}', go on with: rankwise train" in message
    assert not (output / "summary.json").exists()
    summary = train(run_of(files, output), resume=True, quiet=True)
    assert summary["resumed_from"] == (int(saved[-1].name.removeprefix("step-")) if saved else None)
    assert adapter_bytes(output) == adapter_bytes(whole)
    assert unmeasured(metrics(output)) == unmeasured(metrics(whole))
    assert (output / "samples.jsonl").read_text() == (whole / "samples.jsonl").read_text()
    assert {path.name for path in output.iterdir()} == {path.name for path in whole.iterdir()}


@pytest.mark.parametrize(
    ("name", "times", "step"), [("metrics.jsonl", 3, 3), ("adapter", 1, 4), ("summary.json", 1, 4)]
)
def test_without_checkpoints_the_adapter_is_saved_elsewhere(
    name: str, times: int, step: int, files: Path, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output, elsewhere = tmp_path / "out", tmp_path / "elsewhere"
    elsewhere.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(elsewhere))
    with monkeypatch.context() as patch, pytest.raises(WorkError) as error:
        fill(patch, name, times)
        if name == "adapter":  # full in the output folder only
            sync = files_module._sync
            whole_sync = lambda path: sync(path) if output in path.parents else None  # noqa: E731
            patch.setattr(files_module, "_sync", whole_sync)
        train(run_of(files, output, save_every=None), quiet=True)
    if name == "summary.json":
        assert f"the adapter is whole in '{output}/adapter'" in error.value.message
        assert adapter_bytes(output) == adapter_bytes(whole)
        return
    (rescued,) = elsewhere.glob("rankwise-*/adapter")
    assert f"the adapter as it was after step {step} is in '{rescued}'" in error.value.message
    weights = load_file(rescued / "adapter_model.safetensors")
    assert weights.keys() == load_file(whole / "adapter" / "adapter_model.safetensors").keys()
    if step == STEPS:
        assert (rescued / "adapter_model.safetensors").read_bytes() == adapter_bytes(whole)


def test_nowhere_to_write_is_said(files: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(model: Any, folder: Path) -> None:
        raise WriteError(str(folder), "No space left on device")

    with monkeypatch.context() as patch, pytest.raises(WorkError, match=r"nothing had been saved, go on with"):
        fill(patch, "metrics.jsonl", 2)
        patch.setattr(finetune, "save_adapter", full)
        train(run_of(files, tmp_path / "out", save_every=None), quiet=True)


def test_a_folder_that_a_live_run_holds_is_left_alone(files: Path, whole: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in whole.rglob("*") if path.name != ".lock"}
    with FileLock(whole / ".lock"), pytest.raises(RequestError, match=r"in use by a run that is still going; wait"):
        train(run_of(files, whole), resume=True, quiet=True)
    assert {path: path.stat().st_mtime_ns for path in whole.rglob("*") if path.name != ".lock"} == before


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Any]:
    """Makes a disk of so many KiB, or changes its size or its rights; needs the right to mount."""
    place = tmp_path / "disk"
    place.mkdir()

    def mount(options: str) -> Path:
        done = subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(place)], capture_output=True)
        if done.returncode:
            pytest.skip(f"can't mount a tmpfs here: {done.stderr.decode().strip()}")
        return place

    yield mount
    while os.path.ismount(place):
        subprocess.run(["umount", str(place)], check=True)


@pytest.mark.slow
def test_disks_of_every_size(files: Path, whole: Path, small_disk: Any) -> None:
    """Real ones, from too small for anything to just too small for the last file."""
    needed = 4096 * sum(-(-path.stat().st_size // 4096) for path in whole.rglob("*") if path.is_file()) // 1024
    failed_at = []
    for size in range(8, needed + 64, 12):
        place = small_disk(f"size={size}k")
        try:
            train(run_of(files, place / "out"), quiet=True)
            failed_at.append("nothing")
        except RankwiseError as error:
            assert "No space left on device" in error.message and "\n" not in error.message
            failed_at.append(error.message.split("'")[1].removeprefix(f"{place}/"))
        small_disk("remount,size=8m")
        train(run_of(files, place / "out"), resume=(place / "out").exists(), quiet=True)
        assert adapter_bytes(place / "out") == adapter_bytes(whole), f"a disk of {size} KiB"
        assert unmeasured(metrics(place / "out")) == unmeasured(metrics(whole))
        subprocess.run(["umount", str(place)], check=True)
    print(f"\nfull at: {failed_at}")
    assert len(set(failed_at)) > 4


def test_a_disk_that_is_read_only(files: Path, whole: Path, small_disk: Any) -> None:
    place = small_disk("size=8m")
    train(run_of(files, place / "out", steps=2), quiet=True)
    small_disk("remount,ro")
    with pytest.raises(RequestError, match=r"can't be written: Read-only file system; choose another"):
        train(run_of(files, place / "out", steps=2), resume=True, quiet=True)
    with pytest.raises(RequestError, match=r"can't be made: .*; choose another"):
        train(run_of(files, place / "new"), quiet=True)
