"""The loss scale: what it saves in fp16, what a step that overflows leaves alone, and when it gives up."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import PreTrainedModel

from rankwise.adapters.config import LoraConfig
from rankwise.attach.inject import adapter_parameters, attach
from rankwise.errors import WorkError
from rankwise.models.attention import packing_mode
from rankwise.train.loop import LoopPlan, Progress, Step, accumulate, fit
from rankwise.train.objectives import TOKENS
from rankwise.train.optim import optimizer_state
from rankwise.train.scale import GROWTH_INTERVAL, INITIAL, LossScale
from rankwise.train.state import find_checkpoint, save_checkpoint
from tests import tiny
from tests.train.test_loop import adapted, optimizer_of, plan, split

TOO_HIGH = 2.0**127
"""Times a loss of some nats it is infinite in float32."""


def test_only_fp16_has_a_scale() -> None:
    assert LossScale.of("fp16") == LossScale(INITIAL, is_dynamic=True)
    for precision in ("fp32", "bf16"):
        scale = LossScale.of(precision)
        scale.update(1, False)
        assert scale == LossScale() and scale.figures() == {}


def test_it_halves_when_a_gradient_overflows_and_doubles_after_many_good_steps() -> None:
    scale = LossScale.of("fp16")
    for step in range(1, 5):
        scale.update(step, True)
    scale.update(5, False)
    assert (scale.factor, scale.good_steps, scale.skipped_steps) == (INITIAL / 2, 0, 1)
    for step in range(GROWTH_INTERVAL - 1):
        scale.update(step, True)
    assert scale.factor == INITIAL / 2
    scale.update(GROWTH_INTERVAL, True)
    assert (scale.factor, scale.good_steps) == (INITIAL, 0)
    assert scale.figures() == {"loss_scale": INITIAL, "skipped_steps": 1}


def test_it_gives_up_without_a_factor() -> None:
    scale = LossScale(1.0, is_dynamic=True, skipped_steps=16)
    with pytest.raises(WorkError, match=r"step 9: the gradients overflow fp16 even unscaled, 17 steps were skipped"):
        scale.update(9, False)


def test_a_power_of_two_leaves_no_trace() -> None:
    found = []
    for factor in (1.0, INITIAL):
        model = adapted().train()
        parameters = list(adapter_parameters(model).values())
        loss, _, _ = accumulate(model, optimizer_of(model), split(3, True), TOKENS, 1, factor)
        LossScale(factor, is_dynamic=True).unscale(parameters)
        found.append((loss, [parameter.grad for parameter in parameters]))
    assert found[0][0] == found[1][0]
    assert all(torch.equal(a, b) for a, b in zip(found[0][1], found[1][1], strict=True))


def gradients(model: PreTrainedModel, factor: float) -> torch.Tensor:
    parameters = list(adapter_parameters(model.train()).values())
    accumulate(model, optimizer_of(model), split(4, True), TOKENS, 1, factor)
    LossScale(factor, is_dynamic=True).unscale(parameters)
    return torch.cat([parameter.grad.flatten() for parameter in parameters])  # type: ignore[union-attr]


def test_small_gradients_survive_fp16_with_it_and_not_without() -> None:
    def small(dtype: torch.dtype) -> PreTrainedModel:
        model = tiny.llama().to(dtype)
        with torch.no_grad():
            model.lm_head.weight.mul_(1e-3)  # gradients that are zero in fp16
        attach(model, LoraConfig(r=4, lora_alpha=8))
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for parameter in adapter_parameters(model).values():
                parameter.copy_(0.05 * torch.randn(parameter.shape, generator=generator))
        return model

    wanted = gradients(small(torch.float32), 1.0)
    with_scale, without = (gradients(small(torch.float16), factor) for factor in (INITIAL, 1.0))
    assert with_scale.dtype == torch.float32
    assert (with_scale - wanted).norm() / wanted.norm() < 0.02
    assert (without - wanted).norm() / wanted.norm() > 0.1


def test_a_step_that_overflows_is_skipped_and_the_run_goes_on() -> None:
    model = adapted()
    optimizer = optimizer_of(model)
    fit(model, optimizer, lambda step: split(4, True), TOKENS, plan(1), Progress())
    before = {name: p.detach().clone() for name, p in adapter_parameters(model).items()}
    moments = copy.deepcopy(optimizer_state(optimizer, adapter_parameters(model)))
    progress = Progress(step=1, scale=LossScale(TOO_HIGH, is_dynamic=True))
    seen: list[Step] = []
    rates = LoopPlan(4, lambda step: 1e-3 * step, max_grad_norm=1.0)

    def look(step: Step) -> None:
        seen.append(step)
        if step.is_skipped:
            assert all(torch.equal(p, before[name]) for name, p in adapter_parameters(model).items())
            now = optimizer_state(optimizer, adapter_parameters(model))
            assert all(torch.equal(now[name], tensor) for name, tensor in moments.items())

    fit(model, optimizer, lambda step: split(4, True), TOKENS, rates, progress, [look])
    assert [step.number for step in seen] == [2, 3, 4] and [step.lr for step in seen] == [0.002, 0.003, 0.004]
    skipped = [step.is_skipped for step in seen]
    assert skipped[0] and not skipped[-1] and progress.scale.skipped_steps == sum(skipped)
    assert progress.scale.factor == TOO_HIGH / 2 ** sum(skipped)
    assert progress.num_trained_tokens == sum(step.num_trained_tokens for step in seen), "its rows count as read"
    assert any(not torch.equal(p, before[name]) for name, p in adapter_parameters(model).items())
    steps = [value for name, value in optimizer_state(optimizer, adapter_parameters(model)).items() if "/step" in name]
    assert {int(value) for value in steps} == {4 - sum(skipped)}


def test_without_a_scale_it_is_an_error() -> None:
    model, progress = adapted(), Progress(scale=LossScale(TOO_HIGH))
    with pytest.raises(WorkError, match="the gradient's norm is"):
        fit(model, optimizer_of(model), lambda step: split(4, True), TOKENS, plan(1), progress)


def test_a_loss_that_is_not_finite_is_an_error_in_fp16_too() -> None:
    model = adapted()
    packing_mode(model)  # proven while the numbers are finite
    with torch.no_grad():
        next(iter(adapter_parameters(model).values())).fill_(float("inf"))
    with pytest.raises(WorkError, match="step 1: the loss is nan"):
        fit(model, optimizer_of(model), lambda s: split(4, True), TOKENS, plan(1), Progress(scale=LossScale.of("fp16")))


def test_a_checkpoint_holds_it(tmp_path: Path) -> None:
    model = adapted()
    optimizer: torch.optim.Optimizer = optimizer_of(model)
    progress = Progress(scale=LossScale(2.0**12, True, 7, 3))
    fit(model, optimizer, lambda step: split(4, True), TOKENS, plan(2), progress)
    save_checkpoint(tmp_path, model, optimizer, progress, {}, None)
    checkpoint, _ = find_checkpoint(tmp_path)
    assert checkpoint is not None
    assert checkpoint.progress.scale == LossScale(2.0**12, True, 9, 3)
    assert checkpoint.progress == progress


def test_unscaling_passes_parameters_without_a_gradient() -> None:
    parameter = nn.Parameter(torch.ones(2))
    LossScale(4.0, True).unscale([parameter])
    assert parameter.grad is None
