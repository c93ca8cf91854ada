"""Two or more processes that have met (gloo, on the CPU), and run one case after another: meeting costs seconds."""

from __future__ import annotations

import multiprocessing
import os
import socket
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any

TIMEOUT_S = 120


class Failed(AssertionError):
    """A case raised in some process."""


class Processes:
    """`count` processes as torchrun would start them; after a case that failed, new ones."""

    def __init__(self, count: int) -> None:
        self.count = count
        self.start()

    def start(self) -> None:
        count = self.count
        context = multiprocessing.get_context("spawn")
        self.pipes: list[Connection] = []
        self.workers = []
        port = free_port()
        for rank in range(count):
            ours, theirs = context.Pipe()
            worker = context.Process(target=_serve, args=(rank, count, port, theirs), daemon=True)
            worker.start()
            self.pipes.append(ours)
            self.workers.append(worker)

    def __call__(self, case: Callable[..., Any], *arguments: Any) -> list[Any]:
        """What `case(*arguments)` gives in each process, by rank."""
        for pipe in self.pipes:
            pipe.send((case, arguments))
        results = []
        for pipe in self.pipes:
            try:
                results.append(pipe.recv() if pipe.poll(TIMEOUT_S) else (False, f"{case.__name__} hangs"))
            except EOFError:
                results.append((False, f"a process died of {case.__name__}"))
        failures = [result for fine, result in results if not fine]
        if failures:
            self.stop()
            self.start()
            raise Failed("\n".join(failures))
        return [result for _, result in results]

    def stop(self) -> None:
        for worker in self.workers:
            worker.kill()
            worker.join()


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def _serve(rank: int, count: int, port: int, pipe: Connection) -> None:
    os.environ |= {
        "RANK": str(rank), "WORLD_SIZE": str(count), "LOCAL_RANK": str(rank), "LOCAL_WORLD_SIZE": str(count),
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false",
        "TRANSFORMERS_VERBOSITY": "error",
    }  # fmt: skip
    import torch

    from rankwise import distributed

    torch.set_num_threads(1)
    with distributed.joined():
        while True:
            try:
                case, arguments = pipe.recv()
            except EOFError:
                return
            try:
                pipe.send((True, case(*arguments)))
            except Exception:  # noqa: BLE001 (told to the test)
                pipe.send((False, f"process {rank}: {traceback.format_exc()}"))
