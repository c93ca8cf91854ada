"""`dpo` against equation 7 in float64, and against TRL's trainer."""

from __future__ import annotations

import copy
import math
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from transformers import PreTrainedModel

from rankwise.adapters.config import LoraConfig
from rankwise.attach.inject import adapter_parameters, attach, disabled, merge_in
from rankwise.data.example import Example
from rankwise.data.preference_batch import collate_preferences
from rankwise.errors import RequestError
from rankwise.models.batch import IGNORED
from rankwise.ranks.dynamic import set_ranks
from rankwise.train.config import TrainConfig
from rankwise.train.objective import means
from rankwise.train.objectives import objective_of, preference
from rankwise.train.preference import StartingAdapter
from tests import tiny

PAD = 259
BETA = 0.3


def pair(prompt: str, chosen: str, rejected: str) -> Example:
    sides = [[*prompt.encode(), *answer.encode(), 258] for answer in (chosen, rejected)]
    labels = [[IGNORED] * len(prompt) + ids[len(prompt) :] for ids in sides]
    return Example(
        input_ids=(*sides[0], *sides[1]), labels=(*labels[0], *labels[1]), text="", spans=(), prompt_ids=(),
        prompt_text=prompt, answer=chosen, parts=tuple(len(ids) for ids in sides),
    )  # fmt: skip


PAIRS = [pair("abc>", "cba", "x" * 9), pair("longer question>", "z", "yes"), pair("q>", "one two three", "four")]


def moved(seed: int, **settings: Any) -> PreTrainedModel:
    """A tiny Llama with an adapter away from its start."""
    model = attach(tiny.llama(initializer_range=0.2), LoraConfig(r=4, lora_alpha=8, **settings))
    move(model, seed)
    return model


def move(model: PreTrainedModel, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in adapter_parameters(model).values():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))


def log_probability(model: PreTrainedModel, ids: tuple[int, ...], labels: tuple[int, ...]) -> float:
    """Of the labelled tokens, from whole logits of the row alone, in float64."""
    with torch.no_grad():
        scores = model(input_ids=torch.tensor([ids])).logits[0].double().log_softmax(-1)
    return sum(float(scores[place - 1, label]) for place, label in enumerate(labels) if label != IGNORED)


def equation_7(policy: PreTrainedModel, reference: PreTrainedModel) -> tuple[list[float], list[float]]:
    """Losses and reward margins of the pairs."""
    losses, margins = [], []
    for example in PAIRS:
        cut = example.parts[0]
        sides = (example.input_ids[:cut], example.labels[:cut]), (example.input_ids[cut:], example.labels[cut:])
        gains = [log_probability(policy, *side) - log_probability(reference, *side) for side in sides]
        margins.append(BETA * (gains[0] - gains[1]))
        losses.append(-float(F.logsigmoid(torch.tensor(margins[-1], dtype=torch.float64))))
    return losses, margins


@pytest.mark.parametrize("packing", [True, False], ids=["packed", "padded"])
def test_equals_equation_7(packing: bool) -> None:
    model = moved(1)
    losses, margins = equation_7(model, tiny.llama(initializer_range=0.2))
    objective = preference(BETA)
    batch = collate_preferences(PAIRS, PAD, packing)
    found = objective.losses(model, batch)
    assert found.dtype == torch.float32 and found.requires_grad and objective.count(batch) == 3
    torch.testing.assert_close(found.tolist(), losses, rtol=1e-4, atol=1e-5)
    assert max(abs(loss - math.log(2)) for loss in losses) > 0.05
    sums: dict[str, list[float]] = {}
    objective.meter.pour(sums)
    figures = means(sums)
    assert figures["reward_margin"] == pytest.approx(sum(margins) / 3, abs=1e-4)
    assert figures["reward_accuracy"] == pytest.approx(sum(margin > 0 for margin in margins) / 3)
    assert figures["reward_chosen"] - figures["reward_rejected"] == pytest.approx(figures["reward_margin"], abs=1e-6)


