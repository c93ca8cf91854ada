from __future__ import annotations

from typing import Any

import torch
from torch import nn

from rankwise import distributed
from rankwise.train.optim import load_optimizer_state, optimizer_state
from rankwise.train.optimizers import make_optimizer
from rankwise.train.shares import deal_out, is_shared, owned, share_state, whole_state
from tests.processes import Processes


def test_owners_carry_like_loads() -> None:
    sizes = [7, 1, 1, 1, 3, 3, 8, 2]
    owners = deal_out(sizes, 3)
    loads = [sum(size for size, owner in zip(sizes, owners, strict=True) if owner == process) for process in range(3)]
    assert sum(loads) == sum(sizes) and max(loads) - min(loads) <= 2
    assert deal_out([5, 5], 4) == [0, 1] and deal_out(sizes, 1) == [0] * len(sizes)


def test_alone_nothing_is_shared() -> None:
    parameters = {"a": nn.Parameter(torch.ones(2, 2))}
    optimizer = make_optimizer(parameters, 0.1, (0.9, 0.99), 0.0)
    share_state(optimizer)
    assert not is_shared(optimizer) and owned(optimizer, parameters) == parameters
    assert whole_state(optimizer, parameters) == {}


def _stepped(shared: bool) -> dict[str, Any]:
    """Five steps of four parameters of unlike size, then the state in one piece, and a step from that state."""
    generator = torch.Generator().manual_seed(0)
    parameters = {
        name: nn.Parameter(torch.randn(*shape, generator=generator))
        for name, shape in {"a": (3, 4), "b": (5,), "c": (2, 2), "d": (6, 3)}.items()
    }
    gradients = [{name: torch.randn(p.shape, generator=generator) for name, p in parameters.items()} for _ in range(6)]

    def step(optimizer: torch.optim.Optimizer, number: int) -> None:
        for name, parameter in parameters.items():
            parameter.grad = gradients[number][name].clone()
        optimizer.step()

    def fresh() -> torch.optim.Optimizer:
        optimizer = make_optimizer(parameters, 0.1, (0.9, 0.99), weight_decay=0.1)
        if shared:
            share_state(optimizer)
        return optimizer

    first = fresh()
    for number in range(5):
        step(first, number)
    gathered = whole_state(first, parameters)
    state = distributed.from_first(lambda: gathered)
    num_held = len(optimizer_state(first, parameters))
    again = fresh()
    load_optimizer_state(again, parameters, state, owned(again, parameters).keys())
    step(again, 5)
    return {
        "values": {name: p.detach().clone() for name, p in parameters.items()},
        "state": state,
        "held": (num_held, len(optimizer_state(again, parameters))),
    }


def test_shared_state_gives_the_same_bits_and_comes_back(two_processes: Processes) -> None:
    alone = _stepped(shared=False)
    found = two_processes(_stepped, True)
    for process in found:
        assert all(torch.equal(process["values"][name], value) for name, value in alone["values"].items())
        assert process["state"].keys() == alone["state"].keys()
        assert all(torch.equal(process["state"][name], value) for name, value in alone["state"].items())
    assert alone["held"] == (12, 12)
    assert [sum(held) for held in zip(*(process["held"] for process in found), strict=True)] == [12, 12]
    assert all(0 < held < 12 for process in found for held in process["held"])
