"""Models and tokenizers load from folders and the Hub's cache; everything else is one line that says what to do."""

import json
import shutil
from pathlib import Path

import pytest
import torch
import transformers
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers.utils import logging as transformers_logging

from rankwise.errors import RequestError
from rankwise.models import load
from rankwise.models.config import ModelConfig
from rankwise.models.load import TASKS, choose_device, load_model, load_tokenizer, resolve
from rankwise.models.quiet import quietly
from tests import tiny


def refused(match: str, name: str | Path, task: str = "causal-lm", **settings) -> str:
    with pytest.raises(RequestError, match=match) as caught:
        load_model(ModelConfig(str(name), device="cpu", **settings), torch.float32, task)
    assert "\n" not in caught.value.message and str(caught.value) == caught.value.message
    return caught.value.message


def change_config(folder: str, **values) -> None:
    path = Path(folder) / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_loads_a_folder(model_folder, llama, dtype):
    model = load_model(ModelConfig(model_folder, device="cpu"), dtype)
    assert type(model) is type(llama) and model.dtype == dtype and not model.training
    assert all(parameter.requires_grad for parameter in model.parameters())  # attaching freezes, loading does not
    ids = tiny.token_ids()
    if dtype == torch.float32:
        assert torch.equal(model(ids).logits, llama(ids).logits)


@pytest.mark.parametrize("task", ["sequence-classification", "token-classification", "encoder"])
def test_loads_for_other_tasks(model_folder, task):
    assert type(load_model(ModelConfig(model_folder, device="cpu"), torch.float32, task)).__name__.startswith("Llama")


def test_loads_a_sequence_to_sequence_model(tmp_path):
    tiny.t5().save_pretrained(tmp_path)
    model = load_model(ModelConfig(str(tmp_path), device="cpu"), torch.float32, "seq2seq-lm")
    assert model.config.is_encoder_decoder


def test_refuses_what_is_not_a_task(model_folder):
    refused("task 'causal_lm' is unknown; did you mean 'causal-lm'", model_folder, "causal_lm")
    refused("is of type Llama, which cannot be used as AutoModelForSeq2SeqLM", model_folder, "seq2seq-lm")
    assert set(TASKS) == {"causal-lm", "seq2seq-lm", "sequence-classification", "token-classification", "encoder"}


def test_refuses_an_encoder_as_a_causal_model(tmp_path):
    tiny.bert().save_pretrained(tmp_path)
    refused("is an encoder", tmp_path)


def test_missing_folders(tmp_path):
    refused("there is no such folder", tmp_path / "none")
    refused("there is no such folder", "./none")
    refused("it has no config.json", tmp_path)
    (tmp_path / "adapter_config.json").write_text("{}")
    refused("an adapter, give the base model", tmp_path)
    refused("is a file", tmp_path / "adapter_config.json")
    refused("neither a folder nor a Hub id", "what is this")


def test_a_hub_model_that_is_not_cached_offline():
    message = refused("neither a folder here nor in the local Hub cache", "nobody/nothing")
    assert "hf download nobody/nothing" in message
    with pytest.raises(RequestError, match="neither a folder here nor in the local Hub cache"):
        load_tokenizer(ModelConfig("nobody/nothing"))


def test_a_folder_without_weights(model_folder):
    (Path(model_folder) / "model.safetensors").unlink()
    refused(r"no \*\.safetensors weights", model_folder)
    (Path(model_folder) / "pytorch_model.bin").write_bytes(b"")
    refused(r"only pickled weights \(pytorch_model.bin\).*convert them to safetensors", model_folder)


def test_damaged_weights(model_folder):
    weights = Path(model_folder) / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:5000])
    refused("damaged", model_folder)


def test_weights_that_disagree_with_the_config(model_folder):
    change_config(model_folder, num_hidden_layers=3)
    refused(r"no weights for model.layers.2\.\S+, .* and 6 more", model_folder)
    change_config(model_folder, num_hidden_layers=2, hidden_size=64)
    refused(r"weight lm_head.weight has shape \(260, 32\) in its file and \(260, 64\) by its config", model_folder)


def test_a_model_with_its_own_code_needs_permission(model_folder):
    change_config(model_folder, model_type="own", auto_map={"AutoConfig": "own.C", "AutoModelForCausalLM": "own.M"})
    refused("set model.trust_remote_code=true", model_folder)


