from __future__ import annotations

import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from rankwise.data.cache import cache_folder, entry
from rankwise.data.config import DataConfig
from rankwise.data.loaded import Loaded
from rankwise.data.loader import load_split
from rankwise.data.rows import Problem
from rankwise.errors import RequestError
from tests import tiny
from tests.data.builders import FIXTURES, messages, tokenizer_of, write_rows

ROWS = [messages(f"Say: number {n}", "x" * (n % 90), f"And {n}?", "y" * n, system="Be.") for n in range(1, 60)]
BAD = ['{"messages": 3}', "{", "", '{"messages": [{"role": "user", "content": "a"}]}']


@pytest.fixture
def rows(tmp_path) -> str:
    """Rows with all that can be said of them: blank lines, cut ones, emptied ones, special tokens, bad ones."""
    path = Path(write_rows(tmp_path / "rows.jsonl", [*ROWS, messages("<|im_end|> is a token", "yes")]))
    path.write_text(path.read_text() + "\n".join(BAD) + "\n\n")
    return str(path)


def load(
    path: str, cache: Path | str = "off", said: list[str] | None = None, **settings
) -> tuple[Loaded, list[Problem]]:
    config = DataConfig(train=path, cache=str(cache), **{"max_length": 100, **settings})
    lines: list[str] = [] if said is None else said
    return load_split(path, tiny.tiny_tokenizer(), config, say=lines.append)


def everything(found: tuple[Loaded, list[Problem]]) -> tuple:
    loaded, problems = found
    rest = [
        getattr(loaded, field.name) for field in dataclasses.fields(loaded) if field.name not in ("examples", "how")
    ]
    columns = [loaded.examples.column(name).tolist() for name in ("key", "group", "tokens", "trained", "highest")]
    return list(loaded.examples), rest, columns, problems


def test_a_cached_load_is_a_fresh_one(rows, tmp_path) -> None:
    fresh = everything(load(rows))
    cache = tmp_path / "cache"
    first, second = load(rows, cache), load(rows, cache)
    assert everything(first) == everything(second) == fresh
    assert "encoded in" in first[0].how and "read from the cache" in second[0].how
    assert len(second[1]) == 3 and len(second[0].notes) == 1 and len(second[0].warnings) == 2


@pytest.mark.parametrize("chunk", [1, 13])
def test_chunks_do_not_matter(rows, monkeypatch, chunk: int) -> None:
    whole = everything(load(rows))
    monkeypatch.setattr("rankwise.data.workers.CHUNK_ROWS", chunk)
    monkeypatch.setattr("rankwise.data.workers.CHUNK_CHARACTERS", 40 * chunk)
    assert everything(load(rows)) == whole


def entries(cache: Path) -> list[Path]:
    return sorted(path for path in cache.iterdir() if path.is_dir())


def test_what_decides_the_tokens_decides_the_entry(rows, tmp_path) -> None:
    cache = tmp_path / "cache"
    load(rows, cache)
    for free in ({"packing": False}, {"workers": 2}, {"valid_split": 0}, {"test": "other.jsonl"}):
        load(rows, cache, **free)
    assert len(entries(cache)) == 1
    for count, settings in enumerate(({"max_length": 90}, {"chat_template": "plain"}, {"format": "messages"}), start=2):
        load(rows, cache, **settings)
        assert len(entries(cache)) == count, settings
    template = tmp_path / "t.jinja"
    template.write_text(tiny.CHATML)
    load(rows, cache, chat_template=str(template))
    template.write_text(tiny.CHATML.replace("if add", "if  add"))
    load(rows, cache, chat_template=str(template))
    assert len(entries(cache)) == 6
    other = tokenizer_of(tiny.CHATML, ["<|more|>"])
    load_split(rows, other, DataConfig(train=rows, cache=str(cache), max_length=100))
    assert len(entries(cache)) == 7
    Path(rows).write_text(Path(rows).read_text() + json.dumps(ROWS[0]) + "\n")
    assert load(rows, cache)[0].num_rows == 61
    assert len(entries(cache)) == 8


def test_a_template_with_a_date_is_cached_for_the_day(rows, tmp_path, monkeypatch) -> None:
    template = tmp_path / "t.jinja"
    template.write_text("{% set today = strftime_now('%Y') %}" + tiny.CHATML)
    load(rows, tmp_path / "cache", chat_template=str(template))
    monkeypatch.setattr("rankwise.data.fingerprint.date", type("Tomorrow", (), {"today": staticmethod(_tomorrow)}))
    load(rows, tmp_path / "cache", chat_template=str(template))
    assert len(entries(tmp_path / "cache")) == 2


def _tomorrow():
    import datetime

    return datetime.date.today() + datetime.timedelta(days=1)


DAMAGE = {
    "a byte": lambda f: f.write_bytes(f.read_bytes()[:-5] + b"#" + f.read_bytes()[-4:]),
    "cut": lambda f: f.write_bytes(f.read_bytes()[:-5]),
    "empty": lambda f: f.write_bytes(b""),
    "gone": lambda f: f.unlink(),
}


