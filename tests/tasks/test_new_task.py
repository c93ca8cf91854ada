"""A new task by its vector alone: it learns, and nothing else moves."""

from __future__ import annotations

import pytest
import torch

import rankwise as rw
from rankwise.adapters.gate_config import EmbeddingConfig
from rankwise.attach.gates import tasks_of
from rankwise.attach.inject import adapter_tensors
from rankwise.errors import RequestError, WorkError
from rankwise.tasks.new_task import learn_task
from tests import tiny
from tests.attach.gate_cases import disturbed

IDS = tiny.token_ids(4, 9)


def embedded(per="layer"):
    """Always the same numbers."""
    torch.manual_seed(0)
    model = rw.attach_embedding(tiny.llama(), rw.LoraConfig(r=4, lora_alpha=8), ["a", "b"], EmbeddingConfig(per))
    return disturbed(model, 0, 0.3)


@pytest.mark.parametrize("per", ["layer", "shared"])
def test_only_the_new_vector_moves_and_the_loss_falls(per, tmp_path):
    model = embedded(per)
    before = {name: tensor.detach().clone() for name, tensor in adapter_tensors(model).items()}
    teacher = embedded(per)
    vectors = teacher.rankwise_attachment.mixture.vectors
    start = (vectors[0].detach() + vectors[1].detach()) / 2
    vectors[0].data.copy_(start + torch.empty_like(start).uniform_(-0.4, 0.4))  # in reach of the new task's start
    with rw.on_task(teacher, "a"), torch.no_grad():
        target = teacher(input_ids=IDS).logits.softmax(-1)

    def loss(step):
        return torch.nn.functional.cross_entropy(model(input_ids=IDS).logits.flatten(0, 1), target.flatten(0, 1))

    learned = learn_task(model, "c", loss, steps=40)
    assert learned.parameters == (4 if per == "shared" else 4 * 14) and learned.share_of_adapter < 0.05
    assert tasks_of(model) == ("a", "b", "c")
    after = adapter_tensors(model)
    assert set(after) - set(before) == {"rankwise_attachment.mixture.vectors.2"}
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
    floor = float(torch.special.entr(target).sum(-1).mean())  # what the teacher's own vector would have
    assert learned.losses[-1] - floor < 0.1 * (learned.losses[0] - floor)
    rw.save_adapter(model, tmp_path / "out")
    again = rw.load_adapter(tiny.llama(), tmp_path / "out")
    with rw.on_task(again, "c"), rw.on_task(model, "c"), torch.no_grad():
        assert torch.equal(again(input_ids=IDS).logits, model(input_ids=IDS).logits)


def test_a_new_task_starts_as_the_mean():
    model = embedded()
    vectors = [vector.detach().clone() for vector in model.rankwise_attachment.mixture.vectors]
    vector = rw.add_task(model, "c")
    assert torch.allclose(vector, (vectors[0] + vectors[1]) / 2)
    assert [name for name, p in model.named_parameters() if p.requires_grad] == [
        "rankwise_attachment.mixture.vectors.2"
    ]


def test_what_can_t_be_added():
    model = embedded()
    with pytest.raises(RequestError, match="task 'a' is there twice"):
        rw.add_task(model, "a")
    with pytest.raises(RequestError, match="can't be used"):
        rw.add_task(model, "../x")
    with pytest.raises(RequestError, match="can't be added to a gate"):
        rw.add_task(rw.attach_gate(tiny.llama(), {"a": rw.LoraConfig(r=2), "b": rw.LoraConfig(r=2)}), "c")
    with pytest.raises(WorkError, match="the loss of step 1 is nan"):
        learn_task(model, "c", lambda step: model(input_ids=IDS).logits.sum() * float("nan"))
    assert tasks_of(model) == ("a", "b") and len(model.rankwise_attachment.mixture.vectors) == 2
