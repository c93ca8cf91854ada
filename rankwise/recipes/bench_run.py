"""Runs the cells of a suite that the store has not got, each in a process of its own with one thread.

A stopped run goes on where it was: what is finished is in the store, what was not is begun again. One runner at a time
works on a store. A worker that fails, or dies, leaves a record of why; the others go on.
"""

from __future__ import annotations

import contextlib
import math
import multiprocessing
import multiprocessing.connection
import os
import platform
import signal
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from multiprocessing.connection import Connection
from pathlib import Path
from statistics import fmean
from typing import Any

from filelock import FileLock, Timeout

from rankwise.bench.kinds import OF_ALL
from rankwise.bench.store import CELL, DONE, FAILED, Contents
from rankwise.bench.suite import Answers
from rankwise.errors import RankwiseError, RequestError, counted
from rankwise.recipes.bench import MODULES, Bench, NotYet, mean_loss, open_bench
from rankwise.recipes.bench_cells import ANSWERS, THREADS, Cell, Work
from rankwise.recipes.provenance import source_commit, versions
from rankwise.recipes.run import RunConfig, read_run
from rankwise.say import Say, silent, to_stderr
from rankwise.train.log import clock

ONE_THREAD = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")


@dataclass
class Worker:
    """A process at work on a cell."""

    cell: Cell
    process: Any
    results: Any
    lifeline: Any
    """Held open: the worker ends when it closes, however the runner comes to its end."""
    began: float = field(default_factory=time.monotonic)


def bench_run(
    name: str, only: Sequence[str] = (), num_workers: int = 2, retry_failed: bool = False, limit: int | None = None,
    quiet: bool = False,
) -> dict[str, Any]:  # fmt: skip
    """Runs what is missing of a suite: `run`, `failed` (names), `left`, `waiting` (methods without a rate), `time_s`.

    Args:
        name: of the suite, or its file.
        only: patterns of `method/task/seed`; none takes all.
        num_workers: processes at a time.
        retry_failed: also cells that have failed before by the same code.
        limit: no more cells than this.
        quiet: print nothing on stderr.

    Raises: RequestError for a suite that can't be run, or a store that another runner is working on.
    """
    bench = open_bench(name)
    runner = Runner(bench, only, num_workers, retry_failed, limit, silent if quiet else to_stderr)
    began = time.monotonic()
    with alone(bench):
        runner.work()
    known = bench.store.read()
    result: dict[str, Any] = {
        "suite": bench.name,
        "store": str(bench.store.path),
        "run": runner.num_run,
        "failed": [cell.name for cell in runner.failed],
        "left": runner.num_left(known),
        "waiting": runner.waiting(known),
        "time_s": time.monotonic() - began,
    }
    if runner.failed:
        text = f"{counted(len(runner.failed), 'cell')} failed ({runner.failed[0].name}, ...); the store says why"
        result["error"] = {"code": 1, "message": text}
    return result


@contextlib.contextmanager
def alone(bench: Bench) -> Iterator[None]:
    """Holds the store for one runner. Raises: RequestError when another one is at work."""
    path = bench.store.path
    lock = FileLock(f"{path}.runner.lock")
    try:
        lock.acquire(timeout=0)
    except Timeout:
        raise RequestError(f"another run is at work on '{path}'; wait for it, or stop it") from None
    try:
        yield
    finally:
        lock.release()


