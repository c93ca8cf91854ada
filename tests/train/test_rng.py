from __future__ import annotations

import random

import numpy as np
import torch

from rankwise.train.rng import rng_state, seed_everything, set_rng_state, untouched
from tests import tiny

CPU = torch.device("cpu")


def draw() -> tuple[object, ...]:
    return (torch.rand(3).tolist(), random.random(), np.random.rand(), random.gauss(0, 1), np.random.randn())


def test_a_seed_fixes_every_generator() -> None:
    seed_everything(7)
    first = draw()
    seed_everything(7)
    assert draw() == first
    seed_everything(8)
    assert all(a != b for a, b in zip(draw(), first, strict=True))


def test_the_state_goes_on_where_it_was() -> None:
    seed_everything(1)
    draw()
    state = rng_state(CPU)
    assert all(tensor.dtype == torch.uint8 for tensor in state.values())
    expected = draw()
    draw()
    set_rng_state(state, CPU)
    assert draw() == expected


def test_untouched_leaves_modes_and_generators() -> None:
    model = tiny.llama().train()
    model.model.layers[0].eval()
    seed_everything(1)
    expected = draw()
    seed_everything(1)
    with untouched(model, CPU):
        assert not any(module.training for module in model.modules())
        assert not torch.is_grad_enabled()
        draw()
        model.train()
    assert draw() == expected
    assert model.training and not model.model.layers[0].mlp.training and model.model.layers[1].mlp.training
