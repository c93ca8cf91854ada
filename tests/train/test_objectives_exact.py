"""k micro batches equal one batch, and packed rows equal padded ones, for every objective."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from rankwise.adapters.config import LoraConfig
from rankwise.attach.inject import adapter_parameters, attach
from rankwise.data.config import DataConfig
from rankwise.data.labels import find_labels
from rankwise.data.loader import load_examples
from rankwise.train.batches import MicroBatches, RowOrder
from rankwise.train.config import TrainConfig
from rankwise.train.loop import accumulate
from rankwise.train.needs import NEEDS
from rankwise.train.objectives import objective_of
from tests import tiny
from tests.train.objective_cases import CASES

PAD = 259
NUM_ROWS = 7


def test_every_objective_has_a_case() -> None:
    assert set(CASES) == set(NEEDS)


def step(name: str, folder: Path, size: int, packing: bool) -> tuple[float, int, dict[str, torch.Tensor]]:
    """Loss, number of losses, and gradients of one step on seven rows, `size` at a time."""
    case, needs = CASES[name], NEEDS[name]
    path = str(case.write_rows(folder / "rows.jsonl", NUM_ROWS))
    tokenizer = tiny.tiny_tokenizer(case.chat_template)
    labels = find_labels(DataConfig(train=path))
    examples = load_examples(path, tokenizer, DataConfig(train=path), needs.layout, labels=labels).examples
    torch.manual_seed(0)
    model = attach(case.model(), LoraConfig(r=4, init_lora_weights=False, task_type=needs.task_type)).train()
    objective = objective_of(TrainConfig(objective=name))
    order = RowOrder(NUM_ROWS, NUM_ROWS, NUM_ROWS, seed=0)
    batches = MicroBatches(objective, examples, order, size, PAD, packing, torch.device("cpu"))(1)
    optimizer = torch.optim.AdamW(adapter_parameters(model).values())
    loss, num_trained, _ = accumulate(model, optimizer, batches, objective, 1)
    gradients = {key: p.grad for key, p in adapter_parameters(model).items() if p.grad is not None}
    return loss, num_trained, gradients


@pytest.mark.parametrize("name", CASES)
def test_micro_batches_and_packing_change_nothing(name: str, tmp_path: Path) -> None:
    whole = step(name, tmp_path, NUM_ROWS, packing=False)
    assert whole[1] > 0 and any(gradient.abs().max() > 0 for gradient in whole[2].values())
    ways = [(1, False), (3, False), *([(NUM_ROWS, True), (3, True)] if NEEDS[name].packs else [])]
    for size, packing in ways:
        loss, num_trained, gradients = step(name, tmp_path, size, packing)
        assert num_trained == whole[1]
        assert loss == pytest.approx(whole[0], rel=1e-6, abs=1e-6), (size, packing)
        assert gradients.keys() == whole[2].keys()
        for key, gradient in gradients.items():
            error = (gradient - whole[2][key]).norm() / whole[2][key].norm()
            assert float(error) < 1e-4, (key, size, packing, float(error))