class Runner:
    """Hands out cells to workers until none is left. Arguments: as of `bench_run`."""

    def __init__(
        self, bench: Bench, only: Sequence[str], num_workers: int, retry_failed: bool, limit: int | None, say: Say
    ) -> None:
        self.bench, self.only, self.num_workers, self.say = bench, only, num_workers, say
        self.retry_failed, self.limit = retry_failed, limit
        self.failed: list[Cell] = []
        self.num_run = 0
        self.durations: list[float] = []

    def work(self) -> None:
        """Until nothing is left that can be run."""
        known = self.bench.store.read()
        if known.torn:
            self.say(f"note: the store ends in a line that was cut off ({known.torn} bytes); it is dropped")
        first = self.num_left(known)
        self.say(f"{self.bench.name}: {counted(first, 'cell')} to run, code {self.bench.code.name}")
        workers: list[Worker] = []
        try:
            while True:
                for cell in self.pending(known, workers)[: self.num_workers - len(workers)]:
                    workers.append(start(cell, self.bench.work(cell, known)))
                if not workers:
                    return
                for worker in finished(workers):
                    workers.remove(worker)
                    self.take(worker)
                known = self.bench.store.read()
                self.say_left(known)
        finally:
            for worker in workers:
                worker.process.terminate()
                worker.process.join()

    def pending(self, known: Contents, workers: Sequence[Worker] = ()) -> list[Cell]:
        """Cells to run next, best first."""
        busy = {worker.cell.identity for worker in workers} | {cell.identity for cell in self.failed}
        found = [
            cell
            for cell in self.bench.plan(known, self.only)
            if cell.identity not in busy
            and not self.bench.is_done(cell, known)
            and (self.retry_failed or self.bench.failed(cell, known) is None)
        ]
        room = len(found) if self.limit is None else self.limit - self.num_run - len(self.failed) - len(workers)
        return found[: max(room, 0)]

    def take(self, worker: Worker) -> None:
        """Writes down what a worker has found, or why it has not."""
        seconds = time.monotonic() - worker.began
        outcome = checked(outcome_of(worker))
        line, code = line_of(self.bench, worker.cell, outcome, seconds), self.bench.code_for(worker.cell.settings)
        self.bench.store.append(line, code.name, code.files)
        if outcome["status"] == FAILED:
            self.failed.append(worker.cell)
            self.say(f"{worker.cell.name} failed: {outcome['reason']}")
            return
        self.num_run += 1
        self.durations.append(seconds)
        # no test loss: grids are extended by what stands here
        self.say(f"{worker.cell.name}: valid {mean_loss(outcome['losses'], 'valid'):.4f}, {clock(seconds)}")

    def num_left(self, known: Contents) -> int:
        """Cells still to run, those included whose rate is not chosen yet."""
        left = len(self.pending(known)) + len(self.bench.unplanned(known, self.only))
        return left if self.limit is None else min(left, max(self.limit - self.num_run - len(self.failed), 0))

    def waiting(self, known: Contents) -> list[str]:
        """Methods whose rate can't be chosen yet."""
        found = []
        for method in self.bench.suite.methods:
            try:
                self.bench.chosen_rate(method, known)
            except NotYet:
                found.append(method)
        return found

    def say_left(self, known: Contents) -> None:
        """How much is left, and how long that takes at the speed so far."""
        left = self.num_left(known)
        if left and self.durations:
            seconds = fmean(self.durations) * left / self.num_workers
            self.say(f"{counted(left, 'cell')} left, about {clock(seconds)}")


def start(cell: Cell, work: Work) -> Worker:
    """A process that does the work of the cell, forked from a server that has loaded what every cell needs."""
    for name in ONE_THREAD:
        os.environ[name] = str(THREADS)
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(list(MODULES))
    ours, results = context.Pipe(duplex=False)
    end, lifeline = context.Pipe(duplex=False)
    process = context.Process(target=compute, args=(results, end, work), daemon=True)
    process.start()
    results.close()
    end.close()
    return Worker(cell, process, ours, lifeline)


def finished(workers: Sequence[Worker]) -> list[Worker]:
    """Waits until one of them has a result, or is dead; returns those."""
    waited = {worker.results: worker for worker in workers} | {worker.process.sentinel: worker for worker in workers}
    ready = multiprocessing.connection.wait(list(waited))
    return list({id(waited[item]): waited[item] for item in ready}.values())  # type: ignore[index]


def outcome_of(worker: Worker) -> Mapping[str, Any]:
    """What the worker sent, or that it died."""
    try:
        outcome: Mapping[str, Any] = worker.results.recv()
    except (EOFError, OSError):  # before it sent anything, and amid it
        worker.process.join()
        code = worker.process.exitcode
        why = f"signal {-code}" if code is not None and code < 0 else f"exit code {code}"
        return {"status": FAILED, "reason": f"the worker died with {why} (out of memory?)"}
    worker.process.join()
    return outcome


def checked(outcome: Mapping[str, Any]) -> Mapping[str, Any]:
    """The outcome, or a failure where a loss is no finite number: what no table could use, nor JSON hold."""
    for split, losses in outcome.get("losses", {}).items():
        bad = sum(not math.isfinite(loss) for loss in losses)
        if bad:
            rows = counted(bad, "row")
            return {"status": FAILED, "reason": f"{split} loss of {rows} of {len(losses)} is no finite number"}
    return outcome


