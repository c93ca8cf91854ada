"""Models of the Hub: one quick question decides whether they can be had; then the cache, or one line."""

from __future__ import annotations

import logging
import time
from pathlib import Path

import pytest
import torch

from rankwise.errors import RequestError
from rankwise.models import hub
from rankwise.models.config import ModelConfig
from rankwise.models.load import check_task, load_config, load_model, load_tokenizer
from tests import tiny

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture(autouse=True)
def _asked_afresh():
    hub.is_cut_off.cache_clear()
    yield
    hub.is_cut_off.cache_clear()


@pytest.fixture
def cached(tmp_path, monkeypatch) -> str:
    """The id of a model whose revision `v1` lies in a Hub cache."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    repository = tmp_path / "models--someone--tiny"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "v1").write_text(COMMIT)
    tiny.llama().save_pretrained(repository / "snapshots" / COMMIT)
    tiny.tiny_tokenizer().save_pretrained(repository / "snapshots" / COMMIT)
    return "someone/tiny"


class Unreachable(Exception):
    """What a transport raises that knows nothing of ours."""


def cut_off(monkeypatch) -> list[str]:
    asked: list[str] = []

    def ask(url: str, timeout: float) -> None:
        asked.append(url)
        raise Unreachable("Name or service not known")

    monkeypatch.setattr(hub, "get_hf_file_metadata", ask)
    return asked


def test_without_network_the_cache_is_used_and_the_hub_is_asked_once(cached, monkeypatch):
    asked = cut_off(monkeypatch)
    config = ModelConfig(cached, "cpu", revision="v1")
    assert load_config(config).model_type == "llama"
    assert load_tokenizer(config).pad_token == "<|pad|>"
    assert load_model(config, torch.float32).name_or_path == cached
    folder = hub.snapshot(cached, "v1")
    assert folder is not None and folder.name == COMMIT and hub.snapshot(cached, "v2") is None
    assert asked == ["https://huggingface.co/someone/tiny/resolve/v1/config.json"]


def test_without_network_and_cache_it_is_one_quick_quiet_line(monkeypatch, caplog, capfd):
    cut_off(monkeypatch)
    started = time.perf_counter()
    with caplog.at_level(logging.INFO), pytest.raises(RequestError) as error:
        check_task(ModelConfig("nope", "cpu"), "causal-lm")
    assert time.perf_counter() - started < 2
    assert error.value.message.startswith("model 'nope' is neither a folder here nor in the local Hub cache")
    assert caplog.records == [] and capfd.readouterr() == ("", "")


def refused_by_the_hub(monkeypatch, kind: str, status: int) -> None:
    import huggingface_hub.errors

    def ask(url: str, timeout: float) -> None:
        error = getattr(huggingface_hub.errors, kind).__new__(getattr(huggingface_hub.errors, kind))
        error.args = (f"{status} Client Error",)
        error.response = type("Response", (), {"status_code": status})()
        raise error

    monkeypatch.setattr(hub, "get_hf_file_metadata", ask)


@pytest.mark.parametrize(
    ("kind", "status", "words"),
    [
        ("RepositoryNotFoundError", 404, "check the spelling of model.name"),
        ("GatedRepoError", 403, "is gated"),
        ("RevisionNotFoundError", 404, r"no revision 'v1' \(model.revision\)"),
        ("HfHubHTTPError", 503, "the Hub cannot be reached"),
    ],
)
def test_what_the_hub_answers(monkeypatch, kind, status, words):
    refused_by_the_hub(monkeypatch, kind, status)
    with pytest.raises(RequestError, match=words):
        load_config(ModelConfig("someone/nothing", revision="v1"))


def test_a_busy_hub_leaves_the_cache(cached, monkeypatch):
    refused_by_the_hub(monkeypatch, "HfHubHTTPError", 429)
    assert hub.is_cut_off(cached, "v1")


@pytest.mark.parametrize("name", ["demo", "folder"])
def test_a_revision_of_what_has_none(model_folder, monkeypatch, name):
    monkeypatch.setattr("rankwise.models.load.embedded_source", lambda name: "someone/on-the-hub")
    kind = "an embedded model" if name == "demo" else "a folder"
    name = name if name == "demo" else model_folder
    for load in (load_tokenizer, load_config, lambda config: load_model(config, torch.float32)):
        with pytest.raises(RequestError, match=rf"model.revision \(v1\) has no effect: .* is {kind}"):
            load(ModelConfig(name, "cpu", revision="v1"))


def test_an_encoder_is_said_to_be_one(tmp_path: Path):
    tiny.bert().save_pretrained(tmp_path)
    with pytest.raises(RequestError, match="is an encoder"):
        check_task(ModelConfig(str(tmp_path)), "causal-lm")
