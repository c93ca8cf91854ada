"""Classifiers under a gate: each task's own head, mixed and folded like the rest."""

from __future__ import annotations

import json

import pytest
import torch
from peft import PeftModel

import rankwise as rw
from rankwise.adapters.gate_config import GateConfig
from rankwise.attach.attachment import adapter_layers, need_attachment
from rankwise.attach.gates import parts_of, train_parts
from rankwise.attach.inject import adapter_parameters
from rankwise.errors import RequestError
from rankwise.recipes.fold import fold
from tests import tiny
from tests.attach.gate_cases import disturbed

CONFIG = rw.LoraConfig(r=3, lora_alpha=6, target_modules=["query", "value"], task_type="SEQ_CLS")
TASKS = ("films", "books")
IDS = tiny.token_ids(3, 9)


def logits(model):
    with torch.no_grad():
        return model(input_ids=IDS).logits


def close(a, b, to=1e-5):
    return float((a - b).abs().max()) <= to * float(b.abs().max())


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("heads")
    for seed, task in enumerate(TASKS):
        model = disturbed(rw.attach(tiny.bert_classifier(), CONFIG), seed)
        need_attachment(model).head = {"labels": ["a", "b", "c"], "multi_label": False}
        rw.save_adapter(model, root / task)
    return {task: str(root / task) for task in TASKS}


def alone(folders, task):
    return rw.load_adapter(tiny.bert_classifier(), folders[task])


def test_each_row_has_the_head_of_its_task(folders):
    model = rw.attach_gate(tiny.bert_classifier(), folders)
    singles = {task: logits(alone(folders, task)) for task in TASKS}
    assert not close(singles["films"], singles["books"], 0.01)
    for task in TASKS:
        with rw.on_task(model, task):
            assert close(logits(model), singles[task])
    rows = ("books", "films", "books")
    with rw.on_task(model, rows):
        mixed = logits(model)
    for row, task in enumerate(rows):
        assert close(mixed[row], singles[task][row])
    with pytest.raises(RequestError, match="needs one of"):
        logits(model)
    with rw.disabled(model):
        assert torch.equal(logits(model), logits(tiny.bert_classifier()))
    rw.detach(model)
    assert torch.equal(logits(model), logits(tiny.bert_classifier()))


def test_a_soft_gate_with_heads_learns_saves_merges_and_folds(folders, tmp_path):
    model = rw.attach_gate(tiny.bert_classifier(), folders, GateConfig("soft"))
    assert set(parts_of(model)) == {*(f"{part}:{task}" for part in ("adapters", "heads") for task in TASKS), "gate"}
    train_parts(model, ["gate", "heads:films"])
    trained = [name for name, p in adapter_parameters(model).items() if p.requires_grad]
    assert trained == ["classifier.weights.0", "classifier.biases.0", "rankwise_attachment.mixture.logits"]
    model(input_ids=IDS, labels=torch.tensor([0, 1, 2])).loss.backward()
    mixture = need_attachment(model).mixture
    assert mixture.logits.grad.abs().max() > 0
    mixture.logits.data += torch.tensor([0.9, -0.4])
    expected = logits(model)
    rw.save_adapter(model, tmp_path / "gate")
    again = rw.load_adapter(tiny.bert_classifier(), tmp_path / "gate")
    assert torch.equal(logits(again), expected)
    assert need_attachment(again).head == {"labels": ["a", "b", "c"], "multi_label": False}
    fold(str(tmp_path / "gate"), tmp_path / "folded")
    folded = rw.load_adapter(tiny.bert_classifier(), tmp_path / "folded")
    assert close(logits(folded), expected)
    assert json.loads((tmp_path / "folded" / "head.json").read_text())["labels"] == ["a", "b", "c"]
    theirs = PeftModel.from_pretrained(tiny.bert_classifier(), tmp_path / "folded")
    assert close(logits(theirs), expected)
    single = PeftModel.from_pretrained(tiny.bert_classifier(), tmp_path / "gate" / "books")
    assert close(logits(single), logits(alone(folders, "books")))
    assert close(logits(rw.merge(again)), expected)


def test_one_head_for_all_tasks_belongs_to_the_shared_adapter():
    own = CONFIG.with_(task_type=None)
    model = rw.attach_gate(tiny.bert_classifier(), {"a": own, "b": own}, shared=CONFIG)
    layer = adapter_layers(model)["classifier"]
    assert layer.names == ("shared",)
    with rw.on_task(model, ["a", "b", "a"]):
        assert close(logits(model), logits(tiny.bert_classifier()))
    embedded = rw.attach_embedding(tiny.bert_classifier(), CONFIG, ["a", "b"])
    with rw.on_task(embedded, ["a", "b", "a"]):
        assert close(logits(embedded), logits(tiny.bert_classifier()))


def test_heads_that_can_t_be_together(folders, tmp_path):
    with pytest.raises(RequestError, match="leave task_type and modules_to_save out of one"):
        rw.attach_gate(tiny.bert_classifier(), folders, shared=CONFIG)
    with pytest.raises(RequestError, match="adapter 'b' has no head"):
        rw.attach_gate(tiny.bert_classifier(), {"a": CONFIG, "b": CONFIG.with_(task_type=None)})
    other = disturbed(rw.attach(tiny.bert_classifier(), CONFIG), 5)
    need_attachment(other).head = {"labels": ["c", "b", "a"], "multi_label": False}
    rw.save_adapter(other, tmp_path / "other")
    with pytest.raises(RequestError, match="mean different classes"):
        rw.attach_gate(tiny.bert_classifier(), {"films": folders["films"], "other": tmp_path / "other"})


def test_heads_on_a_bf16_base_stay_fp32(folders):
    model = rw.attach_gate(tiny.bert_classifier().bfloat16(), folders)
    single = rw.load_adapter(tiny.bert_classifier().bfloat16(), folders["films"])
    with rw.on_task(model, "films"):
        assert logits(model).dtype == logits(single).dtype == torch.float32
        near = float((logits(model) - logits(single)).abs().max())
    with rw.on_task(model, "books"):
        assert near < 0.05 and float((logits(model) - logits(single)).abs().max()) > 4 * near
