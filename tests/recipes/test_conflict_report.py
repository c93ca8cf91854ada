"""`rankwise conflict`: what a run has measured, seen afterwards."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from rankwise.cli.main import main

NOISE: dict[str, Any] = {
    "highest": {"layers.0.q": [0.5, -0.1, 0.1], "layers.1.q": [0.8, 0.8, 0.3], "layers.0.v": [None, None, None]},
    "own": {"layers.0.q": [0.6, 0.7, 0.4], "layers.1.q": [0.9, 0.8, 0.2], "layers.0.v": [None, 0.1, 0.1]},
}
LINES: list[dict[str, Any]] = [
    {"stage": "1 shared", "step": 2, "tasks": ["a", "b", "c"], "modules": {
        "layers.0.q": [0.5, -0.2, 0.1], "layers.1.q": [0.9, 0.8, None], "layers.0.v": [None, None, None]}, **NOISE},
    {"stage": "1 shared", "step": 4, "tasks": ["a", "b", "c"], "modules": {
        "layers.0.q": [0.1, -0.4, 0.1], "layers.1.q": [0.7, 0.8, 0.5], "layers.0.v": [None, None, None]}, **NOISE},
]  # fmt: skip


@pytest.fixture
def run(tmp_path: Path) -> Path:
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "run.yaml").write_text("")
    (folder / "conflict.jsonl").write_text("".join(json.dumps(line) + "\n" for line in LINES) + '{"step": 6, "ta')
    return folder


def document(capsys: pytest.CaptureFixture[str], *argv: str) -> dict[str, Any]:
    assert main(["conflict", *argv, "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def test_layers_and_pairs(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = document(capsys, str(run), "--picture", str(tmp_path / "map.png"))
    assert set(found) == {"run", "tasks", "modules", "below", "isolate", "over_time", "picture"}
    assert found["modules"][0] == {"name": "layers.0.q", "cosine": pytest.approx(-0.3), "tasks": ["a", "c"],
                                   "own": pytest.approx([0.6, 0.4]), "clear": True}  # fmt: skip
    assert [(m["name"], m["tasks"]) for m in found["modules"][1:]] == [("layers.1.q", ["b", "c"])]
    assert found["isolate"] == ["layers.0.q"] and found["below"] == 0
    first, second = found["over_time"]
    assert first["step"] == 2 and first["pairs"] == pytest.approx({"a, b": 0.7, "a, c": 0.3, "b, c": 0.1})
    assert second["pairs"]["b, c"] == pytest.approx(0.3)
    assert (tmp_path / "map.png").read_bytes().startswith(b"\x89PNG")
    found = document(capsys, str(run), "--below", "0.6")
    assert found["isolate"] == ["layers.0.q"], "c agrees with itself less than with b in the other layer: noise"
    assert not found["modules"][1]["clear"] and found["modules"][1]["own"] == pytest.approx([0.8, 0.2])


def test_for_people(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["conflict", str(run)]) == 0
    out = capsys.readouterr().out
    assert "layers.0.q -0.300  own: a +0.600, c +0.400\n" in out and "step      4" in out
    assert "1 of 2 layers have a cosine clearly below 0" in out
    assert main(["conflict", str(run), "--below", "0.6"]) == 0
    assert "layers.1.q +0.500  own: b +0.800, c +0.200  not clear of noise\n" in capsys.readouterr().out


def test_refused(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    other = tmp_path / "other"
    other.mkdir()
    cases = [
        ([str(other)], "no run's folder"),
        ([str(run), "--below", "2"], "--below is a cosine"),
        ([str(run), "--picture", "map.gif"], "must end in"),
    ]
    for argv, words in cases:
        assert main(["conflict", *argv]) == 2
        assert words in capsys.readouterr().err
    (other / "run.yaml").write_text("")
    assert main(["conflict", str(other)]) == 2
    assert "tasks.conflict_every" in capsys.readouterr().err
    (other / "conflict.jsonl").write_text('{"step": 1}\n')
    assert main(["conflict", str(other)]) == 2
    assert "line 1" in capsys.readouterr().err
