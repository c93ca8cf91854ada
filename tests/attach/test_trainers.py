"""transformers' Trainer resumes and loads its best model; a reference without a second model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel, Trainer, TrainerCallback, TrainingArguments

from rankwise.adapters.config import LoraConfig
from rankwise.attach.checkpoint import load_adapter
from rankwise.attach.inject import adapter_parameters, attach
from rankwise.attach.trainers import BaseAlone, resumable
from rankwise.errors import RequestError
from tests import tiny
from tests.attach.attached_cases import IDS
from tests.attach.test_saving import Rows

pytestmark = pytest.mark.filterwarnings("ignore")


def model(**settings: Any) -> PreTrainedModel:
    torch.manual_seed(0)
    return attach(tiny.llama(), LoraConfig(r=2, lora_dropout=0.1, **settings))


def arguments(folder: Path, **settings: Any) -> TrainingArguments:
    return TrainingArguments(
        str(folder), max_steps=4, per_device_train_batch_size=2, learning_rate=0.01, save_steps=2, use_cpu=True,
        report_to=[], disable_tqdm=True, **settings,
    )  # fmt: skip


def tensors(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    return {name: parameter.detach().clone() for name, parameter in adapter_parameters(model).items()}


def test_a_resumed_trainer_ends_where_the_straight_one_does(tmp_path: Path) -> None:
    straight = model()
    Trainer(straight, arguments(tmp_path / "run"), train_dataset=Rows()).train()
    resumed = model()
    trainer = resumable(Trainer(resumed, arguments(tmp_path / "run"), train_dataset=Rows()))
    trainer.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-2"))
    assert trainer.state.global_step == 4
    for name, tensor in tensors(straight).items():
        assert torch.equal(tensor, adapter_parameters(resumed)[name]), name
        assert adapter_parameters(resumed)[name].requires_grad


class Spoiler(TrainerCallback):
    """Ruins the adapter after the first evaluation, so that the first checkpoint is the best."""

    def __init__(self, model: PreTrainedModel) -> None:
        self.model = model

    def on_step_begin(self, args: Any, state: Any, control: Any, **more: Any) -> None:
        if state.global_step == 2:
            with torch.no_grad():
                for parameter in adapter_parameters(self.model).values():
                    parameter.add_(3.0)


def test_the_best_model_is_loaded_at_the_end(tmp_path: Path) -> None:
    trained = model()
    settings = arguments(
        tmp_path, eval_strategy="steps", eval_steps=2, load_best_model_at_end=True, metric_for_best_model="eval_loss"
    )
    trainer = Trainer(trained, settings, train_dataset=Rows(), eval_dataset=Rows(), callbacks=[Spoiler(trained)])
    resumable(trainer).train()
    best = tmp_path / "checkpoint-2"
    assert trainer.state.best_model_checkpoint == str(best)
    expected = load_adapter(tiny.llama(), best)
    for name, tensor in tensors(trained).items():
        assert torch.equal(tensor, adapter_parameters(expected)[name]), name


def test_without_resumable_trainer_finds_no_model_and_says_so(tmp_path: Path) -> None:
    Trainer(model(), arguments(tmp_path), train_dataset=Rows()).train()
    with pytest.raises(ValueError, match="Can't find a checkpoint index"):
        Trainer(model(), arguments(tmp_path), train_dataset=Rows()).train(resume_from_checkpoint=True)


def test_an_adapter_that_is_saved_with_other_ranks_can_not_be_resumed(tmp_path: Path) -> None:
    Trainer(model(init_lora_weights="pissa"), arguments(tmp_path), train_dataset=Rows()).train()
    trainer = resumable(Trainer(model(init_lora_weights="pissa"), arguments(tmp_path), train_dataset=Rows()))
    with pytest.raises(RequestError, match=r"other ranks than the one in training.*pissa and olora"):
        trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))


def test_a_trainer_of_a_plain_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RequestError, match="no adapter is attached"):
        resumable(Trainer(tiny.llama(), arguments(tmp_path), train_dataset=Rows()))


def test_the_base_alone_is_the_base_and_holds_nothing() -> None:
    attached = model(init_lora_weights=False).eval()
    alone = BaseAlone(attached)
    assert list(alone.parameters()) == [] and list(alone.modules()) == [alone]
    with torch.no_grad():
        assert torch.equal(alone(input_ids=IDS).logits, tiny.llama()(input_ids=IDS).logits)
        assert not torch.equal(attached(input_ids=IDS).logits, tiny.llama()(input_ids=IDS).logits)
    with pytest.raises(RequestError, match="no adapter is attached"):
        BaseAlone(tiny.llama())
