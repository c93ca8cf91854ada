"""Wrong requests for a run: one line, and nothing left behind."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml
from filelock import FileLock, Timeout

from rankwise.cli.main import main
from rankwise.data.rows import BadRows
from rankwise.errors import RequestError
from rankwise.recipes import finetune
from rankwise.recipes.finetune import train
from rankwise.train.loop import Step
from tests import tiny
from tests.recipes.runs import adapter_bytes, settings


def test_an_output_folder_that_exists_is_refused(files: Path, straight: Path, tmp_path: Path) -> None:
    with pytest.raises(RequestError, match=r"exists; choose another output, or go on.*--resume"):
        train(settings(files, straight), quiet=True)
    (tmp_path / "mine.txt").write_text("precious")
    with pytest.raises(RequestError, match=r"has no run\.yaml: it is not a run's folder"):
        train(settings(files, tmp_path), resume=True, quiet=True)
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]


def test_a_folder_in_use_is_refused(files: Path, straight: Path) -> None:
    with FileLock(straight / ".lock"), pytest.raises(RequestError, match="in use by a run that is still going"):
        train(settings(files, straight), resume=True, quiet=True)


@pytest.mark.parametrize(
    ("changes", "kind", "words"),
    [
        ({"data": {"train": "bad.jsonl"}}, BadRows, ("bad.jsonl:2", "bad.jsonl:3")),
        ({"data": {"train": "bad.jsonl", "valid": "bad.jsonl"}}, BadRows, ("4 bad rows",)),
        ({"data": {"train": "gone.jsonl"}}, RequestError, ("gone.jsonl",)),
        ({"data": {"train": "text.jsonl"}}, RequestError, ("train.objective=text",)),
        ({"train": {"objective": "text", "samples": 0, "sample_tokens": None}}, RequestError, ("train.objective=sft",)),
        ({"adapter": {"target_modules": ["nonsense"]}}, RequestError, ("nonsense",)),
        ({"adapter": {"target_modules": "nonsense"}}, RequestError, ("adapter.target_modules expression 'nonsense'",)),
        ({"adapter": {"bias": "all"}, "train": {"precision": "fp32"}}, RequestError, ("adapter.bias='all' has no",)),
        ({"model": {"name": "./gone"}}, RequestError, ("gone",)),
        ({"model": {"device": "cuda:99"}}, RequestError, ("cuda:99",)),
        ({"train": {"warmup": 12}}, RequestError, ("train.warmup",)),
    ],
)
def test_a_wrong_request_leaves_nothing_behind(
    files: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    changes: dict[str, Any],
    kind: type[Exception],
    words: tuple[str, ...],
) -> None:
    monkeypatch.chdir(files)
    with pytest.raises(kind) as error:
        train(settings(files, tmp_path / "out", **changes), quiet=True)
    assert all(word in str(error.value) for word in words), str(error.value)
    assert not (tmp_path / "out").exists()


def test_rows_longer_than_the_model_are_refused(files: Path, tmp_path: Path) -> None:
    (tmp_path / "long.jsonl").write_text(json.dumps({"prompt": "a", "completion": "b" * 900}) + "\n")
    run = settings(files, tmp_path / "out", data={"train": str(tmp_path / "long.jsonl"), "max_length": 1000})
    with pytest.raises(RequestError, match=r"the model 512 positions; set data\.max_length=512"):
        train(run, quiet=True)


def test_an_output_is_needed(files: Path) -> None:
    run = settings(files, Path("unused"))
    del run["output"]
    with pytest.raises(RequestError, match="missing setting 'output'"):
        train(run, quiet=True)


def test_a_dropout_that_nothing_applies(files: Path, tmp_path: Path) -> None:
    adapter = {"target_modules": ["embed_tokens"], "lora_dropout": 0.1}
    with pytest.raises(RequestError, match=r"adapter\.lora_dropout \(0\.1\) has no effect: only embeddings"):
        train(settings(files, tmp_path / "out", adapter=adapter), quiet=True)
    assert not (tmp_path / "out").exists()
    both = {**adapter, "target_modules": ["embed_tokens", "q_proj"]}
    train(settings(files, tmp_path / "out", adapter=both, train={"steps": 2}), quiet=True)
    none = {**adapter, "lora_dropout": 0.0}
    train(settings(files, tmp_path / "none", adapter=none, train={"steps": 2}), quiet=True)


def test_an_adapter_of_another_task_is_not_gone_on_from(files: Path, straight: Path, tmp_path: Path) -> None:
    other = tmp_path / "classifier"
    shutil.copytree(straight / "adapter", other)
    config = json.loads((other / "adapter_config.json").read_text())
    (other / "adapter_config.json").write_text(json.dumps({**config, "task_type": "SEQ_CLS"}))
    run = settings(files, tmp_path / "out")
    run["adapter"] = {"from": str(other)}
    with pytest.raises(RequestError, match=r"task_type of '.*classifier' \(SEQ_CLS\) does not go with"):
        train(run, quiet=True)


def test_an_encoder_is_refused_before_its_tokenizer(files: Path, tmp_path: Path) -> None:
    """Its tokenizer has no end-of-text token either; that is not what is wrong with it."""
    tiny.bert().save_pretrained(tmp_path / "bert")
    tokenizer = tiny.tiny_tokenizer(None)
    tokenizer.eos_token = None
    tokenizer.save_pretrained(tmp_path / "bert")
    run = settings(files, tmp_path / "out", model={"name": str(tmp_path / "bert")})
    with pytest.raises(RequestError, match=r"\(bert\) is an encoder"):
        train(run, quiet=True)
    run_file = tmp_path / "run.yaml"
    run_file.write_text(yaml.safe_dump(run))
    for argv in (["data", "preview", run_file], ["evaluate", tmp_path / "bert", "--data", files / "valid.jsonl"]):
        assert main([*map(str, argv)]) == 2


def test_a_file_in_the_way_of_the_output(files: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Said at once: nothing is read or loaded first."""
    monkeypatch.setattr(finetune, "prepare", None)
    (tmp_path / "file").write_text("precious")
    for output in (tmp_path / "file" / "out", tmp_path / "file" / "deeper" / "out"):
        with pytest.raises(RequestError, match=r"can't be made: '.*/file' is not a folder; choose another"):
            train(settings(files, output), quiet=True)
    for name in ("x" * 300, "a\0b", "\ud800"):  # which the disk can't hold
        with pytest.raises(RequestError, match=r"can't be made: .*; choose another"):
            train(settings(files, tmp_path / name), quiet=True)
    with pytest.raises(RequestError, match="is a file; choose another folder"):
        train(settings(files, tmp_path / "file"), resume=True, quiet=True)
    assert (tmp_path / "file").read_text() == "precious"


