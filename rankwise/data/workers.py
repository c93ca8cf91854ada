"""Chunks of rows, encoded by several processes and given back in order: what comes out does not depend on how many.

Processes rather than the tokenizer's own threads: more than half of the time is Python (templates, labels), which
threads do not share. On two cores that gains little, and nothing below some 100,000 rows (docs/log.md). Each is a fresh
interpreter that talks over a socket with a thread of this one; no code of the caller's runs in it, so a script needs no
`if __name__ == "__main__"`, and CUDA and torch's threads here are left alone, as they would not be by a fork.
"""

from __future__ import annotations

import contextlib
import gc
import os
import queue
import signal
import socket
import subprocess
import sys
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from rankwise import distributed
from rankwise.data.config import AUTO, DataConfig
from rankwise.data.encoder import Chunk, Encoder
from rankwise.data.head_encoder import HEAD_LAYOUTS, HeadEncoder
from rankwise.data.row_keys import row_group, row_key
from rankwise.data.rows import Row
from rankwise.data.store import Records, records
from rankwise.errors import RequestError, WorkError
from rankwise.models.labels import Labels

CHUNK_ROWS = 1000
CHUNK_CHARACTERS = 2**22
"""Rows encoded at once, at most so many and about so much text: bounds what a chunk takes, whatever the rows are."""

WORKER_BYTES = 16 * 2**20
"""`auto` starts one process for so many bytes of data: starting one takes about as long as encoding half of that."""
MOST_WORKERS = 16
"""`auto` stops there: this process reads the rows for all of them."""


@dataclass(frozen=True)
class Encoding:
    """What decides how rows are encoded: the arguments of `Encoder`, or of `HeadEncoder`."""

    tokenizer: PreTrainedTokenizerBase
    config: DataConfig
    layout: str
    labels: Labels | None = None

    def encoder(self) -> Encoder | HeadEncoder:
        """An encoder of that kind."""
        if self.layout in HEAD_LAYOUTS:
            return HeadEncoder(self.tokenizer, self.config, self.layout, self.labels)
        return Encoder(self.tokenizer, self.config, self.layout)


@dataclass(frozen=True)
class EncodedChunk:
    """A chunk as its process gives it back: records to be written, and the rest of `Chunk`."""

    records: Records
    rest: Chunk
    """Without examples."""


def encode_chunk(encoder: Encoder | HeadEncoder, rows: Sequence[Row]) -> EncodedChunk:
    """Encodes rows to records. Raises: RequestError for a template that can't be used."""
    with _uncollected():
        chunk = encoder.encode(rows)
    by_place = {(row.file, row.line): row for row in rows}
    kept = [by_place[example.file, example.line] for example in chunk.examples]
    made = records(chunk.examples, [row_key(row) for row in kept], [row_group(row) for row in kept])
    chunk.examples = []
    return EncodedChunk(made, chunk)


@contextlib.contextmanager
def _uncollected() -> Iterator[None]:
    """Without the search for cycles, which finds none among a chunk's tokens, again and again (a tenth of the time)."""
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()


def chunks_of(rows: Iterable[Row]) -> Iterator[list[Row]]:
    """Rows in chunks."""
    chunk: list[Row] = []
    size = 0
    for row in rows:
        chunk.append(row)
        size += sum(len(turn.content) for turn in row.turns)
        if len(chunk) == CHUNK_ROWS or size >= CHUNK_CHARACTERS:
            yield chunk
            chunk, size = [], 0
    if chunk:
        yield chunk


def num_workers(setting: int | str, data_bytes: int) -> int:
    """How many processes encode: as set, or for `auto` by the data's size and this process's share of the cores."""
    if isinstance(setting, int):
        return setting
    assert setting == AUTO
    cores = len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1
    return max(1, min(cores // distributed.launched_processes(), MOST_WORKERS, data_bytes // WORKER_BYTES))


def encoded_chunks(rows: Iterable[Row], encoding: Encoding, workers: int) -> Iterator[EncodedChunk]:
    """Encodes rows, a chunk at a time, in their order. One worker: this process itself.

    Raises: RequestError for a template that can't be used; WorkError when a process dies.
    """
    if workers == 1:
        encoder = encoding.encoder()
        yield from (encode_chunk(encoder, chunk) for chunk in chunks_of(rows))
        return
    with _Pool(encoding, workers) as pool:
        yield from pool.encode(chunks_of(rows))


class _Pool:
    """Processes that encode; a context, which ends them."""

    def __init__(self, encoding: Encoding, workers: int) -> None:
        self._encoding, self._workers = encoding, workers
        self._processes: list[subprocess.Popen[bytes]] = []
        self._free: queue.SimpleQueue[Connection] = queue.SimpleQueue()
        self._connections: list[Connection] = []
        self._told: set[Connection] = set()
        """Those that know the encoding."""
        self._threads = ThreadPoolExecutor(workers, thread_name_prefix="rankwise-encode")

    def __enter__(self) -> _Pool:
        for _ in range(self._workers):
            connection, process = _started()
            self._processes.append(process)
            self._connections.append(connection)
            self._free.put(connection)
        return self

    def __exit__(self, *_: object) -> None:
        for process in self._processes:
            process.terminate()
        self._threads.shutdown(wait=True, cancel_futures=True)
        for connection in self._connections:
            connection.close()
        for process in self._processes:
            process.wait()

    def encode(self, chunks: Iterator[list[Row]]) -> Iterator[EncodedChunk]:
        """The chunks in order, at most two ahead for each process."""
        waiting: deque[Future[EncodedChunk]] = deque()
        for chunk in chunks:
            waiting.append(self._threads.submit(self._encode, chunk))
            while len(waiting) >= 2 * self._workers:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()

    def _encode(self, rows: list[Row]) -> EncodedChunk:
        connection = self._free.get()
        try:
            if connection not in self._told:
                connection.send(self._encoding)
                self._told.add(connection)
            connection.send(rows)
            answer = connection.recv()
        except (EOFError, OSError) as error:
            raise WorkError(
                "a process that encoded data ended before its time (out of memory?); try fewer data.workers"
            ) from error
        finally:
            self._free.put(connection)
        if isinstance(answer, RequestError):
            raise answer
        assert isinstance(answer, EncodedChunk), answer
        return answer


def _started() -> tuple[Connection, subprocess.Popen[bytes]]:
    ours, theirs = socket.socketpair()
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(path or str(Path.cwd()) for path in sys.path),
        "TOKENIZERS_PARALLELISM": "false",
        "OMP_NUM_THREADS": "1",
    }
    number = theirs.fileno()
    command = [sys.executable, "-c", f"from rankwise.data.workers import serve; serve({number})"]
    with theirs:
        process = subprocess.Popen(command, pass_fds=(number,), env=environment, stdin=subprocess.DEVNULL)
    return Connection(ours.detach()), process


def serve(number: int) -> None:
    """A worker's whole life: takes a tokenizer and settings, then chunks, until the socket is closed."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the process that started this one, which ends it
    connection = Connection(number)
    with contextlib.suppress(EOFError, ConnectionError):  # the other end has gone: nothing is left to do
        encoder = connection.recv().encoder()
        while True:
            rows = connection.recv()
            try:
                connection.send(encode_chunk(encoder, rows))
            except RequestError as error:
                connection.send(error)
