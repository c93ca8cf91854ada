from __future__ import annotations

import dataclasses

import pytest
import torch
from transformers import PreTrainedModel

from rankwise.adapters import sharing
from rankwise.adapters.config import LoraConfig
from rankwise.adapters.dora import DoraLayer
from rankwise.attach.inject import adapter_parameters, attach
from rankwise.data.packing import collate
from rankwise.errors import WorkError
from rankwise.models.batch import Batch
from rankwise.train.loop import LoopPlan, Progress, Step, accumulate, clip_gradients, fit, take_step
from rankwise.train.objective import Objective
from rankwise.train.objectives import TOKENS
from rankwise.train.optimizers import make_optimizer
from rankwise.train.recompute import enable_gradient_checkpointing
from rankwise.train.watch import LossWatch
from tests import tiny
from tests.train.rows import example, examples

PAD = 259


def adapted(seed: int = 0, **settings: object) -> PreTrainedModel:
    """A tiny Llama with an adapter that is not at its start: A and B both have gradients."""
    model = attach(tiny.llama(), LoraConfig(r=4, lora_alpha=8, **settings))  # type: ignore[arg-type]
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in adapter_parameters(model).values():
            parameter.copy_(0.05 * torch.randn(parameter.shape, generator=generator))
    return model


def optimizer_of(model: PreTrainedModel, lr: float = 1e-2) -> torch.optim.Optimizer:
    return make_optimizer(adapter_parameters(model), lr, (0.9, 0.999), 0.0)


def plan(num_steps: int, lr: float = 1e-2, max_grad_norm: float | None = None) -> LoopPlan:
    return LoopPlan(num_steps, lambda step: lr, max_grad_norm)


def split(size: int, packing: bool) -> list[Batch]:
    rows = examples(8)
    return [collate(rows[start : start + size], PAD, packing) for start in range(0, len(rows), size)]


