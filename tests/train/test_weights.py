"""Losses with weights: sum(w l) / sum(w), whatever micro batches, packing and processes make of it."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from rankwise import distributed
from rankwise.adapters.config import LoraConfig
from rankwise.attach.inject import adapter_parameters, attach
from rankwise.data.example import Example
from rankwise.data.packing import collate
from rankwise.evaluate.perplexity import measure_loss
from rankwise.train.loop import accumulate
from rankwise.train.objectives import TOKENS
from tests import tiny
from tests.processes import Processes
from tests.train.rows import examples

PAD = 259


def weighted_rows() -> list[Example]:
    """Rows of several weights, of which one has two in one answer, and some none."""
    rows = examples(7)
    weights = {0: [(0.5, 0, None)], 2: [(0.1, 0, 2), (3.0, 2, None)], 5: [(0.75, 1, None)]}
    for number, runs in weights.items():
        start, end = len(rows[number].prompt_ids), len(rows[number].input_ids)
        found = tuple((start + a, end if b is None else start + b, w) for w, a, b in runs)
        rows[number] = dataclasses.replace(rows[number], weights=found)
    return rows


def model_of() -> torch.nn.Module:
    torch.manual_seed(0)
    return attach(tiny.llama(), LoraConfig(r=4, init_lora_weights=False)).train()


def by_hand(rows: list[Example]) -> tuple[float, dict[str, torch.Tensor]]:
    """In float64, a row at a time, from the model's own logits."""
    model = model_of().double()
    total, weight = torch.zeros((), dtype=torch.float64), 0.0
    for row in rows:
        logits = model(input_ids=torch.tensor([row.input_ids])).logits[0, :-1]
        own = torch.ones(len(row.input_ids), dtype=torch.float64)
        for first, last, value in row.weights:
            own[first:last] = value
        for place, label in enumerate(row.labels[1:]):
            if label != -100:
                total = total - own[place + 1] * logits[place].log_softmax(-1)[label]
                weight += float(own[place + 1])
    (total / weight).backward()
    gradients = {name: p.grad for name, p in adapter_parameters(model).items() if p.grad is not None}
    return float(total.detach()) / weight, gradients


def step(rows: list[Example], size: int, packing: bool, double: bool = False):
    model = model_of().double() if double else model_of()
    batches = [collate(rows[start : start + size], PAD, packing) for start in range(0, len(rows), size)]
    optimizer = torch.optim.SGD(adapter_parameters(model).values(), lr=0.1)
    loss, num_trained, _ = accumulate(model, optimizer, batches, TOKENS, 1)
    return loss, num_trained, {name: p.grad for name, p in adapter_parameters(model).items() if p.grad is not None}


@pytest.mark.parametrize("packing", [False, True], ids=["padded", "packed"])
@pytest.mark.parametrize("size", [1, 3, 7])
def test_a_step_is_the_formula(size: int, packing: bool) -> None:
    rows = weighted_rows()
    wanted, gradients = by_hand(rows)
    loss, num_trained, found = step(rows, size, packing, double=True)
    assert loss == pytest.approx(wanted, rel=1e-7)
    assert num_trained == sum(row.num_trained for row in rows)
    assert abs(wanted - by_hand(examples(7))[0]) > 1e-3  # the weights matter
    for name, gradient in gradients.items():
        assert float((found[name] - gradient).norm() / gradient.norm()) < 1e-5, name


def test_equal_weights_are_none_up_to_rounding_and_ones_to_the_bit() -> None:
    plain = step(examples(7), 3, True)
    for weight, bound in ((1.0, 0.0), (0.3, 1e-5)):
        rows = [dataclasses.replace(row, weights=((0, len(row.input_ids), weight),)) for row in examples(7)]
        found = step(rows, 3, True)
        assert found[0] == pytest.approx(plain[0], rel=bound, abs=0)
        for name, gradient in plain[2].items():
            assert float((found[2][name] - gradient).abs().max()) <= bound * float(gradient.abs().max()), name


@pytest.mark.parametrize("packing", [False, True], ids=["padded", "packed"])
def test_evaluation_weighs_alike(packing: bool) -> None:
    rows = weighted_rows()
    wanted, _ = by_hand(rows)
    for size in (1, 3, 7):
        found = measure_loss(model_of(), TOKENS, rows, PAD, size, packing)
        assert found.loss == pytest.approx(wanted, rel=1e-5)
        assert found.num_units == sum(row.num_trained for row in rows)


def share_of_a_step() -> tuple[float, int, dict[str, torch.Tensor]]:
    """This process's rows of the step: one has those of weight 3 and 0.1, the other those of 0.75."""
    return step(distributed.dealt(weighted_rows()), 2, packing=True, double=True)


def test_two_processes_make_the_same_step(two_processes: Processes) -> None:
    loss, num_trained, gradients = step(weighted_rows(), 7, packing=True, double=True)
    for found in two_processes(share_of_a_step):
        assert found[0] == pytest.approx(loss, rel=1e-12) and found[1] == num_trained
        for name, gradient in gradients.items():
            assert float((found[2][name] - gradient).norm() / gradient.norm()) < 1e-12, name
