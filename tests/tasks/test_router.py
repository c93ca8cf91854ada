"""Finding tasks: the classifier against scikit-learn's formula by hand, on encoders and encoder-decoders."""

from __future__ import annotations

import pytest
import torch

import rankwise as rw
from rankwise.adapters.gate_config import GateConfig
from rankwise.attach.attachment import need_attachment
from rankwise.attach.inferring import pooled_states
from rankwise.errors import RequestError
from rankwise.tasks.router import fit_router, inferred_tasks, logistic_regression
from tests import tiny
from tests.attach.gate_cases import disturbed

LOW = [[place % 2 + 1] * (3 + place % 3) for place in range(20)]
HIGH = [[place % 2 + 200] * (3 + place % 3) for place in range(20)]


def gate_on(model, **more):
    config = rw.LoraConfig(r=2, lora_alpha=8, target_modules=more.pop("targets"), **more)
    return disturbed(rw.attach_gate(model, {"low": config, "high": config}, GateConfig("inferred")), 0, 0.3).eval()


def test_the_fit_is_the_minimum():
    """Its gradient, by autograd from the formula, is zero."""
    generator = torch.Generator().manual_seed(0)
    x = torch.empty(50, 6).normal_(generator=generator) * torch.tensor([1, 10, 0.1, 1, 1, 1.0])
    y = torch.randint(0, 3, (50,), generator=generator)
    y[:30] = 0  # tasks of different sizes
    W, b = (tensor.double() for tensor in logistic_regression(x, y, 3))
    scale, mean = x.double().std(0, correction=0), x.double().mean(0)
    W, b = (W * scale).requires_grad_(), (b + W @ mean).requires_grad_()
    logits = (x.double() - mean) / scale @ W.T + b
    counts = torch.bincount(y).double()
    importance = (1 / counts)[y]
    losses = torch.nn.functional.cross_entropy(logits, y, reduction="none")
    loss = (importance * losses).sum() / importance.sum() + W.square().sum() / (2 * len(x))
    gradients = torch.autograd.grad(loss, (W, b))
    assert all(float(gradient.abs().max()) < 1e-4 for gradient in gradients)
    assert float(losses.detach().mean()) < 1.0986, "better than chance"


def test_an_encoder_finds_tasks_as_it_reads():
    model = gate_on(tiny.bert_classifier(), targets=["query", "value"], task_type="SEQ_CLS")
    report = fit_router(model, {"low": LOW, "high": HIGH}, 259)
    assert report["accuracy"] == 1.0 and report["accuracy_by_task"] == {"low": 1.0, "high": 1.0}
    ids = torch.tensor([LOW[0][:3], HIGH[0][:3], LOW[3][:3]])
    with torch.no_grad():
        found = model(input_ids=ids).logits
        with rw.on_task(model, ["low", "high", "low"]):
            assert torch.equal(model(input_ids=ids).logits, found)
        with rw.on_task(model, "low"):
            assert not torch.allclose(model(input_ids=ids).logits, found)


def test_an_encoder_decoder_s_encoder_decides():
    model = gate_on(tiny.t5(), targets=["q", "v"])
    fit_router(model, {"low": LOW, "high": HIGH}, 259)
    ids = torch.tensor([LOW[0][:3], HIGH[0][:3]])
    settings = dict(max_new_tokens=6, do_sample=False, num_beams=2, attention_mask=torch.ones_like(ids))
    with torch.no_grad():
        found = model.generate(input_ids=ids, **settings)
        with rw.on_task(model, ["low", "high"]):
            assert torch.equal(model.generate(input_ids=ids, **settings), found)
    assert need_attachment(model).mixture.routing.inferred.tolist() == [0, 1]


def test_the_next_batch_is_inferred_anew():
    model = gate_on(tiny.llama(), targets="all-linear")
    fit_router(model, {"low": LOW, "high": HIGH}, 259)
    routing = need_attachment(model).mixture.routing
    with torch.no_grad():
        for rows, expected in ((HIGH, [1, 1]), (LOW, [0, 0]), ([LOW[0], HIGH[0]], [0, 1])):
            ids = torch.tensor([row[:3] for row in rows[:2]])
            model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=3, do_sample=False)
            assert routing.inferred.tolist() == expected == inferred_tasks(model, ids.tolist(), 259).tolist()


def test_what_is_pooled_is_the_base_s():
    model = gate_on(tiny.llama(), targets="all-linear").train()
    ids = tiny.token_ids()
    plain = tiny.llama().model(input_ids=ids)[0].mean(1)
    assert torch.allclose(pooled_states(model, ids), plain, atol=1e-6)
    assert model.training and all(layer.active for layer in model.modules() if hasattr(layer, "active"))


def test_before_it_is_fitted_it_says_so():
    model = gate_on(tiny.llama(), targets="all-linear")
    with pytest.raises(RequestError, match="has no classifier yet"), torch.no_grad():
        model(input_ids=tiny.token_ids())
    with pytest.raises(RequestError, match="no classifier that could infer"):
        inferred_tasks(model, [[1, 2]], 259)
    rw.detach(model)
    with torch.no_grad():
        assert torch.equal(model(input_ids=tiny.token_ids()).logits, tiny.llama()(input_ids=tiny.token_ids()).logits)
