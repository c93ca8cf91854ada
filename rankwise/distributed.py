"""Many processes as one: which this is, sums over all of them, and mistakes that all of them make together.

Every function skips communication at world size 1, so that one path serves one process and many. Tensors on the CPU
travel by gloo, those on a GPU by NCCL. Two ways to fail are kept apart: what goes wrong in a block of `together` or
`from_first` is raised on every process, as one message; a process that is lost in between shows on the others as
`LostProcess`, which is not the reason and is not to be printed beside it.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from rankwise.errors import RankwiseError, RequestError, WorkError

TIMEOUT_S = 1800
"""How long a process waits for the others in one exchange: the first writes checkpoints while they wait."""

TIMEOUT_VARIABLE = "RANKWISE_TIMEOUT_S"
"""Environment variable that sets another time."""

MEETING_POLL_S = 0.05

CHECKSUM_CHUNK = 1 << 22
CHECKSUM_PERIOD = 65521
"""Entries are weighted by their place modulo this prime, so that two that change places are noticed."""

T = TypeVar("T")


class LostProcess(WorkError):  # noqa: N818 (it is another's error)
    """Another process of the job has gone, and an exchange with it could not be finished."""


# --- who this is ---------------------------------------------------------------------------------------------------


def rank() -> int:
    """The number of this process, 0 to world_size() - 1."""
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    """How many processes work together."""
    return dist.get_world_size() if dist.is_initialized() else 1


def is_first() -> bool:
    """Whether this is the process that prints and writes."""
    return rank() == 0


def launched_processes() -> int:
    """How many processes torchrun started, whether they have joined or not."""
    return max(world_size(), _number("WORLD_SIZE", 1))


def launched_rank() -> int:
    """The number that torchrun gave this process, whether it has joined or not."""
    return rank() if dist.is_initialized() else _number("RANK", 0)


def local_rank() -> int:
    """The number of this process on its own machine: the GPU that it takes."""
    return _number("LOCAL_RANK", 0) if launched_processes() > 1 else 0


def local_world_size() -> int:
    """How many processes work together on this machine."""
    return _number("LOCAL_WORLD_SIZE", world_size()) if world_size() > 1 else 1


def is_restart() -> bool:
    """Whether torchrun has started this process again after one of the job failed (`--max-restarts`)."""
    return launched_processes() > 1 and _number("TORCHELASTIC_RESTART_COUNT", 0) > 0


def job_id() -> str | None:
    """What names this launch of torchrun, its restarts included; None without torchrun.

    `--rdzv-id` where one was given, else the machine, the launcher's process and the time it was started.
    """
    run_id = os.environ.get("TORCHELASTIC_RUN_ID")
    if run_id is None or launched_processes() == 1:
        return None
    if run_id != "none":
        return run_id
    return f"{os.uname().nodename}:{os.getppid()}:{_started(os.getppid())}"


def _started(process: int) -> str:
    """When a process of this machine was started, in the kernel's ticks; empty where /proc does not say."""
    try:
        with open(f"/proc/{process}/stat", encoding="utf-8") as file:
            return file.read().rpartition(")")[2].split()[19]
    except OSError:  # no such file outside of Linux: the process number has to do
        return ""


def _number(variable: str, default: int) -> int:
    text = os.environ.get(variable, "")
    return int(text) if text.isdigit() else default


# --- joining -------------------------------------------------------------------------------------------------------


def join() -> None:
    """Meets the other processes that torchrun started, unless that was done before, or there are none.

    Raises: WorkError when the others can't be reached; RequestError for a time of waiting that is none.
    """
    if dist.is_initialized() or launched_processes() == 1:
        return
    has_gpu = torch.cuda.is_available() and local_rank() < torch.cuda.device_count()
    if has_gpu:
        torch.cuda.set_device(local_rank())
    timeout_s = _timeout_s()
    timeout = timedelta(seconds=timeout_s)
    try:
        store, rank, world_size = next(dist.rendezvous("env://", timeout=timeout))
        meeting = _meeting(store, rank, world_size, timeout_s)
        dist.init_process_group(
            "cpu:gloo,cuda:nccl" if has_gpu else "gloo", timeout=timeout, rank=rank, world_size=world_size,
            store=dist.PrefixStore(meeting, store),
        )  # fmt: skip
    except (RuntimeError, ValueError) as error:
        where = f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
        raise WorkError(
            f"process {launched_rank()} of {launched_processes()} could not meet the others at {where}: "
            f"{_line(error)}; start them all with torchrun"
        ) from error


