from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch import nn

from rankwise.errors import WorkError
from rankwise.train.optim import learning_rate, load_optimizer_state, optimizer_state
from rankwise.train.optimizers import make_optimizer


def rates(schedule: str, num_steps: int = 10, warmup: int = 0, floor: float = 0.0) -> list[float]:
    return [learning_rate(step, num_steps, 1.0, schedule, warmup, floor) for step in range(1, num_steps + 1)]


@pytest.mark.parametrize("schedule", ["constant", "linear", "cosine"])
def test_warmup_grows_to_the_rate_and_no_step_is_idle(schedule: str) -> None:
    found = rates(schedule, warmup=4)
    assert found[:4] == [0.25, 0.5, 0.75, 1.0]
    assert min(found) > 0


def test_constant() -> None:
    assert rates("constant") == [1.0] * 10


@pytest.mark.parametrize("schedule", ["linear", "cosine"])
@pytest.mark.parametrize("warmup", [0, 1, 4])
def test_decay_starts_at_the_rate_and_falls_to_the_floor(schedule: str, warmup: int) -> None:
    found = rates(schedule, num_steps=1000, warmup=warmup, floor=0.1)
    decay = found[max(warmup, 1) - 1 :]
    assert decay[0] == 1.0
    assert all(a > b for a, b in itertools.pairwise(decay))
    assert found[-1] == pytest.approx(0.1, abs=2e-3)


def test_linear_and_cosine_values() -> None:
    assert rates("linear", num_steps=4) == pytest.approx([1.0, 0.75, 0.5, 0.25])
    assert rates("cosine", num_steps=4)[2] == pytest.approx(0.5)
    assert rates("cosine", num_steps=4)[1] == pytest.approx(0.5 * (1 + math.cos(math.pi / 4)))


def test_one_step_runs_have_the_full_rate() -> None:
    assert rates("cosine", num_steps=1) == [1.0]


def parameters() -> dict[str, nn.Parameter]:
    torch.manual_seed(0)
    shapes = {"b": (3,), "A": (2, 3), "idle": (2,)}
    return {name: nn.Parameter(torch.randn(shape)) for name, shape in shapes.items()}


def test_only_matrices_decay() -> None:
    named = parameters()
    optimizer = make_optimizer(named, lr=0.1, betas=(0.9, 0.999), weight_decay=0.5)
    before = {name: parameter.detach().clone() for name, parameter in named.items()}
    for parameter in named.values():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    assert torch.equal(named["b"], before["b"])
    torch.testing.assert_close(named["A"].detach(), before["A"] * 0.95)


def test_state_goes_by_name() -> None:
    named = parameters()
    optimizer = make_optimizer(named, lr=0.1, betas=(0.9, 0.999), weight_decay=0.0)
    (named["b"].sum() + named["A"].square().sum()).backward()
    optimizer.step()
    state = optimizer_state(optimizer, named)
    assert set(state) == {f"{name}/{key}" for name in ("b", "A") for key in ("step", "exp_avg", "exp_avg_sq")}
    again = dict(reversed(parameters().items()))
    fresh = make_optimizer(again, lr=0.1, betas=(0.9, 0.999), weight_decay=0.0)
    load_optimizer_state(fresh, again, state)
    reloaded = optimizer_state(fresh, again)
    assert all(torch.equal(reloaded[key], value) for key, value in state.items())
    assert reloaded.keys() == state.keys()


def test_state_that_does_not_fit_is_refused() -> None:
    named = parameters()
    optimizer = make_optimizer(named, lr=0.1, betas=(0.9, 0.999), weight_decay=0.0)
    with pytest.raises(WorkError, match="'C', which this run does not train"):
        load_optimizer_state(optimizer, named, {"C/exp_avg": torch.zeros(3)})
    with pytest.raises(WorkError, match=r"shape \[4\], where the parameter.s \[3\] needs \[3\]"):
        load_optimizer_state(optimizer, named, {"b/exp_avg": torch.zeros(4)})
