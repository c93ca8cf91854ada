"""Operations that are counted, against formulas by hand: our own autograd functions, attention, whole cells."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from rankwise.adapters.config import LoraConfig
from rankwise.attach.inject import attach
from rankwise.recipes.bench_cell import run_cell
from rankwise.recipes.bench_flops import counted_flops, training_flops
from rankwise.recipes.run import build_run
from tests.recipes.trained import rows, run_document, save_model, write_rows

NUM_IN, NUM_OUT, RANK = 24, 40, 4


def lora_by_hand(num_rows, formed, needs_input):
    """Forward and backward of y = W x + s B A x: what `rankwise.adapters.fused` says that it computes."""
    dense, down, up = (2 * num_rows * a * b for a, b in ((NUM_IN, NUM_OUT), (NUM_IN, RANK), (RANK, NUM_OUT)))
    formed_weight = 2 * NUM_OUT * RANK * NUM_IN
    forward = dense + (formed_weight if formed else down + up)
    gradients = up + up + down + (down if formed else 0)  # of B, of A x, of A; A x again where it was not kept
    back = dense + (formed_weight if formed else down) if needs_input else 0
    return forward + gradients + back


@pytest.mark.parametrize("needs_input", [False, True])
@pytest.mark.parametrize(("num_rows", "formed"), [(8, False), (400, True)])
def test_one_adapted_linear(num_rows, formed, needs_input):
    model = nn.Sequential(nn.Linear(NUM_IN, NUM_OUT))
    attach(model, LoraConfig(r=RANK, target_modules=["0"]))
    x = torch.randn(num_rows, NUM_IN, requires_grad=needs_input)
    found = counted_flops(lambda: model(x).sum().backward())
    assert found == lora_by_hand(num_rows, formed, needs_input)


def test_a_plain_linear_and_products_in_place():
    layer, x, y = nn.Linear(NUM_IN, NUM_OUT), torch.randn(8, NUM_IN), torch.zeros(8, NUM_OUT)
    assert counted_flops(lambda: layer(x).sum().backward()) == 2 * 2 * 8 * NUM_IN * NUM_OUT
    assert counted_flops(lambda: y.addmm_(x, layer.weight.detach().T)) == 2 * 8 * NUM_IN * NUM_OUT


def test_attention_on_the_cpu():
    q, k, v = (torch.randn(2, 3, 16, 8, requires_grad=True) for _ in range(3))
    product = 2 * 2 * 3 * 16 * 16 * 8
    found = counted_flops(lambda: F.scaled_dot_product_attention(q, k, v).sum().backward())
    assert found == (2 + 5) * product  # scores and their sum; scores again and four gradients


@pytest.fixture(scope="module")
def text_run(tmp_path_factory):
    root = tmp_path_factory.mktemp("texts")
    model = save_model(root / "model")
    test = write_rows(root / "test.jsonl", rows(6, first=3))

    def build(ranks=None, **train):
        document = run_document(root, model, **{"steps": 4, "precision": "fp32", **train})
        document["data"] |= {"test": test, "packing": True}
        return build_run({**document, "ranks": ranks or {}})

    return build


def test_cells(text_run):
    """Full fine-tuning costs more than an adapter, which costs more than nothing; twice the steps, twice as much."""
    run = text_run()
    cells = {kind: run_cell(run, kind) for kind in ("adapter", "full", "base")}
    flops = {kind: training_flops(run, kind, cell["figures"]) for kind, cell in cells.items()}
    assert flops["full"] > flops["adapter"] > flops["base"] == 0
    tokens = cells["full"]["figures"]["tokens"]
    products = cells["full"]["figures"]["trainable_parameters"]
    assert flops["full"] == pytest.approx(6 * products * tokens, rel=0.5)  # embeddings are no product; attention is
    twice = {**cells["adapter"]["figures"], "tokens": 2 * cells["adapter"]["figures"]["tokens"]}
    assert training_flops(run, "adapter", twice) == pytest.approx(2 * flops["adapter"], abs=1)
    assert run_cell(run, "adapter") == cells["adapter"]  # counting has changed nothing


def test_ranks_that_move(text_run):
    """Growth adds half of what the new parameters cost at the end; a nested run costs less than one at its rank."""
    fixed = text_run({"policy": "fixed"})
    figures = run_cell(fixed, "adapter")["figures"]
    whole = training_flops(fixed, "adapter", figures)
    grown = text_run({"policy": "grow", "start": 4, "max": 8, "every": 1})
    at_start = training_flops(grown, "adapter", {**figures, "trainable_parameters": figures["trainable_parameters"]})
    more = training_flops(grown, "adapter", {**figures, "trainable_parameters": figures["trainable_parameters"] + 100})
    assert more - at_start == 6 * figures["tokens"] * 50
    assert training_flops(text_run({"policy": "nested"}), "adapter", figures) < whole
