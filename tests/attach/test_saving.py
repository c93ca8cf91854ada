"""An attached model can't be saved wrongly: save_pretrained, push_to_hub and Trainer checkpoints hold the adapter."""

from __future__ import annotations

import inspect
from pathlib import Path

import huggingface_hub
import pytest
import torch
from torch.utils.data import Dataset
from transformers import PreTrainedModel, Trainer, TrainingArguments

from rankwise.adapters.config import LoraConfig
from rankwise.attach.checkpoint import load_adapter, save_adapter
from rankwise.attach.inject import adapter_parameters, attach, detach
from rankwise.errors import RequestError
from tests import tiny
from tests.attach.attached_cases import EVERYTHING, IDS, attached, inputs_of
from tests.attach.peft_cases import randomise
from tests.attach.snapshots import logits, relative

ADAPTER = {"adapter_config.json", "adapter_model.safetensors"}


def files(folder: Path) -> set[str]:
    return {file.name for file in folder.iterdir()}


@pytest.mark.parametrize("what", EVERYTHING)
def test_save_pretrained_writes_the_adapter_folder(what, tmp_path):
    model = attached(what)
    model.save_pretrained(tmp_path / "saved")
    save_adapter(model, tmp_path / "expected")
    assert files(tmp_path / "saved") == ADAPTER
    for name in ADAPTER:
        assert (tmp_path / "saved" / name).read_bytes() == (tmp_path / "expected" / name).read_bytes()
    plain = EVERYTHING[what][0]()
    again = load_adapter(plain, tmp_path / "saved")
    assert relative(logits(again, **inputs_of(again)), logits(model, **inputs_of(model))) < 1e-6


def test_save_pretrained_refuses_what_it_would_not_do(tmp_path):
    model = attach(tiny.llama(), LoraConfig(r=2))
    with pytest.raises(RequestError, match=r"call push_to_hub\(repo_id\) of the attached model instead"):
        model.save_pretrained(tmp_path, push_to_hub=True)
    for wrong, words in (
        ({"safe_serialization": False}, r"save_pretrained\(safe_serialization=False\).*never as pickle"),
        ({"save_peft_format": False}, "PEFT's format and no other"),
        ({"variant": "fp16"}, r"variant='fp16'.*one name"),
        ({"max_shard": "1GB"}, "takes no 'max_shard'; did you mean 'max_shard_size'"),
    ):
        with pytest.raises(RequestError, match=words):
            model.save_pretrained(tmp_path, **wrong)
    model.save_pretrained(tmp_path / "other-process", is_main_process=False)
    assert not (tmp_path / "other-process").exists() and files(tmp_path) == set()


def test_save_pretrained_takes_what_transformers_own_callers_pass(tmp_path):
    model = attach(tiny.llama(), LoraConfig(r=2))
    stock = inspect.signature(PreTrainedModel.save_pretrained).parameters
    named = {name: p.default for name, p in stock.items() if p.default is not inspect.Parameter.empty}
    model.save_pretrained(tmp_path / "stock", **named)
    model.save_pretrained(tmp_path / "trainer", state_dict=model.state_dict(), safe_serialization=True)
    assert files(tmp_path / "stock") == files(tmp_path / "trainer") == ADAPTER


def test_a_detached_model_saves_itself_again(tmp_path):
    detach(attach(tiny.llama(), LoraConfig(r=2))).save_pretrained(tmp_path)
    assert "model.safetensors" in files(tmp_path) and not files(tmp_path) & ADAPTER


def test_push_to_hub_uploads_the_adapter_folder(monkeypatch):
    calls: dict[str, object] = {}

    class Api:
        def __init__(self, token=None):
            calls["token"] = token

        def create_repo(self, repo_id, private=None, exist_ok=False):
            calls["repo"] = (repo_id, private, exist_ok)

        def upload_folder(self, *, repo_id, folder_path, commit_message, revision):
            calls["files"] = files(Path(folder_path))
            calls["commit"] = (repo_id, commit_message, revision)
            calls["folder"] = folder_path
            return "https://example.org/commit/1"

    monkeypatch.setattr(huggingface_hub, "HfApi", Api)
    model = attach(tiny.llama(), LoraConfig(r=2))
    address = model.push_to_hub("someone/adapter", commit_message="first", private=True, token="secret", revision="dev")
    assert address == "https://example.org/commit/1"
    assert calls["files"] == ADAPTER
    assert calls["token"] == "secret" and calls["repo"] == ("someone/adapter", True, True)
    assert calls["commit"] == ("someone/adapter", "first", "dev")
    assert not Path(str(calls["folder"])).exists()
    with pytest.raises(RequestError, match="push_to_hub of an attached model takes no 'tags'"):
        model.push_to_hub("someone/adapter", tags=["lora"])


class Rows(Dataset):
    def __len__(self) -> int:
        return 8

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        ids = tiny.token_ids(1, 9, seed=index)[0]
        return {"input_ids": ids, "labels": ids}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("checkpointing", [False, True], ids=["plain", "checkpointing"])
def test_the_trainer_of_transformers_trains_and_saves_the_adapter(checkpointing, tmp_path):
    model = attach(tiny.llama(), LoraConfig(r=2))
    base = {name: p.detach().clone() for name, p in tiny.llama().named_parameters()}
    start = {name: p.detach().clone() for name, p in adapter_parameters(model).items()}
    arguments = TrainingArguments(
        str(tmp_path), max_steps=2, per_device_train_batch_size=2, learning_rate=0.01, save_steps=2, use_cpu=True,
        report_to=[], disable_tqdm=True, gradient_checkpointing=checkpointing,
    )  # fmt: skip
    Trainer(model, arguments, train_dataset=Rows()).train()
    assert all(not torch.equal(p, start[name]) for name, p in adapter_parameters(model).items())
    folder = tmp_path / "checkpoint-2"
    assert files(folder) >= ADAPTER | {"trainer_state.json", "optimizer.pt"}
    assert not [name for name in files(folder) if name.startswith(("model", "pytorch_model"))]
    assert (folder / "adapter_model.safetensors").stat().st_size < 40_000
    model.eval()
    again = load_adapter(tiny.llama(), folder)
    assert relative(logits(again, input_ids=IDS), logits(model, input_ids=IDS)) < 1e-6
    plain = detach(model)
    assert all(torch.equal(p, base[name]) for name, p in plain.named_parameters())


@pytest.mark.filterwarnings("ignore")
def test_a_folder_inside_disabled_holds_the_adapter_and_not_the_base(tmp_path):
    from rankwise.attach.inject import disabled

    model = attached("modules-to-save")
    randomise(model, seed=2)
    save_adapter(model, tmp_path / "outside")
    with disabled(model):
        save_adapter(model, tmp_path / "inside")
    for name in ADAPTER:
        assert (tmp_path / "inside" / name).read_bytes() == (tmp_path / "outside" / name).read_bytes()
