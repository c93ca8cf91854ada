from __future__ import annotations

import warnings

import pytest
import torch

from rankwise.attach.inject import adapter_parameters
from rankwise.errors import RequestError
from rankwise.models import blocked
from rankwise.train import recompute
from rankwise.train.loop import accumulate
from rankwise.train.objectives import TOKENS
from rankwise.train.recompute import enable_gradient_checkpointing
from tests import tiny
from tests.train.test_loop import adapted, optimizer_of, split


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_gradient_checkpointing_changes_no_gradient(dropout: float) -> None:
    found = []
    for checkpointing in (False, True):
        model = adapted(lora_dropout=dropout).train()
        if checkpointing:
            enable_gradient_checkpointing(model)
        torch.manual_seed(5)
        accumulate(model, optimizer_of(model), split(4, True), TOKENS, 1)
        found.append({name: p.grad for name, p in adapter_parameters(model).items()})
    for name, gradient in found[0].items():
        assert gradient is not None and gradient.abs().max() > 0
        torch.testing.assert_close(found[1][name], gradient, atol=1e-7, rtol=1e-5)


def test_blocks_really_run_twice() -> None:
    model = adapted().train()
    accumulate(model, optimizer_of(model), split(8, True), TOKENS, 1)  # packing and loss look at the model once
    calls: list[int] = []
    model.get_submodule("model.layers.1.mlp").register_forward_pre_hook(lambda *_: calls.append(1))
    accumulate(model, optimizer_of(model), split(8, True), TOKENS, 1)
    assert len(calls) == 1
    enable_gradient_checkpointing(model)
    accumulate(model, optimizer_of(model), split(8, True), TOKENS, 1)
    assert len(calls) == 3


def test_it_is_turned_on_by_a_name_that_is_not_deprecated() -> None:
    model = adapted().train()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        enable_gradient_checkpointing(model)
    assert model.get_submodule("model.layers.0").gradient_checkpointing


def test_a_model_without_it_is_refused() -> None:
    model = tiny.llama()
    type(model).supports_gradient_checkpointing, before = False, type(model).supports_gradient_checkpointing
    try:
        with pytest.raises(RequestError, match=r"set train\.gradient_checkpointing=false"):
            enable_gradient_checkpointing(model)
    finally:
        type(model).supports_gradient_checkpointing = before


ATTENTION = "aten::_scaled_dot_product_flash_attention_for_cpu"


def attention_calls(packing: bool) -> int:
    """How often attention is entered in a step with checkpointing (a call that passes it on counts twice)."""
    model = adapted().train()
    accumulate(model, optimizer_of(model), split(8, packing), TOKENS, 1)  # packing and loss look at the model once
    enable_gradient_checkpointing(model)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as seen:
        accumulate(model, optimizer_of(model), split(8, packing), TOKENS, 1)
    calls = {event.key: event.count for event in seen.key_averages()}
    assert calls[f"{ATTENTION}_backward"] == 2 * (8 if packing else 1), "layers, and segments"
    return calls[ATTENTION]


@pytest.mark.parametrize("packing", [True, False])
def test_attention_is_not_computed_again(packing: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    kept = attention_calls(packing)
    monkeypatch.setattr(recompute, "KEPT", frozenset())
    assert kept == attention_calls(packing) - 2 * (8 if packing else 1)


def blocked_calls() -> int:
    """The same of attention by blocks, in bf16."""
    model = adapted().bfloat16().train()
    accumulate(model, optimizer_of(model), split(8, True), TOKENS, 1)
    enable_gradient_checkpointing(model)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as seen:
        accumulate(model, optimizer_of(model), split(8, True), TOKENS, 1)
    return {event.key: event.count for event in seen.key_averages()}["rankwise::blocked_attention"]


def test_attention_by_blocks_is_not_computed_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(blocked, "has_bf16_products", lambda: True)
    kept = blocked_calls()
    monkeypatch.setattr(recompute, "KEPT", frozenset())
    assert kept == blocked_calls() - 2 * 8