def test_two_runs_into_one_folder(files: Path, straight: Path, tmp_path: Path) -> None:
    refused: list[str] = []

    def meanwhile(step: Step) -> None:
        if step.number == 5:
            for resume in (False, True):
                with pytest.raises(RequestError) as error:
                    train(settings(files, tmp_path / "out"), resume=resume, quiet=True)
                refused.append(error.value.message)

    train(settings(files, tmp_path / "out"), on_step=meanwhile, quiet=True)
    assert "exists; choose another output" in refused[0] and "in use by a run that is still going" in refused[1]
    assert adapter_bytes(tmp_path / "out") == adapter_bytes(straight)


@pytest.mark.parametrize("resume", [False, True])
def test_a_folder_that_appears_while_the_run_prepares_is_another_runs(
    files: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, resume: bool
) -> None:
    """Two processes started together: the slower one must not train beside the quicker one."""
    output = tmp_path / "out"
    prepare = finetune.prepare

    def slowly(*given: Any) -> Any:
        output.mkdir()
        (output / "run.yaml").write_text("the quicker run's")
        return prepare(*given)

    monkeypatch.setattr(finetune, "prepare", slowly)
    with pytest.raises(RequestError, match="another run made it; choose another output") as error:
        train(settings(files, output), resume=resume, quiet=True)
    assert error.value.code == 2
    assert [path.name for path in output.iterdir()] == ["run.yaml"]
    assert (output / "run.yaml").read_text() == "the quicker run's"


@pytest.mark.parametrize("resume", [False, True])
def test_a_run_trains_only_while_it_holds_its_folder(files: Path, tmp_path: Path, resume: bool) -> None:
    output, held = tmp_path / "out", []
    if resume:
        output.mkdir()

    def try_it(step: Step) -> None:
        with pytest.raises(Timeout), FileLock(output / ".lock", timeout=0):
            pass
        held.append(step.number)

    train(settings(files, output, train={"steps": 2}), on_step=try_it, resume=resume, quiet=True)
    assert held == [1, 2]


def test_a_resumed_run_holds_its_folder_while_it_prepares(
    files: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also when it began with an empty folder: a second `--resume` is refused before it reads anything."""
    output = tmp_path / "out"
    output.mkdir()
    prepare = finetune.prepare

    def meanwhile(*given: Any) -> Any:
        with pytest.raises(RequestError, match="in use by a run that is still going"):
            train(settings(files, output), resume=True, quiet=True)
        return prepare(*given)

    monkeypatch.setattr(finetune, "prepare", meanwhile)
    assert train(settings(files, output, train={"steps": 2}), resume=True, quiet=True)["steps"] == 2


def test_weights_of_the_base_are_trained_in_fp32_only(files: Path, tmp_path: Path) -> None:
    adapter = {"modules_to_save": ["lm_head"]}
    with pytest.raises(RequestError, match=r"adapter\.modules_to_save.*set train\.precision=fp32"):
        train(settings(files, tmp_path / "out", adapter=adapter, train={"precision": "bf16"}), quiet=True)
    assert not (tmp_path / "out").exists()
    train(settings(files, tmp_path / "out", adapter=adapter, train={"precision": "auto", "steps": 2}), quiet=True)
    assert yaml.safe_load((tmp_path / "out" / "run.yaml").read_text())["train"]["precision"] == "fp32"


def test_loraplus_without_effect_is_refused(files: Path, tmp_path: Path) -> None:
    run = settings(
        files, tmp_path / "out", adapter={"target_modules": ["embed_tokens"], "lora_dropout": 0.0},
        train={"loraplus_ratio": 16},
    )  # fmt: skip
    with pytest.raises(RequestError, match=r"train\.loraplus_ratio \(16\) has no effect: no adapted layer has a B"):
        train(run, quiet=True)
    assert not (tmp_path / "out").exists()
