"""What Hugging Face's Trainer, and TRL's on top of it, can't do with an attached model by themselves.

They train one as it is, and save its adapter folder, for they call its `save_pretrained`. Loading is another matter:
they look for a whole model, or for PEFT's classes. `resumable` gives one trainer the two loads of adapter folders.
`BaseAlone` is a reference model for trainers that compare with one: the same model, its adapter off.

Both touch a trainer from outside. The names that they rely on (`_load_from_checkpoint` and `_load_best_model` of
transformers 5.24) are Trainer's own and may change; the tests run them.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any, TypeVar

from torch import nn
from transformers import PreTrainedModel

from rankwise.attach.attachment import need_attachment
from rankwise.attach.checkpoint import load_adapter
from rankwise.attach.inject import disabled, ranks
from rankwise.errors import RequestError

if TYPE_CHECKING:
    from transformers import Trainer

    AnyTrainer = TypeVar("AnyTrainer", bound=Trainer)


def resumable(trainer: AnyTrainer) -> AnyTrainer:
    """Lets this trainer load adapters: `train(resume_from_checkpoint=...)` and `load_best_model_at_end` then work.

    Returns the same trainer. Optimizer, schedule, order of rows and random states are Trainer's own to restore.

    Raises: RequestError when no adapter is attached to its model; while resuming, when the checkpoint's adapter has
        other ranks than the model's, whose optimizer state then does not fit: `pissa` and `olora` are saved as plain
        LoRA of twice the rank.
    """
    model = trainer.model
    if not isinstance(model, nn.Module):
        raise RequestError("the trainer has no model")
    need_attachment(model)
    instance: dict[str, Any] = vars(trainer)
    instance["_load_from_checkpoint"] = partial(_load_from_checkpoint, trainer)
    instance["_load_best_model"] = partial(_load_best_model, trainer)
    return trainer


def _load_from_checkpoint(trainer: Trainer, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
    """In place of Trainer's, before it restores the optimizer."""
    attached = _model_of(trainer)
    before = ranks(attached)
    load_adapter(attached, resume_from_checkpoint, trainable=True)
    if ranks(attached) != before:
        raise RequestError(
            f"the adapter in '{resume_from_checkpoint}' has other ranks than the one in training, so its optimizer "
            "state does not fit (pissa and olora are saved with twice the rank); start afresh, or use `rankwise train`"
        )


def _load_best_model(trainer: Trainer) -> None:
    """In place of Trainer's, after training."""
    best = trainer.state.best_model_checkpoint
    assert best is not None, "Trainer loads the best model only when there is one"
    load_adapter(_model_of(trainer), best, trainable=True)


def _model_of(trainer: Trainer) -> PreTrainedModel:
    model: Any = trainer.model
    return model


class BaseAlone(nn.Module):
    """The base of an attached model, as a model of its own: called, it calls the model with its adapter off.

    It holds no weight and no copy. `GRPOTrainer` takes it as `ref_model` (set `beta` and it after the trainer is made,
    which otherwise loads a second base: see examples/grpo.py).

    Raises: RequestError when nothing is attached.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__()
        need_attachment(model)
        vars(self)["attached"] = model  # not as a submodule: its parameters are not this one's

    def forward(self, *inputs: Any, **named: Any) -> Any:  # whatever the model takes
        """What the model gives without its adapter."""
        model: PreTrainedModel = vars(self)["attached"]
        with disabled(model):
            return model(*inputs, **named)