def _timeout_s() -> int:
    """Raises: RequestError for a time that is no whole number of seconds."""
    text = os.environ.get(TIMEOUT_VARIABLE, "") or str(TIMEOUT_S)
    if not (text.isascii() and text.isdigit()) or int(text) == 0:
        raise RequestError(f"{TIMEOUT_VARIABLE} must be a whole number of seconds, not {text!r}; 1800 is the default")
    return int(text)


def _meeting(store: dist.Store, rank: int, world_size: int, timeout_s: float) -> str:
    """A name for this meeting of all processes, which no earlier one had.

    torchrun may keep one store over its restarts, and what processes that are dead have left in it: a process that
    takes a dead one's address from there waits for ever. So each writes down a number of its own; the first collects
    them, and a collection stands when every number in it has been confirmed, which the dead do not do.
    """
    own = uuid.uuid4().hex
    store.set(f"rankwise/process/{rank}", own)
    ends = time.monotonic() + timeout_s
    while time.monotonic() < ends:
        if rank == 0:
            names = [f"rankwise/process/{other}" for other in range(world_size)]
            numbers = [store.get(name).decode() for name in names] if store.check(names) else []
            store.set("rankwise/numbers", " ".join(numbers))
        else:
            numbers = store.get("rankwise/numbers").decode().split()
        if len(numbers) == world_size and numbers[rank] == own:
            meeting = hashlib.sha256(" ".join(numbers).encode()).hexdigest()
            store.set(f"rankwise/{meeting}/{own}", "")
            if rank == 0 and store.check([f"rankwise/{meeting}/{number}" for number in numbers]):
                store.set(f"rankwise/{meeting}", "")
            if store.check([f"rankwise/{meeting}"]):
                return meeting
        time.sleep(MEETING_POLL_S)
    raise RuntimeError(f"not all of them came within {timeout_s:g} s")


def leave() -> None:
    """Parts from the other processes."""
    dist.destroy_process_group()


@contextlib.contextmanager
def joined() -> Iterator[None]:
    """In the block, the processes that torchrun started know each other. Without torchrun, or inside, it does nothing.

    Raises: as `join`.
    """
    if dist.is_initialized() or launched_processes() == 1:
        yield
        return
    join()
    try:
        yield
    except LostProcess:
        raise  # leaving in order would wait for the one that is gone
    except BaseException:
        leave()
        raise
    else:
        leave()


def says_why() -> bool:
    """Whether this process is the one that tells what went wrong: of all that fail, the first that asks."""
    if launched_processes() == 1:
        return True
    if not dist.is_initialized():
        return launched_rank() == 0
    try:
        return int(_store().add("rankwise/failures", 1)) == 1
    except RuntimeError:  # the store went with the launcher; better said twice than not at all
        return True


def _store() -> Any:
    return dist.distributed_c10d._get_default_store()


# --- exchanges -----------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def _exchange(what: str) -> Iterator[None]:
    """Turns what torch raises when another process is gone into `LostProcess`."""
    try:
        yield
    except (RuntimeError, ValueError) as error:
        raise LostProcess(
            f"process {rank()} of {world_size()} lost another one while it {what} ({_line(error)[:160]}); "
            "that one's own message, or the system's log, says why"
        ) from error


def _line(error: BaseException) -> str:
    return " ".join(str(error).split())


def all_reduce_sum(tensors: Sequence[Tensor]) -> None:
    """Sums each tensor over all processes, in place: one flat message for each dtype and device."""
    if world_size() == 1:
        return
    for group in _alike(tensors):
        flat = torch.cat([tensor.reshape(-1) for tensor in group])
        with _exchange("added tensors up"):
            dist.all_reduce(flat)
        _take_apart(flat, group)


def broadcast_from(source: int, tensors: Sequence[Tensor]) -> None:
    """Copies each tensor of process `source` to all others, in place: one flat message for each dtype and device."""
    if world_size() == 1:
        return
    for group in _alike(tensors):
        flat = torch.cat([tensor.detach().reshape(-1) for tensor in group])
        with _exchange("took tensors over"):
            dist.broadcast(flat, source)
        _take_apart(flat, group)


def _alike(tensors: Sequence[Tensor]) -> list[list[Tensor]]:
    """The tensors in groups of one dtype and device."""
    groups: dict[tuple[torch.dtype, torch.device], list[Tensor]] = {}
    for tensor in tensors:
        groups.setdefault((tensor.dtype, tensor.device), []).append(tensor)
    return list(groups.values())


