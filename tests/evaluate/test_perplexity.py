from __future__ import annotations

import math

import pytest
import torch

from rankwise.data.example import Example
from rankwise.errors import RequestError, WorkError
from rankwise.evaluate.perplexity import Likelihood, measure_loss
from rankwise.train.objectives import TOKENS
from tests import tiny


def example(length: int, trained_from: int, seed: int) -> Example:
    ids = tuple(tiny.token_ids(1, length, seed)[0].tolist())
    labels = tuple(token if place >= trained_from else -100 for place, token in enumerate(ids))
    return Example(ids, labels, "", (), ids[:trained_from], "", "")


EXAMPLES = [example(9, 4, 1), example(30, 3, 2), example(5, 4, 3), example(17, 16, 4), example(12, 0, 5)]


def by_hand(model) -> tuple[float, int]:
    """transformers' own loss, row by row, weighted by trained tokens."""
    total, count = 0.0, 0
    for one in EXAMPLES:
        labels = torch.tensor([one.labels])
        num = int((labels[:, 1:] != -100).sum())
        with torch.no_grad():
            total += float(model(input_ids=torch.tensor([one.input_ids]), labels=labels).loss) * num
        count += num
    return total / count, count


@pytest.mark.parametrize("packing", [True, False], ids=["packed", "padded"])
@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma2", "mistral"])
def test_equals_transformers_own_loss(name, packing):
    model = tiny.CAUSAL_LMS[name]()
    loss, count = by_hand(model)
    for batch_size in (1, 2, 5):
        found = measure_loss(model, TOKENS, EXAMPLES, 259, batch_size, packing)
        assert found.loss == pytest.approx(loss, rel=1e-5)
        assert (found.num_units, found.num_examples) == (count, 5)
        assert found.perplexity == pytest.approx(math.exp(loss), rel=1e-4)


def test_nothing_is_left_behind(llama):
    llama.train()
    llama.model.layers[0].eval()  # each part has a mode of its own
    before = [module.training for module in llama.modules()]
    measure_loss(llama, TOKENS, EXAMPLES, 259, 2, True)
    assert [module.training for module in llama.modules()] == before
    assert all(parameter.grad is None for parameter in llama.parameters())


def test_dropout_is_off():
    model = tiny.gpt2()
    plain = measure_loss(model, TOKENS, EXAMPLES, 259, 2, False).loss
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.5
    model.train()
    assert measure_loss(model, TOKENS, EXAMPLES, 259, 2, False).loss == plain


def test_nothing_to_measure(llama):
    with pytest.raises(RequestError, match="nothing in the 1 examples is trained on"):
        measure_loss(llama, TOKENS, [example(6, 6, 1)], 259, 2, False)
    with pytest.raises(RequestError, match="batch_size must be at least 1, not 0"):
        measure_loss(llama, TOKENS, EXAMPLES, 259, 0, False)


def test_a_broken_model_is_said_so(llama):
    with torch.no_grad():
        llama.lm_head.weight.fill_(float("nan"))
    with pytest.raises(WorkError, match="the loss is nan"):
        measure_loss(llama, TOKENS, EXAMPLES, 259, 2, False)


def test_an_enormous_loss_has_an_infinite_perplexity():
    assert Likelihood(1e4, 1, 1).perplexity == math.inf