def compute(results: Connection, end: Connection, work: Work) -> None:
    """What a worker does: one cell, its outcome sent back whatever happens; over when the runner is."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the runner's: it ends its workers
    threading.Thread(target=_end_with, args=(end,), daemon=True).start()
    import torch

    torch.set_num_threads(THREADS)
    load = os.getloadavg()[0]
    try:
        outcome = _of_all(work) if work.kind in OF_ALL else _of_one(work)
    except RankwiseError as error:
        results.send({"status": FAILED, "reason": error.message})
        return
    except Exception as error:  # noqa: BLE001 (whatever it is, the store says it, and the other cells go on)
        results.send({"status": FAILED, "reason": " ".join(f"{type(error).__name__}: {error}".split())})
        return
    outcome["figures"]["load_average"] = round(load, 2)
    results.send({"status": DONE, **outcome})


def _of_one(work: Work) -> dict[str, Any]:
    from rankwise.recipes.bench_cell import run_cell
    from rankwise.recipes.bench_flops import training_flops

    run = read_run(work.document)
    with contextlib.ExitStack() as held:
        keep = None
        if work.keep is not None:  # another worker may be making the same adapter
            folder = Path(work.keep)
            folder.parent.mkdir(parents=True, exist_ok=True)
            held.enter_context(FileLock(f"{folder}.lock"))
            keep = None if folder.exists() else folder
        began = time.process_time()

        def look(trained: Any) -> dict[str, Any]:
            costs = _costs(began)  # answering is no part of them
            return {"costs": costs, **_answered(trained, run, work.answers)}

        outcome = run_cell(run, work.kind, work.cut, keep, look)
    outcome["figures"] |= outcome.pop("costs")
    flops = training_flops(run, work.kind, outcome["figures"], work.cut)
    return _with_flops(outcome, flops)


def _answered(trained: Any, run: RunConfig, asked: Answers | None) -> dict[str, Any]:
    if asked is None:
        return {}
    from rankwise.recipes.bench_answers import answered

    return {ANSWERS: answered(trained, run, asked)}


def _of_all(work: Work) -> dict[str, Any]:
    """The adapters that it begins with are no part of its costs: they are cells of their own."""
    from rankwise.recipes.bench_flops import flops_of_all
    from rankwise.recipes.bench_of_all import find_sources, run_of_all

    find_sources(work)
    began = time.process_time()
    outcome = run_of_all(work)
    outcome["figures"] |= _costs(began)
    return _with_flops(outcome, flops_of_all(work, outcome["figures"]))


def _costs(began: float) -> dict[str, float]:
    import torch

    from rankwise.train.log import peak_memory_bytes

    cpu_s = round(time.process_time() - began, 2)
    return {"cpu_s": cpu_s, "peak_memory_bytes": peak_memory_bytes(torch.device("cpu"))}


def _with_flops(outcome: dict[str, Any], flops: int | None) -> dict[str, Any]:
    if flops is not None:
        outcome["figures"]["flops"] = flops
    return outcome


def _end_with(end: Connection) -> None:
    """Ends this process when the other end of the pipe is closed."""
    end.poll(None)
    os._exit(1)


def line_of(bench: Bench, cell: Cell, outcome: Mapping[str, Any], seconds: float) -> dict[str, Any]:
    """The store's line about a cell."""
    line = {
        "kind": CELL, "cell": cell.identity, "family": cell.family, "code": bench.code_for(cell.settings).name,
        "name": cell.name,
        "finished_at": datetime.now(UTC).isoformat(timespec="seconds"), "settings": cell.settings,
        "versions": versions(), "commit": source_commit(), "machine": machine(), **outcome,
    }  # fmt: skip
    if line["status"] == DONE:
        line["figures"] = {**outcome["figures"], "wall_s": round(seconds, 2)}
    return line


def machine() -> str:
    """The processor's name, how many there are, and what decides how a product of matrices rounds: its instructions.

    A name such as "AMD EPYC" is that of many kinds.
    """
    import torch

    name, flags = platform.processor() or platform.machine(), ""
    with contextlib.suppress(OSError), open("/proc/cpuinfo", encoding="utf-8") as file:
        lines = [line.partition(":") for line in file]
        name = next((value.strip() for key, _, value in lines if key.startswith("model name")), name)
        flags = next((value for key, _, value in lines if key.startswith(("flags", "Features"))), flags)
    widest = torch.backends.cpu.get_cpu_capability()
    return f"{name}, {counted(os.cpu_count() or 1, 'core')}, {instructions(widest, flags.split())}"


def instructions(widest: str, flags: Sequence[str]) -> str:
    """The widest vector instructions that torch takes, and those for bf16 of the processor's flags."""
    names = {"avx512_bf16": "AVX512-BF16", "amx_bf16": "AMX-BF16", "bf16": "BF16"}
    found = [name for flag, name in names.items() if flag in flags]
    return f"{widest}, {' and '.join(found) if found else 'no bf16 instructions'}"
