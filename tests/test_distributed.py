from __future__ import annotations

import os

import pytest
import torch

from rankwise import distributed
from rankwise.errors import RequestError, WorkError, WriteError
from tests.processes import Processes


def test_one_process_exchanges_nothing() -> None:
    tensor = torch.tensor([1.0, 2.0])
    distributed.all_reduce_sum([tensor])
    distributed.broadcast_from(0, [tensor])
    distributed.check_in_step({"a": tensor}, "here")
    assert tensor.tolist() == [1.0, 2.0]
    assert (distributed.rank(), distributed.world_size(), distributed.is_first()) == (0, 1, True)
    assert distributed.gathered("a") == distributed.gathered_at_first("a") == ["a"]
    assert distributed.dealt([3, 4, 5]) == [3, 4, 5]
    assert distributed.any_process(True) and not distributed.any_process(False)
    assert distributed.from_first(lambda: 7) == 7
    with pytest.raises(ZeroDivisionError), distributed.together():
        _ = 1 / 0
    with distributed.joined():
        assert distributed.says_why()


def test_a_launcher_is_seen_before_anything_has_joined(monkeypatch: pytest.MonkeyPatch) -> None:
    assert (distributed.launched_processes(), distributed.job_id(), distributed.local_rank()) == (1, None, 0)
    for name, value in {"WORLD_SIZE": "4", "RANK": "3", "LOCAL_RANK": "1", "TORCHELASTIC_RUN_ID": "none"}.items():
        monkeypatch.setenv(name, value)
    assert (distributed.launched_processes(), distributed.launched_rank(), distributed.local_rank()) == (4, 3, 1)
    assert not distributed.says_why() and not distributed.is_restart()
    named = distributed.job_id()
    assert named is not None and str(os.getppid()) in named
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "job-17")
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    assert distributed.job_id() == "job-17" and distributed.is_restart()


def _sums() -> list[object]:
    rank = distributed.rank()
    floats = [torch.full((2, 3), float(rank + 1)), torch.tensor(10.0 * rank), torch.ones(3, 2).T]
    tensors = [*floats, torch.tensor([rank + 1])]
    distributed.all_reduce_sum(tensors)
    return [tensor.tolist() for tensor in tensors]


@pytest.mark.parametrize("text", ["10m", "-5", "0", "1.5", "\u0663"])
def test_a_time_of_waiting_that_is_none(monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv(distributed.TIMEOUT_VARIABLE, text)
    with pytest.raises(RequestError, match="RANKWISE_TIMEOUT_S must be a whole number of seconds"):
        distributed.join()


def test_two_processes_sum_flat(two_processes: Processes) -> None:
    first, second = two_processes(_sums)
    assert first == second == [[[3.0] * 3] * 2, 10.0, [[2.0] * 3] * 2, [3]]


def _exchanged() -> dict[str, object]:
    rank = distributed.rank()
    kept = torch.nn.Parameter(torch.full((2, 2), float(rank)))
    distributed.broadcast_from(1, [kept, torch.tensor([rank])])
    return {
        "broadcast": kept.tolist(),
        "gathered": distributed.gathered(f"process {rank}"),
        "at first": distributed.gathered_at_first(rank),
        "dealt": list(distributed.dealt("abcde")),
        "any": (distributed.any_process(rank == 1), distributed.any_process(False)),
        "from first": distributed.from_first(lambda: f"by {rank}"),
        "says": distributed.gathered(distributed.says_why()),
    }


def test_exchanges_agree_on_every_process(two_processes: Processes) -> None:
    first, second = two_processes(_exchanged)
    for name in ("broadcast", "gathered", "any", "from first"):
        assert first[name] == second[name], name
    assert first["broadcast"] == [[1.0, 1.0], [1.0, 1.0]] and first["gathered"] == ["process 0", "process 1"]
    assert (first["at first"], second["at first"]) == ([0, 1], None)
    assert (first["dealt"], second["dealt"]) == (["a", "c", "e"], ["b", "d"])
    assert first["any"] == (True, False) and first["from first"] == "by 0"
    assert sorted(first["says"]) == [False, True]


def _mistakes() -> list[tuple[str, str]]:
    """A mistake of the second process, of the first alone, of both, and one of another package's kinds."""
    rank = distributed.rank()
    found: list[tuple[str, str]] = []

    def note(action) -> None:
        try:
            action()
        except Exception as error:  # noqa: BLE001 (whatever it is, it is compared)
            found.append((type(error).__name__, str(error)))

    def second_fails() -> None:
        with distributed.together():
            if rank == 1:
                raise RequestError("rows of process 1 are bad")

    def first_fails() -> None:
        distributed.from_first(lambda: (_ for _ in ()).throw(WriteError("file", "disk full")))

    def both_fail() -> None:
        with distributed.together():
            raise WorkError(f"process {rank} is broken")

    def surprise() -> None:
        with distributed.together():
            if rank == 0:
                raise KeyError("strange")

    for action in (second_fails, first_fails, both_fail, surprise):
        note(action)
    assert distributed.gathered(rank) == [0, 1]  # all exchanges were finished
    return found


def test_a_mistake_of_one_is_raised_by_all(two_processes: Processes) -> None:
    first, second = two_processes(_mistakes)
    assert first[0] == second[0] == ("RequestError", "rows of process 1 are bad")
    assert first[1][0] == "WriteError" and second[1] == ("WorkError", first[1][1])
    assert (first[2], second[2]) == (("WorkError", "process 0 is broken"), ("WorkError", "process 1 is broken"))
    assert first[3][0] == "KeyError" and second[3] == ("WorkError", "KeyError: 'strange'")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.uint8, torch.int64])
def test_a_checksum_sees_a_bit_and_an_exchange(dtype: torch.dtype) -> None:
    tensor = torch.arange(1, 8).to(dtype)
    exchanged = tensor.clone()
    exchanged[[2, 5]] = exchanged[[5, 2]]
    changed = tensor.clone()
    changed.view(torch.uint8)[3] ^= 1
    sums = {distributed.checksum(t) for t in (tensor, exchanged, changed, tensor[:-1])}
    assert len(sums) == 4
    assert distributed.checksum(tensor.clone()) == distributed.checksum(tensor)
    assert distributed.checksum(torch.zeros(0)) == 0
    turned = torch.arange(6.0).view(2, 3).T
    assert distributed.checksum(turned) == distributed.checksum(turned.contiguous())


def test_a_checksum_of_several_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(distributed, "CHECKSUM_CHUNK", 4)
    tensor = torch.arange(10.0)
    swapped = tensor.clone()
    swapped[[1, 7]] = swapped[[7, 1]]
    assert distributed.checksum(tensor) != distributed.checksum(swapped)


def _out_of_step() -> list[str]:
    rank, found = distributed.rank(), []
    same = torch.ones(3)
    distributed.check_in_step({"same": same}, "at the start")
    for theirs in (
        {"same": same, "b": torch.tensor([1.0 + rank * 2**-20])},
        {"same": same[: 3 - rank]},
        {f"{rank}": same},
    ):
        try:
            distributed.check_in_step(theirs, "after step 3")
        except WorkError as error:
            found.append(error.message)
    return found


def test_processes_out_of_step_are_told(two_processes: Processes) -> None:
    first, second = two_processes(_out_of_step)
    assert first == second and len(first) == 3
    assert "after step 3: the processes have fallen out of step: 'b' of process 1 is not that of process 0" in first[0]
    assert "'same' of process 1" in first[1]