def test_configs_that_cannot_be_read(model_folder):
    change_config(model_folder, model_type="nobodys")
    refused("does not know; upgrade transformers", model_folder)
    (Path(model_folder) / "config.json").write_text("{")
    refused("not a valid JSON", model_folder)


def test_the_tokenizer_keeps_its_pad_token(model_folder):
    tokenizer = load_tokenizer(ModelConfig(model_folder))
    assert tokenizer.pad_token == "<|pad|>" and tokenizer.padding_side == "right"
    assert tokenizer.chat_template == tiny.CHATML


@pytest.mark.parametrize(
    ("vocabulary", "eos", "pad"),
    [(["a", "<end>", "<pad>"], "<end>", "<pad>"), (["a", "<end>"], "<end>", "<end>"), (["a", "[PAD]"], None, "[PAD]")],
)
def test_a_pad_token_comes_from_the_vocabulary(model_folder, vocabulary, eos, pad):
    words = Tokenizer(WordLevel({word: index for index, word in enumerate(vocabulary)}, unk_token="a"))
    transformers.PreTrainedTokenizerFast(tokenizer_object=words, eos_token=eos).save_pretrained(model_folder)
    tokenizer = load_tokenizer(ModelConfig(model_folder))
    assert tokenizer.pad_token == pad and len(tokenizer) == len(vocabulary)
    assert tokenizer.pad_token_id == vocabulary.index(pad)


def test_a_tokenizer_that_cannot_pad(model_folder):
    words = Tokenizer(WordLevel({"a": 0}, unk_token="a"))
    transformers.PreTrainedTokenizerFast(tokenizer_object=words).save_pretrained(model_folder)
    with pytest.raises(RequestError, match="neither a pad nor an end token"):
        load_tokenizer(ModelConfig(model_folder))


def test_a_folder_without_a_tokenizer(model_folder):
    for file in Path(model_folder).glob("tokenizer*"):
        file.unlink()
    with pytest.raises(RequestError, match="no tokenizer in its folder"):
        load_tokenizer(ModelConfig(model_folder))


@pytest.mark.parametrize(
    ("there", "name", "device"),
    [
        (["cpu"], "auto", "cpu"),
        (["cpu", "cuda:0", "cuda:1"], "auto", "cuda:0"),
        (["cpu", "mps"], "auto", "mps"),
        (["cpu", "cuda:0", "cuda:1"], "cuda:1", "cuda:1"),
        (["cpu", "cuda:0"], "cuda", "cuda:0"),
        (["cpu"], "cpu", "cpu"),
    ],
)
def test_devices(monkeypatch, there, name, device):
    monkeypatch.setattr(load, "_devices", lambda: there)
    assert str(choose_device(name)) == device


@pytest.mark.parametrize(
    ("name", "match"),
    [
        ("cuda", "not available; this machine has cpu, mps"),
        ("cuda:3", "not available"),
        ("cpu:1", "not available"),
        ("cdua", "did you mean 'cuda'"),
        ("", "not a device"),
    ],
)
def test_devices_that_are_not_there(monkeypatch, name, match):
    monkeypatch.setattr(load, "_devices", lambda: ["cpu", "mps"])
    with pytest.raises(RequestError, match=match):
        choose_device(name)


def test_resolve_keeps_hub_ids(tmp_path, model_folder):
    assert resolve("owner/name.v1-2") == "owner/name.v1-2" and resolve("gpt2") == "gpt2"
    assert resolve(model_folder) == model_folder


def test_loading_prints_nothing(model_folder, capfd):
    shutil.copy(Path(model_folder) / "model.safetensors", Path(model_folder) / "copy.safetensors")
    load_model(ModelConfig(model_folder, device="cpu"), torch.float32, "sequence-classification")
    load_tokenizer(ModelConfig(model_folder))
    assert capfd.readouterr() == ("", "")


def test_quiet_returns_the_settings():
    transformers_logging.set_verbosity_info()
    transformers_logging.enable_progress_bar()
    with quietly():
        assert transformers_logging.get_verbosity() == transformers_logging.ERROR
    assert transformers_logging.get_verbosity() == transformers_logging.INFO
    assert transformers_logging.is_progress_bar_enabled()
    transformers_logging.set_verbosity_error()
