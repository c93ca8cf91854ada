"""Files and folders are whole or not there, and what stood in the way is said by its own name."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from rankwise.errors import WriteError
from rankwise.files import obstacle, replacing, replacing_folder, write_text


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


def test_a_folder_without_the_right_to_write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path) != tmp_path)  # root may write everywhere
    assert obstacle(tmp_path / "a") == f"'{tmp_path}' can't be written to"