@torch.no_grad()
def _take_apart(flat: Tensor, tensors: Sequence[Tensor]) -> None:
    for tensor, part in zip(tensors, flat.split([tensor.numel() for tensor in tensors]), strict=True):
        tensor.copy_(part.view_as(tensor))


def gathered(value: T) -> list[T]:
    """The values of all processes, by rank, on every one of them."""
    if world_size() == 1:
        return [value]
    values: list[Any] = [None] * world_size()
    with _exchange("compared notes"):
        dist.all_gather_object(values, value)
    return values


def gathered_at_first(value: T) -> list[T] | None:
    """The values of all processes, by rank, on the first; None on the others."""
    if world_size() == 1:
        return [value]
    values: list[Any] | None = [None] * world_size() if is_first() else None
    with _exchange("sent its share to the first"):
        dist.gather_object(value, values)
    return values


def any_process(flag: bool) -> bool:
    """Whether the flag is true on some process."""
    if world_size() == 1:
        return flag
    count = torch.tensor(int(flag))
    all_reduce_sum([count])
    return bool(count)


def dealt(items: Sequence[T]) -> Sequence[T]:
    """The share of this process in `items`: every world_size()-th, from its own rank on. Without overlap."""
    return items if world_size() == 1 else items[rank() :: world_size()]


# --- mistakes ------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def together() -> Iterator[None]:
    """A block without exchanges that fails on every process when it fails on one.

    The others raise the message of the lowest one that failed: as RequestError or WorkError, whichever that was.
    """
    if world_size() == 1:
        yield
        return
    try:
        yield
    except Exception as error:
        gathered(_report(error))
        raise
    reports = gathered(None)
    _raise_first(reports)


def from_first(work: Callable[[], T]) -> T:
    """What `work` gives on the first process, on all of them; what it raises there is raised everywhere."""
    if world_size() == 1:
        return work()
    message: list[Any] = [None]
    failure: Exception | None = None
    if is_first():
        try:
            message = [(work(), None)]
        except Exception as error:  # noqa: BLE001 (raised below, once the others know)
            failure, message = error, [(None, _report(error))]
    with _exchange("heard from the first"):
        dist.broadcast_object_list(message, 0)
    if failure is not None:
        raise failure
    value, report = message[0]
    _raise_first([report])
    return value


def _report(error: Exception) -> tuple[int, str]:
    """An error as its exit code and its line: exceptions of other packages need not survive the journey."""
    if isinstance(error, RankwiseError):
        return error.code, error.message
    return 1, f"{type(error).__name__}: {_line(error)}"


def _raise_first(reports: Sequence[tuple[int, str] | None]) -> None:
    for report in reports:
        if report is not None:
            code, message = report
            raise RequestError(message) if code == RequestError.code else WorkError(message)


# --- the same everywhere -------------------------------------------------------------------------------------------


def checksum(tensor: Tensor) -> int:
    """A number that changes when a bit or the place of an entry does; equal on every device."""
    bits = tensor.detach().contiguous().view(-1).view(torch.uint8)
    width = next(size for size in (4, 2, 1) if bits.numel() % size == 0)
    words = bits.view({4: torch.int32, 2: torch.int16, 1: torch.uint8}[width])
    total = 0
    for start in range(0, words.numel(), CHECKSUM_CHUNK):
        part = words[start : start + CHECKSUM_CHUNK].to(torch.int64)
        places = torch.arange(start, start + part.numel(), device=part.device) % CHECKSUM_PERIOD + 1
        total = (total * 31 + int((part * places).sum())) % 2**63
    return total


def check_in_step(tensors: Mapping[str, Tensor], when: str) -> None:
    """Makes sure that every process holds the same tensors under the same names, to the bit. A hook may call it.

    Raises: WorkError on every process, naming the first tensor that differs; `when` says at what point.
    """
    if world_size() == 1:
        return
    found = {name: (tuple(tensor.shape), checksum(tensor)) for name, tensor in tensors.items()}
    everywhere = gathered(found)
    for other, theirs in enumerate(everywhere):
        names = dict.fromkeys([*everywhere[0], *theirs])
        differing = [name for name in names if everywhere[0].get(name) != theirs.get(name)]
        if differing:
            raise WorkError(
                f"{when}: the processes have fallen out of step: '{differing[0]}' of process {other} is not that of "
                f"process 0 ({len(differing)} of {len(names)} tensors differ); start again from the last checkpoint"
            )