@pytest.mark.parametrize("packing", [True, False], ids=["packed", "padded"])
def test_begins_at_log_2_to_the_last_bit(packing: bool) -> None:
    model = attach(tiny.llama(initializer_range=0.2), LoraConfig(r=4)).train()
    found = preference(BETA).losses(model, collate_preferences(PAIRS, PAD, packing))
    assert found.tolist() == [pytest.approx(math.log(2), abs=0, rel=1e-7)] * 3
    assert len(set(found.tolist())) == 1


def test_the_reference_has_no_dropout_and_leaves_the_mode_alone() -> None:
    model = moved(1, lora_dropout=0.5).train()
    batch = collate_preferences(PAIRS, PAD, False)
    torch.manual_seed(0)
    state = torch.get_rng_state()
    with disabled(model):
        pass
    preference(BETA).losses(model, batch).sum().backward()
    assert model.training and not torch.equal(torch.get_rng_state(), state), "the model itself drops out"


def test_an_adapter_that_was_gone_on_from_is_the_reference() -> None:
    model = moved(1)
    start = copy.deepcopy(model)
    reference = StartingAdapter(model)
    objective = preference(BETA, reference.in_place)
    batch = collate_preferences(PAIRS, PAD, True)
    assert objective.losses(model, batch).tolist() == [pytest.approx(math.log(2), rel=1e-7)] * 3
    move(model, 2)
    before = {name: parameter.detach().clone() for name, parameter in adapter_parameters(model).items()}
    losses, _ = equation_7(model, start)
    found = objective.losses(model, batch)
    torch.testing.assert_close(found.tolist(), losses, rtol=1e-4, atol=1e-5)
    found.sum().backward()
    for name, parameter in adapter_parameters(model).items():
        assert torch.equal(parameter, before[name]) and parameter.grad is not None, name
    assert max(abs(loss - other) for loss, other in zip(losses, equation_7(model, tiny.llama())[0], strict=True)) > 1e-3


def test_a_starting_adapter_of_other_ranks_is_refused() -> None:
    model = moved(1)
    reference = StartingAdapter(model)
    set_ranks(model, {"model.layers.0.self_attn.q_proj": 6})
    with pytest.raises(RequestError, match="ranks have changed since the run began"), reference.in_place(model):
        pass


def test_only_the_adapter_gets_gradients_and_no_second_model_is_held() -> None:
    model = moved(1)
    batch = collate_preferences(PAIRS, PAD, True)
    objective = objective_of(TrainConfig(objective="dpo", dpo_beta=BETA))
    before = sum(parameter.numel() for parameter in model.parameters())
    objective.losses(model, batch).mean().backward()
    assert sum(parameter.numel() for parameter in model.parameters()) == before
    trained = {id(parameter) for parameter in adapter_parameters(model).values()}
    assert all((parameter.grad is not None) == (id(parameter) in trained) for parameter in model.parameters())


def test_equals_trls_dpo_trainer(tmp_path: Path) -> None:
    """The merged model against the base, on the same tokens."""
    trl = pytest.importorskip("trl", reason="TRL is not installed (pip install trl datasets)")
    datasets = pytest.importorskip("datasets")
    model = moved(1)
    ours = preference(BETA).losses(model, collate_preferences(PAIRS, PAD, False)).mean()
    policy, reference = merge_in(copy.deepcopy(model)), tiny.llama(initializer_range=0.2)
    rows = datasets.Dataset.from_list([{"prompt": "a", "chosen": "b", "rejected": "c"}])
    args = trl.DPOConfig(
        output_dir=str(tmp_path), beta=BETA, use_cpu=True, bf16=False, report_to=[], disable_dropout=True,
        gradient_checkpointing=False, max_length=None,
    )  # fmt: skip
    trainer = trl.DPOTrainer(policy, reference, args, train_dataset=rows, processing_class=tiny.tiny_tokenizer())
    asked = [len(example.prompt_text) for example in PAIRS]
    features = [
        {"prompt_ids": list(ids[:length]), "chosen_ids": list(ids[length : example.parts[0]]),
         "rejected_ids": list(ids[example.parts[0] + length :])}
        for example, length in zip(PAIRS, asked, strict=True) for ids in [example.input_ids]
    ]  # fmt: skip
    theirs = trainer.compute_loss(trainer.model, trainer.data_collator(features))
    assert float(ours) == pytest.approx(float(theirs), abs=1e-5)
    assert abs(float(theirs) - math.log(2)) > 0.01
