"""Chunks of rows, encoded by several processes and given back in order: what comes out does not depend on how many.

Processes rather than the tokenizer's own threads: more than half of the time is Python (templates, labels), which
threads do not share. On Linux they are forks of this one, which start at once with the tokenizer loaded. All that runs
in them is `serve`: Python and the tokenizer, with its threads turned off; neither torch nor CUDA, nor anything of the
caller's, is touched there. Elsewhere, where a fork is not safe, each is a fresh interpreter, which takes seconds. Both
talk over a socket with a thread of this process, so a script needs no `if __name__ == "__main__"`.
"""

from __future__ import annotations

import contextlib
import gc
import multiprocessing
import os
import queue
import signal
import socket
import subprocess
import sys
import warnings
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from multiprocessing.connection import Connection
from multiprocessing.context import ForkProcess
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

FORKS = sys.platform == "linux"
WORKER_BYTES = 2**20 if FORKS else 16 * 2**20
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
    """Without examples and their rows."""


def encode_chunk(encoder: Encoder | HeadEncoder, rows: Sequence[Row]) -> EncodedChunk:
    """Encodes rows to records. Raises: RequestError for a template that can't be used."""
    with _uncollected():
        chunk = encoder.encode(rows)
        made = records(chunk.examples, [row_key(row) for row in chunk.rows], [row_group(row) for row in chunk.rows])
        chunk.examples, chunk.rows = [], []
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
    rest = iter(rows)
    while chunk := _next_chunk(rest):
        yield chunk


def _next_chunk(rows: Iterator[Row]) -> list[Row]:
    chunk: list[Row] = []
    size = 0
    with _uncollected():
        for row in rows:
            chunk.append(row)
            size += sum([len(turn.content) for turn in row.turns])
            if len(chunk) == CHUNK_ROWS or size >= CHUNK_CHARACTERS:
                break
    return chunk


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
        self._encoding, self._num_workers = encoding, workers
        self._workers: list[_Worker] = []
        self._free: queue.SimpleQueue[Connection] = queue.SimpleQueue()
        self._threads = ThreadPoolExecutor(workers, thread_name_prefix="rankwise-encode")

    def __enter__(self) -> _Pool:
        can_fork = FORKS and not multiprocessing.current_process().daemon  # such have no children of that kind
        start = _forked if can_fork else _started
        self._workers = start(self._encoding, self._num_workers)  # before any thread of the pool
        for worker in self._workers:
            self._free.put(worker.connection)
        return self

    def __exit__(self, *_: object) -> None:
        for worker in self._workers:
            worker.process.terminate()
        self._threads.shutdown(wait=True, cancel_futures=True)
        for worker in self._workers:
            worker.connection.close()
            worker.wait()

    def encode(self, chunks: Iterator[list[Row]]) -> Iterator[EncodedChunk]:
        """The chunks in order, at most two ahead for each process."""
        waiting: deque[Future[EncodedChunk]] = deque()
        for chunk in chunks:
            waiting.append(self._threads.submit(self._encode, chunk))
            while len(waiting) >= 2 * self._num_workers:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()

    def _encode(self, rows: list[Row]) -> EncodedChunk:
        connection = self._free.get()
        try:
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


@dataclass(frozen=True)
class _Worker:
    """A process that encodes. `wait` returns once it has ended."""

    connection: Connection
    process: subprocess.Popen[bytes] | ForkProcess
    wait: Callable[[], object]


def _forked(encoding: Encoding, count: int) -> list[_Worker]:
    """Forks of this process. Each closes the others' ends of all sockets: it ends when this process does."""
    sockets = [socket.socketpair() for _ in range(count)]
    pairs = [(Connection(ours.detach()), Connection(theirs.detach())) for ours, theirs in sockets]
    context = multiprocessing.get_context("fork")
    workers: list[_Worker] = []
    with _no_tokenizer_threads(), warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".* is multi-threaded", DeprecationWarning)  # what runs there takes no lock
        for number, (connection, _) in enumerate(pairs):
            process = context.Process(target=_serve_forked, args=(encoding, pairs, number), daemon=True)
            process.start()
            workers.append(_Worker(connection, process, process.join))
    for _, theirs in pairs:
        theirs.close()
    return workers


def _serve_forked(encoding: Encoding, pairs: Sequence[tuple[Connection, Connection]], number: int) -> None:
    signal.signal(signal.SIGTERM, signal.SIG_DFL)  # handlers are those of the process that was forked
    for place, (ours, theirs) in enumerate(pairs):
        ours.close()
        if place != number:
            theirs.close()
    _serve(pairs[number][1], encoding)


@contextlib.contextmanager
def _no_tokenizer_threads() -> Iterator[None]:
    """Processes that are started inside use none: threads of the tokenizer do not survive a fork."""
    before = os.environ.get(_THREADS)
    os.environ[_THREADS] = "false"
    try:
        yield
    finally:
        if before is None:
            del os.environ[_THREADS]
        else:
            os.environ[_THREADS] = before


_THREADS = "TOKENIZERS_PARALLELISM"


def _started(encoding: Encoding, count: int) -> list[_Worker]:
    """Fresh interpreters."""
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(path or str(Path.cwd()) for path in sys.path),
        _THREADS: "false",
        "OMP_NUM_THREADS": "1",
    }
    workers: list[_Worker] = []
    for _ in range(count):
        ours, theirs = socket.socketpair()
        number = theirs.fileno()
        command = [sys.executable, "-c", f"from rankwise.data.workers import serve; serve({number})"]
        with theirs:
            process = subprocess.Popen(command, pass_fds=(number,), env=environment, stdin=subprocess.DEVNULL)
        workers.append(_Worker(Connection(ours.detach()), process, process.wait))
    for worker in workers:
        with contextlib.suppress(OSError):  # one that died already is found when it is given rows
            worker.connection.send(encoding)
    return workers


def serve(number: int) -> None:
    """A fresh interpreter's whole life: takes a tokenizer and settings, then chunks, until the socket is closed."""
    connection = Connection(number)
    with contextlib.suppress(EOFError, ConnectionError):  # the other end has gone: nothing is left to do
        _serve(connection, connection.recv())


def _serve(connection: Connection, encoding: Encoding) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the process that started this one, which ends it
    with contextlib.suppress(EOFError, ConnectionError):
        encoder: Encoder | HeadEncoder | None = None
        while True:
            rows = connection.recv()
            try:
                encoder = encoder or encoding.encoder()
                connection.send(encode_chunk(encoder, rows))
            except RequestError as error:
                connection.send(error)