@pytest.mark.parametrize("packing", [True, False])
@pytest.mark.parametrize("size", [1, 3, 4])
def test_micro_batches_equal_the_big_batch(size: int, packing: bool) -> None:
    gradients, losses = [], []
    for rows in (8, size):
        model = adapted().train()
        loss, num_trained, num_tokens = accumulate(model, optimizer_of(model), split(rows, packing), TOKENS, 1)
        gradients.append({name: p.grad for name, p in adapter_parameters(model).items()})
        losses.append(loss)
        assert num_trained == sum(e.num_trained for e in examples(8))
        assert num_tokens == sum(len(e.input_ids) for e in examples(8))
    assert losses[0] == pytest.approx(losses[1], abs=1e-6)
    for name, whole in gradients[0].items():
        assert whole is not None and whole.abs().max() > 0
        error = (gradients[1][name] - whole).norm() / whole.norm()
        assert error < 1e-5, (name, float(error))
        torch.testing.assert_close(gradients[1][name], whole, atol=1e-6, rtol=0)


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_what_follows_from_parameters_is_made_once_a_step(
    checkpointing: bool, fused: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """DoRA's norms and bf16 factors, whatever the micro batches; a fused AdamW counts no versions."""
    formed: list[object] = []
    norm, stacked = DoraLayer._norm, sharing._stacked
    monkeypatch.setattr(DoraLayer, "_norm", lambda self: formed.append(self) or norm(self))
    monkeypatch.setattr(sharing, "_stacked", lambda p, dtype: formed.append(p) or stacked(p, dtype))
    model = attach(tiny.llama().bfloat16(), LoraConfig(r=4, use_dora=True))
    if checkpointing:
        enable_gradient_checkpointing(model)
    optimizer = torch.optim.AdamW(adapter_parameters(model).values(), fused=fused)
    progress, counts = Progress(), []
    for size in (8, 2, 2):
        formed.clear()
        take_step(model, optimizer, split(size, packing=False), TOKENS, plan(3), progress)
        counts.append(len(formed))
        assert len({id(item) for item in formed if isinstance(item, DoraLayer)}) == 14
    assert counts == [counts[0]] * 3


def test_the_mean_is_over_tokens_and_not_over_micro_batches() -> None:
    """Rows of very unlike length: a mean of means would be another loss."""
    rows = [example("a>", "b"), example("abc>", "cba" * 9)]
    model = adapted()
    parts = [collate([row], PAD, False) for row in rows]
    loss, _, _ = accumulate(model, optimizer_of(model), parts, TOKENS, 1)
    sums = [TOKENS.losses(model, part).sum().item() for part in parts]
    assert loss == pytest.approx(sum(sums) / 28, rel=1e-6)
    assert abs(loss - (sums[0] / 1 + sums[1] / 27) / 2) > 1e-3


def test_trains_the_adapter_and_nothing_else() -> None:
    model = adapted()
    base = {name: p.detach().clone() for name, p in model.named_parameters() if not p.requires_grad}
    before = {name: p.detach().clone() for name, p in adapter_parameters(model).items()}
    optimizer = optimizer_of(model)
    losses: list[float] = []
    fit(model, optimizer, lambda step: split(4, True), TOKENS, plan(20), Progress(), [lambda s: losses.append(s.loss)])
    assert losses[-1] < 0.97 * losses[0]
    assert all(not torch.equal(p, before[name]) for name, p in adapter_parameters(model).items())
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            assert torch.equal(parameter, base[name]) and parameter.grad is None
    assert set(optimizer.state) == set(adapter_parameters(model).values())


def test_hooks_run_in_order_after_each_step_with_the_gradients_gone() -> None:
    model = adapted()
    calls: list[tuple[str, int]] = []

    def first(step: Step) -> None:
        assert all(p.grad is None for p in model.parameters())
        calls.append(("first", step.number))
        step.metrics["x"] = 1.0

    def second(step: Step) -> None:
        assert step.metrics == {"x": 1.0}
        assert step.is_last == (step.number == 5)
        calls.append(("second", step.number))

    progress = Progress(step=3)
    fit(model, optimizer_of(model), lambda step: split(8, True), TOKENS, plan(5), progress, [first, second])
    assert calls == [("first", 4), ("second", 4), ("first", 5), ("second", 5)]
    assert progress.step == 5
    assert progress.num_tokens == 2 * sum(len(e.input_ids) for e in examples(8))
    assert progress.train_s > 0


def test_the_rate_of_each_step_is_used() -> None:
    model = adapted()
    seen: list[float] = []
    steps = LoopPlan(3, lambda step: step / 1000)
    optimizer = optimizer_of(model)
    fit(model, optimizer, lambda step: split(8, True), TOKENS, steps, Progress(), [lambda s: seen.append(s.lr)])
    assert seen == [0.001, 0.002, 0.003]
    assert all(group["lr"] == 0.003 for group in optimizer.param_groups)


def test_clipping_is_torchs() -> None:
    torch.manual_seed(0)
    shapes = [(3, 4), (5,), (2,)]
    ours = [torch.nn.Parameter(torch.zeros(shape)) for shape in shapes]
    theirs = [torch.nn.Parameter(torch.zeros(shape)) for shape in shapes[:2]]  # the third has no gradient
    for mine, other in zip(ours, theirs, strict=False):
        mine.grad = torch.randn(mine.shape)
        other.grad = mine.grad.clone()
    norm = clip_gradients(ours, 0.5)
    assert norm == pytest.approx(float(torch.nn.utils.clip_grad_norm_(theirs, 0.5)))
    assert all(torch.equal(a.grad, b.grad) for a, b in zip(ours, theirs, strict=False))  # type: ignore[arg-type]
    assert clip_gradients(ours, None) == pytest.approx(0.5, rel=1e-4)
    assert clip_gradients(ours, 0) == pytest.approx(0.5, rel=1e-4)


def failing(loss: float) -> Objective:
    def losses(model: PreTrainedModel, batch: Batch) -> torch.Tensor:
        return TOKENS.losses(model, batch) * loss

    return dataclasses.replace(TOKENS, losses=losses)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_loss_that_is_not_finite_stops_before_the_weights_change(value: float) -> None:
    model = adapted()
    before = {name: p.detach().clone() for name, p in adapter_parameters(model).items()}
    progress = Progress()
    with pytest.raises(WorkError, match=r"step 1: the loss is (nan|inf); lower train.lr"):
        fit(model, optimizer_of(model), lambda step: split(8, True), failing(value), plan(3), progress)
    assert progress.step == 0
    assert all(torch.equal(p, before[name]) for name, p in adapter_parameters(model).items())


def test_a_step_without_a_label_stops() -> None:
    model = adapted()
    silent = example("only a question", "")
    with pytest.raises(WorkError, match=r"step 1: not one of its 15 tokens is trained on.*data preview"):
        fit(model, optimizer_of(model), lambda step: [collate([silent], PAD, True)], TOKENS, plan(1), Progress())


def test_a_micro_batch_without_a_label_is_passed_over() -> None:
    model = adapted()
    parts = [collate([example("only a question", "")], PAD, True), collate([example("a>", "b")], PAD, True)]
    loss, num_trained, num_tokens = accumulate(model, optimizer_of(model), parts, TOKENS, 1)
    assert (num_trained, num_tokens) == (1, 18)
    assert loss == pytest.approx(TOKENS.losses(model, parts[1]).sum().item(), rel=1e-6)


def test_a_loss_without_a_gradient_stops() -> None:
    model = adapted()
    detached = dataclasses.replace(TOKENS, losses=lambda m, b: TOKENS.losses(m, b).detach())
    with pytest.raises(WorkError, match="does not depend on the adapter"):
        fit(model, optimizer_of(model), lambda step: split(8, True), detached, plan(1), Progress())


def test_an_adapter_that_gets_no_gradient_stops() -> None:
    model = adapted()
    zero = dataclasses.replace(TOKENS, losses=lambda m, b: TOKENS.losses(m, b) * 0)
    with pytest.raises(WorkError, match=r"no gradient reaches the adapter.*target_modules"):
        fit(model, optimizer_of(model), lambda step: split(8, True), zero, plan(1), Progress())


def test_divergence_stops() -> None:
    watch = LossWatch()
    for step in range(50):
        watch.check(step, 2.0 - step / 100)
    for step in range(50, 69):
        watch.check(step, 9.0)
    with pytest.raises(WorkError, match=r"step 69: the loss has diverged.*lower train.lr"):
        watch.check(69, 9.0)


def test_single_hard_batches_are_no_divergence() -> None:
    watch = LossWatch()
    for step in range(300):
        watch.check(step, 30.0 if step % 15 == 0 else 1.0)
        watch.check(step, 0.01)


def test_a_real_run_with_an_absurd_rate_stops() -> None:
    """On the head: inside the model the norms keep this random model's loss near ln V whatever the weights are."""
    model = adapted(target_modules=["lm_head"])
    with pytest.raises(WorkError, match="step 21: the loss has diverged"):
        fit(model, optimizer_of(model), lambda step: split(8, True), TOKENS, plan(200, lr=30.0), Progress())