@pytest.mark.parametrize("name", ["examples.bin", "index.bin", "record.json"])
@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_entry_is_made_anew_and_that_is_said(rows, tmp_path, name: str, damage: str) -> None:
    fresh = everything(load(rows, tmp_path / "cache"))
    DAMAGE[damage](entries(tmp_path / "cache")[0] / name)
    said: list[str] = []
    found = load(rows, tmp_path / "cache", said)
    assert everything(found) == fresh and "encoded in" in found[0].how
    assert len(said) == 1 and "is damaged" in said[0] and "encoding the rows again" in said[0]
    assert load(rows, tmp_path / "cache", said)[0].how.startswith("read from") and len(said) == 1


WRITING = """
import sys, time
from pathlib import Path
from rankwise.data.cache import entry
def build(folder):
    (folder / "examples.bin").write_bytes(b"half")
    print("half", flush=True)
    time.sleep(float(sys.argv[2]))
    return {"by": "other"}
with entry(Path(sys.argv[1]), {"a": 1}, build, print) as found:
    print(found.was_there, flush=True)
"""


def writing(cache: Path, seconds: float) -> subprocess.Popen[str]:
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    process = subprocess.Popen(
        [sys.executable, "-c", WRITING, str(cache), str(seconds)], stdout=subprocess.PIPE, text=True, env=environment
    )
    assert process.stdout is not None and process.stdout.readline() == "half\n"
    return process


def mine(folder: Path) -> dict:
    (folder / "examples.bin").write_bytes(b"whole")
    return {"by": "me"}


def test_a_process_killed_while_writing_leaves_nothing(tmp_path) -> None:
    process = writing(tmp_path, 60)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert len(entries(tmp_path)) == 1  # its temporary folder
    with entry(tmp_path, {"a": 1}, mine, print) as found:
        assert not found.was_there and found.content == {"by": "me"}
        assert (found.folder / "examples.bin").read_bytes() == b"whole"
    assert entries(tmp_path) == [found.folder]


def test_two_processes_write_once(tmp_path) -> None:
    process = writing(tmp_path, 1)
    said: list[str] = []
    with entry(tmp_path, {"a": 1}, mine, said.append) as found:
        assert found.was_there and found.content == {"by": "other"}
    assert said == ["waiting for another process, which encodes the same data"]
    assert process.wait() == 0


def test_a_build_that_fails_leaves_nothing(tmp_path) -> None:
    def fails(folder: Path) -> dict:
        (folder / "examples.bin").write_bytes(b"half")
        raise RequestError("no")

    with pytest.raises(RequestError, match="no"), entry(tmp_path, {"a": 1}, fails, print):
        pass
    assert entries(tmp_path) == []


def test_what_was_not_used_for_longest_goes_first(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr("rankwise.data.cache.MOST_BYTES", 2500)
    folders = {}
    for number in range(3):
        with entry(tmp_path, {"n": number}, mine, print) as found:
            folders[number] = found.folder
            os.utime(found.folder / "record.json", (number, number))
    left = tmp_path / ".old.tmp"
    left.mkdir()
    os.utime(left, (0, 0))
    monkeypatch.setattr("rankwise.data.cache.MOST_BYTES", 1000)
    with entry(tmp_path, {"n": 0}, mine, print):  # used again: now the newest
        pass
    with entry(tmp_path, {"n": 3}, mine, print) as found:
        pass
    assert found.folder in entries(tmp_path) and folders[1] not in entries(tmp_path) and not left.exists()


def test_where_the_cache_is(monkeypatch, tmp_path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.delenv("RANKWISE_CACHE", raising=False)
    assert cache_folder("auto", 2**20) == tmp_path / "rankwise" / "data"
    assert cache_folder("auto", 2**20 - 1) is None and cache_folder("off", 2**40) is None
    assert cache_folder(str(tmp_path / "mine"), 1) == tmp_path / "mine"
    monkeypatch.setenv("RANKWISE_CACHE", str(tmp_path / "all"))
    assert cache_folder("auto", 2**20) == tmp_path / "all" / "data"


def test_a_cache_that_can_not_be_made_is_refused(rows, tmp_path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(RequestError, match=r"data cache can't be made.*data.cache"):
        load(rows, tmp_path / "file" / "cache")


def test_formats_load_the_same_from_the_cache(tmp_path) -> None:
    for name in ("messages", "prompt_completion", "text", "alpaca", "sharegpt"):
        path = FIXTURES / f"{name}.jsonl"
        first = everything(load(str(path), tmp_path, max_length=512))
        assert (
            everything(load(str(path), tmp_path, max_length=512))
            == first
            == everything(load(str(path), max_length=512))
        )


def test_reading_back_is_quick(tmp_path) -> None:
    """Not a measurement: that nothing is encoded again shows in that the encoder is not called."""
    path = write_rows(tmp_path / "rows.jsonl", ROWS)
    load(path, tmp_path / "cache")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("rankwise.data.workers.encode_chunk", None)
        began = time.process_time()
        assert len(load(path, tmp_path / "cache")[0].examples) == 59
        assert time.process_time() - began < 60
