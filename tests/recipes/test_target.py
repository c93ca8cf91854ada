from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from rankwise.errors import RequestError
from rankwise.recipes.target import find_adapter, find_target, open_target, target_tokenizer
from tests import tiny
from tests.recipes.trained import save_model, trained_run


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    return trained_run(tmp_path_factory.mktemp("target"))


@pytest.fixture
def lone_adapter(run, tmp_path) -> Path:
    """An adapter folder that no run stands around."""
    return Path(shutil.copytree(run / "adapter", tmp_path / "mine"))


def test_a_run_folder(run):
    target = find_target(str(run), device="cpu")
    assert (target.kind, target.adapter) == ("run", run / "adapter")
    assert target.model.name == str(run.parent / "model") and target.model.device == "cpu"
    assert target.data is not None and target.data.valid == str(run.parent / "valid.jsonl")


def test_an_adapter_inside_a_run_has_the_runs_data(run):
    target = find_target(str(run / "adapter"))
    assert target.kind == "adapter" and target.adapter == run / "adapter"
    assert target.data is not None and target.data.train == str(run.parent / "train.jsonl")


def test_an_adapter_alone_names_its_base(run, lone_adapter):
    target = find_target(str(lone_adapter))
    assert (target.kind, target.data, target.model.name) == ("adapter", None, str(run.parent / "model"))
    assert target.data_config("x.jsonl").train == "x.jsonl"


def test_a_revision_beside_a_folder_is_left_out(run, lone_adapter):
    """Others may write one there; only models of the Hub have revisions."""
    change_config(lone_adapter, revision="main")
    assert find_target(str(lone_adapter)).model.revision is None
    change_config(lone_adapter, base_model_name_or_path="owner/name")
    assert find_target(str(lone_adapter)).model.revision == "main"


def test_a_base_that_is_given_wins(lone_adapter, run):
    assert find_target(str(lone_adapter), base="demo").model.name == "demo"
    assert find_target(str(run), base="demo").model.name == "demo"


def test_a_model_folder_and_a_name(run):
    folder = str(run.parent / "model")
    assert find_target(folder).kind == "model" and find_target(folder).model.name == folder
    assert find_target("demo").model.name == "demo"
    assert find_target("owner/name").kind == "model"


def test_opening_attaches_the_adapter(run):
    opened = open_target(find_target(str(run), device="cpu"), "fp32")
    assert not opened.model.training and opened.precision == "fp32"
    assert not any(parameter.requires_grad for parameter in opened.model.parameters())
    assert opened.tokenizer.pad_token == "<|pad|>"


def test_the_adapters_own_tokenizer_comes_first(lone_adapter):
    assert target_tokenizer(find_target(str(lone_adapter))).chat_template == tiny.CHATML
    other = tiny.tiny_tokenizer("{{ messages }}")
    other.pad_token = None
    other.save_pretrained(lone_adapter)
    tokenizer = target_tokenizer(find_target(str(lone_adapter)))
    assert tokenizer.chat_template == "{{ messages }}" and tokenizer.pad_token == "<|pad|>"


def change_config(folder: Path, **fields):
    path = folder / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))


def test_what_can_not_be_a_target(run, lone_adapter, tmp_path):
    def message(name, **more):
        with pytest.raises(RequestError) as caught:
            find_target(str(name), **more)
        assert "\n" not in str(caught.value)
        return str(caught.value)

    assert "there is no folder './nope'" in message("./nope")
    assert f"there is no folder '{run.parent}/rum'; did you mean 'run'?" in message(run.parent / "rum")
    assert "nor is there '/nowhere'" in message("/nowhere/run")
    assert "is a file; give its folder" in message(run / "run.yaml")
    (tmp_path / "empty").mkdir()
    assert "it holds nothing" in message(tmp_path / "empty")
    assert "is no run (run.yaml), adapter (adapter_config.json) or model (config.json)" in message(run.parent)
    assert "is a model, not an adapter, so --base demo has no effect" in message(run.parent / "model", base="demo")
    assert "so --base demo has no effect" in message("owner/name", base="demo")
    change_config(lone_adapter, base_model_name_or_path="/gone/model")
    assert "is not at '/gone/model' any more; give it with --base" in message(lone_adapter)
    change_config(lone_adapter, base_model_name_or_path=None)
    assert "does not name its base model; give it with --base" in message(lone_adapter)


def test_a_run_that_is_not_finished(run, tmp_path):
    copied = Path(shutil.copytree(run, tmp_path / "half"))
    shutil.rmtree(copied / "adapter")
    with pytest.raises(RequestError, match=r"has no adapter yet; finish it with `rankwise train .*run.yaml --resume`"):
        find_target(str(copied))


def test_find_adapter_wants_an_adapter(run, tmp_path):
    assert find_adapter(str(run)).adapter == run / "adapter"
    with pytest.raises(RequestError, match="is a model without an adapter; give a run folder or an adapter folder"):
        find_adapter(save_model(tmp_path / "model"))
    with pytest.raises(RequestError, match="there is no run or adapter folder 'demo'"):
        find_adapter("demo")
