"""Processes that encode: whatever their number and however they start, the result is the same, and none is left."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from rankwise.data import workers
from rankwise.data.config import WHOLE, DataConfig
from rankwise.data.rows import read_rows
from rankwise.data.store import Store, StoreWriter
from rankwise.data.workers import Encoding, encoded_chunks
from rankwise.errors import RequestError, WorkError
from tests import tiny
from tests.data.builders import messages, write_rows

ROWS = [messages(f"Say: number {n}", "x" * (n % 90), f"And {n}?", "y" * n, system="Be.") for n in range(1, 40)]
STARTS = {"forks": True, "fresh interpreters": False}


@pytest.fixture(params=STARTS)
def how(request, monkeypatch) -> str:
    monkeypatch.setattr(workers, "CHUNK_ROWS", 7)
    monkeypatch.setattr(workers, "FORKS", STARTS[request.param])
    return request.param


def encoded(tmp_path: Path, count: int, **settings) -> tuple:
    path = write_rows(tmp_path / "rows.jsonl", ROWS)
    encoding = Encoding(tiny.tiny_tokenizer(), DataConfig(train=path, max_length=100, **settings), WHOLE)
    folder = tmp_path / f"store-{count}"
    folder.mkdir()
    rest = []
    with StoreWriter(folder) as writer:
        for chunk in encoded_chunks(read_rows(path).rows, encoding, count):
            writer.add(chunk.records)
            rest.append(chunk.rest)
    store = Store(folder, list(writer.files), {})
    return [store.example(row) for row in range(len(store))], [file.read_bytes() for file in folder.iterdir()], rest


def test_any_number_of_processes_gives_the_same(tmp_path, how) -> None:
    counts = (1, 2, 3) if how == "forks" else (1, 2)  # an interpreter takes seconds to start
    alone, *others = (encoded(tmp_path, count) for count in counts)
    assert all(other == alone for other in others) and len(alone[0]) == len(ROWS) and len(alone[2]) == 6


def test_what_a_worker_refuses_is_what_this_process_refuses(tmp_path) -> None:
    template = tmp_path / "t.jinja"
    template.write_text("{{ messages[0]['content'] }}")
    said = []
    for count in (1, 2):
        with pytest.raises(RequestError) as error:
            encoded(tmp_path, count, chat_template=str(template))
        said.append(str(error.value))
    assert said[0] == said[1]


def test_a_dead_worker_is_an_error(tmp_path, how, monkeypatch) -> None:
    monkeypatch.setattr(workers, "_serve", lambda *_: os._exit(1))
    monkeypatch.setattr(workers.sys, "executable", "/bin/false")
    with pytest.raises(WorkError, match=r"fewer data.workers"):
        encoded(tmp_path, 2)


def test_no_setting_of_this_process_is_changed(tmp_path, monkeypatch) -> None:
    for value in (None, "true"):
        if value is None:
            monkeypatch.delenv("TOKENIZERS_PARALLELISM", raising=False)
        else:
            monkeypatch.setenv("TOKENIZERS_PARALLELISM", value)
        encoded(tmp_path, 2)
        assert os.environ.get("TOKENIZERS_PARALLELISM") == value
        (tmp_path / "store-2").rename(tmp_path / f"done-{value}")


ENDLESS = """
import itertools, os, sys, threading
from rankwise.data import workers
from rankwise.data.config import WHOLE, DataConfig
from rankwise.data.rows import read_rows
from tests import tiny
threading.Thread(target=threading.Event().wait, daemon=True).start()
rows = read_rows(sys.argv[1]).rows
encoding = workers.Encoding(tiny.tiny_tokenizer(), DataConfig(train=sys.argv[1]), WHOLE)
for number, chunk in enumerate(workers.encoded_chunks(itertools.cycle(rows), encoding, 2)):
    if number == 2:
        children = open(f"/proc/self/task/{os.getpid()}/children").read()
        print(children, flush=True)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="children are listed in /proc")
@pytest.mark.parametrize(
    "how_ended", [signal.SIGKILL, *(pytest.param(s, marks=pytest.mark.slow) for s in (signal.SIGINT, signal.SIGTERM))]
)
def test_no_process_is_left_behind(tmp_path, how_ended) -> None:
    path = write_rows(tmp_path / "rows.jsonl", ROWS)
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    process = subprocess.Popen(
        [sys.executable, "-c", ENDLESS, path], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True,
        env=environment,
    )  # fmt: skip
    assert process.stdout is not None
    children = process.stdout.readline().split()
    assert len(children) == 2
    process.send_signal(how_ended)
    process.wait(timeout=60)
    process.stdout.close()
    end = time.monotonic() + 60
    while any(_runs(int(child)) for child in children):
        assert time.monotonic() < end, children
        time.sleep(0.05)


def _runs(process: int) -> bool:
    try:
        return Path(f"/proc/{process}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False
