from __future__ import annotations

import multiprocessing
from pathlib import Path

import pytest
import torch

from rankwise import distributed


def test_one_process_sums_nothing() -> None:
    tensor = torch.tensor([1.0, 2.0])
    distributed.all_reduce_sum([tensor])
    assert tensor.tolist() == [1.0, 2.0]
    assert (distributed.rank(), distributed.world_size()) == (0, 1)


def test_a_launcher_is_seen_before_anything_has_joined(monkeypatch: pytest.MonkeyPatch) -> None:
    assert distributed.launched_processes() == 1
    monkeypatch.setenv("WORLD_SIZE", "4")
    assert distributed.launched_processes() == 4


def _one_of_two(rank: int, meeting: str, results) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=2)
    floats = [torch.full((2, 3), float(rank + 1)), torch.tensor(10.0 * rank), torch.ones(3, 2).T]
    tensors = [*floats, torch.tensor([rank + 1])]
    distributed.all_reduce_sum(tensors)
    results.put((distributed.rank(), [tensor.tolist() for tensor in tensors]))
    torch.distributed.destroy_process_group()


def test_two_processes_sum_flat(tmp_path: Path) -> None:
    context = multiprocessing.get_context("spawn")
    results = context.Queue()
    workers = [context.Process(target=_one_of_two, args=(rank, str(tmp_path / "meet"), results)) for rank in (0, 1)]
    for worker in workers:
        worker.start()
    found = dict(results.get(timeout=60) for _ in workers)
    for worker in workers:
        worker.join(timeout=60)
    assert found[0] == found[1] == [[[3.0] * 3] * 2, 10.0, [[2.0] * 3] * 2, [3]]
