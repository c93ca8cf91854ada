"""How benchmarks measure: paired rounds that a second start goes on with, and ratios of them."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


@pytest.fixture
def measure(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import measure

    return measure


def test_a_stopped_run_goes_on_where_it_was(measure: ModuleType, tmp_path: Path) -> None:
    out, calls = str(tmp_path / "x.jsonl"), []

    def variant(number: int) -> int:
        if number == 2 and len(calls) < 5:
            raise KeyboardInterrupt
        calls.append(number)
        return 10 + number

    settings = {"benchmark": "x", "rounds": 4}
    with pytest.raises(KeyboardInterrupt):
        measure.interleaved({"a": variant}, 4, 1, settings, out)
    assert calls == [-1, 0, 1]
    calls.extend([9, 9])
    counts: dict[str, list[int]] = {}
    times = measure.interleaved({"a": variant}, 4, 1, settings, out)
    assert calls[5:] == [-1, 2, 3] and len(times["a"]) == 4
    other = measure.interleaved({"a": variant}, 4, 0, {**settings, "threads": 2}, out, counts)
    assert len(other["a"]) == 4 and counts == {"a": [10, 11, 12, 13]}
    measure.report({"benchmark": "x"}, [measure.ratio_row("a / a", times, "a", "a")], out)
    assert [path.name for path in tmp_path.iterdir()] == ["x.jsonl"]
    assert json.loads(Path(out).read_text())["rows"][0]["median"] == 1.0


def test_ratios_are_paired_and_per_token(measure: ModuleType) -> None:
    times = {"a": [(2.0, 4.0), (20.0, 4.0), (3.0, 4.0)], "b": [(1.0, 2.0), (10.0, 2.0), (1.0, 2.0)]}
    assert measure.ratio(times, "a", "b")["median"] == 2.0
    assert measure.ratio(times, "a", "b", clock=1)["median"] == 2.0
    assert measure.per_token({"a": [(6.0, 3.0)]}, {"a": [3]}) == {"a": [(2.0, 1.0)]}


def ratios(value: object) -> set[tuple[str, ...]]:
    """Every median with its interval in a result, as a page prints it."""
    if isinstance(value, list):
        return set().union(*map(ratios, value))
    if not isinstance(value, dict):
        return set()
    found = set().union(*map(ratios, value.values()))
    names = ("median", "low", "high")
    return found | ({tuple(f"{value[name]:.2f}" for name in names)} if value.keys() >= set(names) else set())


def test_every_interval_of_the_page_is_in_the_results() -> None:
    results = (BENCHMARKS / "results").glob("*.jsonl")
    known = set().union(*(ratios(json.loads(line)) for path in results for line in path.read_text().splitlines()))
    page = (BENCHMARKS.parent / "docs" / "performance.md").read_text(encoding="utf-8")
    shown = re.findall(r"(\d+\.\d\d) \[(\d+\.\d\d),\s(\d+\.\d\d)\]", page)
    assert len(shown) > 50 and [" ".join(figures) for figures in shown if figures not in known] == []


@pytest.mark.slow
@pytest.mark.parametrize(
    "command",
    [
        ["step.py", "--size", "tiny", "--tokens", "32", "--rounds", "2"],
        ["load.py", "--size", "tiny", "--rounds", "2"],
        ["inference.py", "--size", "tiny", "--rounds", "2"],
        ["memory.py", "--size", "tiny", "--repeats", "2"],
        ["real_lengths.py", "--size", "tiny", "--rounds", "2"],
        ["classifier.py", "--rounds", "2"],
        ["ranks.py", "--size", "tiny", "--tokens", "16", "--rounds", "2"],
    ],
    ids=lambda command: command[0],
)
def test_every_script_runs(command: list[str], tmp_path: Path) -> None:
    pytest.importorskip("trl", reason="needs pip install 'rankwise[bench]'")
    out = tmp_path / "out.jsonl"
    subprocess.run([sys.executable, str(BENCHMARKS / command[0]), *command[1:], "--out", str(out)], check=True)
    assert json.loads(out.read_text())["rows"]


@pytest.mark.slow
def test_fifty_steps_learn_what_the_plain_path_learns(tmp_path: Path) -> None:
    out = tmp_path / "out.jsonl"
    command = [sys.executable, str(BENCHMARKS / "loss_curves.py"), "--size", "tiny", "--out", str(out)]
    subprocess.run(command, check=True)
    found = json.loads(out.read_text())
    assert found["rows"][0]["largest_difference"] < 1e-4
    assert found["curves"]["ours"][-1] < found["curves"]["ours"][0] - 0.3


@pytest.mark.slow
def test_the_stream_of_tasks_is_served(tmp_path: Path) -> None:
    out = tmp_path / "out.jsonl"
    small = ["--steps", "2", "--train-rows", "8", "--requests", "40"]
    subprocess.run([sys.executable, str(BENCHMARKS / "task_stream.py"), *small, "--out", str(out)], check=True)
    rows = {row["what"]: row for row in json.loads(out.read_text())["rows"]}
    assert 0 <= rows["inferred: routed right"]["value"] <= 1 and rows["given: loss"]["n"] == 40
    assert rows["inferred / given: cpu time"]["value"] > 1, "reading twice costs nothing?"
