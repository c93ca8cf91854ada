from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch

from rankwise.errors import WorkError
from rankwise.train.log import JsonLines, ProgressBar, clock, peak_memory_bytes


def test_lines_are_there_as_soon_as_they_are_written(tmp_path: Path) -> None:
    lines = JsonLines(tmp_path / "metrics.jsonl")
    assert lines.read() == []
    lines.append({"step": 1, "loss": 0.5})
    lines.append({"step": 2, "text": "ä\n"})
    assert (tmp_path / "metrics.jsonl").read_text().count("\n") == 2
    assert lines.read() == [{"step": 1, "loss": 0.5}, {"step": 2, "text": "ä\n"}]
    with pytest.raises(ValueError):
        lines.append({"step": 3, "loss": float("nan")})


def test_lines_of_a_lost_part_are_dropped(tmp_path: Path) -> None:
    lines = JsonLines(tmp_path / "metrics.jsonl")
    for step in (1, 2, 3, 4):
        lines.append({"step": step})
    with open(lines.path, "a") as file:
        file.write('{"step": 5, "lo')  # a crash in the middle of a line
    lines.drop_after(2)
    lines.append({"step": 3})
    assert [json.loads(line)["step"] for line in lines.path.read_text().splitlines()] == [1, 2, 3]


def test_a_full_disk_cuts_inside_of_a_character(tmp_path: Path) -> None:
    lines = JsonLines(tmp_path / "samples.jsonl")
    lines.append({"step": 1, "answer": "ä"})
    with open(lines.path, "ab") as file:
        file.write('{"step": 2, "answer": "ä'.encode()[:-1])
    assert lines.read() == [{"step": 1, "answer": "ä"}]
    lines.drop_after(1)
    assert lines.path.read_text(encoding="utf-8") == '{"step": 1, "answer": "ä"}\n'


def test_a_damaged_line_is_named(tmp_path: Path) -> None:
    lines = JsonLines(tmp_path / "metrics.jsonl")
    lines.path.write_bytes(b'{"step": 1}\n\0\0\0\0\n')
    with pytest.raises(WorkError, match=r"metrics.jsonl', line 2: not JSON; remove that line"):
        lines.drop_after(1)


def test_a_line_that_cannot_be_written_is_said(tmp_path: Path) -> None:
    with pytest.raises(WorkError, match=r"cannot write .*gone/metrics\.jsonl"):
        JsonLines(tmp_path / "gone" / "metrics.jsonl").append({"step": 1})


def test_peak_memory_is_in_bytes() -> None:
    before = peak_memory_bytes(torch.device("cpu"))
    block = torch.ones(200 * 2**20, dtype=torch.uint8)
    after = peak_memory_bytes(torch.device("cpu"))
    assert before > 50 * 2**20
    assert after >= before
    assert after > block.numel()


def test_plain_lines_where_there_is_no_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    with ProgressBar(num_steps=30, done=10) as bar:
        for step in range(11, 31):
            bar.update(step, 1.25, 1234.0, 2**30)
        bar.say("a line [with brackets]")
    out, err = capsys.readouterr()
    assert out == ""
    lines = err.splitlines()
    assert lines[0].startswith("step 11/30  loss 1.2500  1,234 tokens/s  1.00 GiB")
    assert lines[1].startswith("step 30/30")
    assert lines[2] == "a line [with brackets]"


def test_nothing_where_nothing_is_wanted(capsys: pytest.CaptureFixture[str]) -> None:
    with ProgressBar(num_steps=3, done=0, shown=False) as bar:
        bar.update(1, 1.0, 1.0, 1)
        bar.say("hidden")
    assert capsys.readouterr() == ("", "")


def test_a_bar_on_a_terminal(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "120")
    with ProgressBar(num_steps=3, done=0) as bar:
        bar.update(2, 1.5, 99.0, 2**29)
        bar.say("between")
    out, err = capsys.readouterr()
    assert out == ""
    assert "2/3" in err and "loss 1.5000" in err and "0.50 GiB" in err and "between" in err


@pytest.mark.parametrize(("seconds", "text"), [(0, "0:00"), (59.2, "1:00"), (3723, "1:02:03")])
def test_clock(seconds: float, text: str) -> None:
    assert clock(seconds) == text
