"""Files and folders are whole or not there, and what stood in the way is said by its own name."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from rankwise import files
from rankwise.errors import RequestError, WriteError
from rankwise.files import check_new_folder, file_obstacle, obstacle, replacing, replacing_folder, write_text


def test_a_failure_inside_names_the_folder_that_was_asked_for(tmp_path: Path) -> None:
    write_text(tmp_path / "there" / "old", "old")
    with pytest.raises(WriteError) as error, replacing_folder(tmp_path / "there") as temporary:
        (temporary / "file").touch()
        write_text(temporary / "file" / "inside", "x")
    assert error.value.message.startswith(f"cannot write '{tmp_path}/there': ")
    assert error.value.reason in ("File exists", "Not a directory")
    assert [path.name for path in tmp_path.rglob("*")] == ["there", "old"], "nothing half-written, the old one whole"


def test_a_file_is_replaced_whole_or_left(tmp_path: Path) -> None:
    path = tmp_path / "file"
    write_text(path, "old")
    with pytest.raises(RuntimeError), replacing(path) as temporary:
        temporary.write_text("half")
        raise RuntimeError
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]


def test_obstacles(tmp_path: Path) -> None:
    assert obstacle(tmp_path / "a" / "b") is None
    (tmp_path / "file").touch()
    assert obstacle(tmp_path / "file" / "a" / "b") == f"'{tmp_path}/file' is not a folder"
    (tmp_path / "gone").symlink_to(tmp_path / "nowhere")
    assert obstacle(tmp_path / "gone" / "a") == f"'{tmp_path}/gone' is not a folder"


def test_a_file_may_be_replaced_and_a_folder_not(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    assert file_obstacle(tmp_path / "file") is None and file_obstacle(tmp_path / "a" / "b") is None
    assert file_obstacle(tmp_path) == f"'{tmp_path}' is a folder"
    assert file_obstacle(tmp_path / "file" / "b") == f"'{tmp_path}/file' is not a folder"


@pytest.mark.parametrize(("name", "words"), [("x" * 300, "too long"), ("a\0b", "characters"), ("\ud800", "characters")])
def test_names_that_no_file_has(tmp_path: Path, name: str, words: str) -> None:
    for path in (tmp_path / name, tmp_path / name / "a"):
        assert words in str(obstacle(path))
        with pytest.raises(RequestError, match=f"can't be made: .*{words}.*; choose another"):
            check_new_folder(path)


def test_a_folder_without_the_right_to_write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path) != tmp_path)  # root may write everywhere
    assert obstacle(tmp_path / "a") == f"'{tmp_path}' can't be written to"


def test_what_killed_processes_left_is_swept_and_nothing_else(tmp_path):
    (tmp_path / ".a.json.x1.tmp").write_text("half")
    (tmp_path / ".step-3.x2.old" / "folder").mkdir(parents=True)
    (tmp_path / ".lock").touch()
    (tmp_path / "b.tmp").write_text("whole")
    files.sweep(tmp_path)
    files.sweep(tmp_path / "missing")
    assert sorted(path.name for path in tmp_path.iterdir()) == [".lock", "b.tmp"]


def test_a_folder_is_copied_whole_and_other_files_stay(tmp_path, monkeypatch):
    (tmp_path / "from").mkdir()
    for name in ("a", "b"):
        (tmp_path / "from" / name).write_text(name)
    files.copy_into(tmp_path / "from", tmp_path / "new")
    assert {path.name: path.read_text() for path in (tmp_path / "new").iterdir()} == {"a": "a", "b": "b"}
    (tmp_path / "old").mkdir()
    for name in ("a", "mine"):
        (tmp_path / "old" / name).write_text("old")
    copied = []

    def full(source, target):
        if copied:
            raise OSError(28, "No space left on device")
        copied.append(source)

    with monkeypatch.context() as patch:
        patch.setattr(files.shutil, "copyfile", full)
        with pytest.raises(WriteError, match="No space left"):
            files.copy_into(tmp_path / "from", tmp_path / "old")
    assert {path.name: path.read_text() for path in (tmp_path / "old").iterdir()} == {"a": "old", "mine": "old"}
    files.copy_into(tmp_path / "from", tmp_path / "old")
    assert {path.name: path.read_text() for path in (tmp_path / "old").iterdir()} == {"a": "a", "b": "b", "mine": "old"}
