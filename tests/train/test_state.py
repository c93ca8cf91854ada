from __future__ import annotations

import json
import os
import random
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import PreTrainedModel

from rankwise import files
from rankwise.attach.inject import adapter_parameters
from rankwise.errors import WorkError
from rankwise.train import state
from rankwise.train.loop import LoopPlan, Progress, fit
from rankwise.train.objectives import TOKENS
from rankwise.train.optim import optimizer_state
from rankwise.train.rng import rng_state
from rankwise.train.state import (
    RECORD,
    STATE,
    checkpoint_folders,
    damage,
    drop_newer,
    find_checkpoint,
    restore,
    save_checkpoint,
)
from tests.train.test_loop import adapted, optimizer_of, split

SETTINGS = {"train.lr": 0.01, "data.max_length": 512}


def trained(steps: int = 2) -> tuple[PreTrainedModel, torch.optim.Optimizer, Progress]:
    model = adapted(lora_dropout=0.1)
    optimizer = optimizer_of(model)
    plan = LoopPlan(steps, lambda step: 0.01)
    progress = fit(model, optimizer, lambda step: split(4, True), TOKENS, plan, Progress())
    return model, optimizer, progress


def save(
    folder: Path, steps: tuple[int, ...] = (2,), keep: int | None = None
) -> tuple[PreTrainedModel, torch.optim.Optimizer]:
    model, optimizer, progress = trained()
    for step in steps:
        progress.step = step
        save_checkpoint(folder, model, optimizer, progress, SETTINGS, keep)
    return model, optimizer


def test_everything_comes_back(tmp_path: Path) -> None:
    model, optimizer = save(tmp_path)
    checkpoint, problems = find_checkpoint(tmp_path)
    assert checkpoint is not None and problems == []
    assert checkpoint.step == 2 and checkpoint.settings == SETTINGS
    assert checkpoint.progress.watch.best is not None
    expected = rng_state(torch.device("cpu"))
    other = adapted(seed=9, lora_dropout=0.1)
    other_optimizer = optimizer_of(other)
    torch.manual_seed(123)
    restore(checkpoint, other, other_optimizer, seed=0)
    for name, parameter in adapter_parameters(model).items():
        assert torch.equal(parameter, adapter_parameters(other)[name])
    before = optimizer_state(optimizer, adapter_parameters(model))
    after = optimizer_state(other_optimizer, adapter_parameters(other))
    assert before.keys() == after.keys()
    assert all(torch.equal(before[key], after[key]) for key in before)
    assert all(torch.equal(value, expected[key]) for key, value in rng_state(torch.device("cpu")).items())


def test_safetensors_and_json_only_and_readable(tmp_path: Path) -> None:
    save(tmp_path)
    folder = checkpoint_folders(tmp_path)[0]
    names = sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())
    assert names == ["adapter/adapter_config.json", "adapter/adapter_model.safetensors", RECORD, STATE]
    assert {name.split("/")[0] for name in load_file(folder / STATE)} == {"adapter", "optimizer", "rng"}
    mask = os.umask(0)
    os.umask(mask)
    assert all((folder / name).stat().st_mode & 0o777 == 0o666 & ~mask for name in names)


def test_the_newest_are_kept(tmp_path: Path) -> None:
    save(tmp_path, steps=(5, 50, 100, 9), keep=2)
    assert [folder.name for folder in checkpoint_folders(tmp_path)] == ["step-50", "step-100"]


def test_an_older_one_that_the_disk_does_not_give_up_is_gone_by_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(files.shutil, "rmtree", lambda path, ignore_errors=False: None)  # as NFS keeps open files
    save(tmp_path, steps=(5, 9), keep=1)
    assert [folder.name for folder in checkpoint_folders(tmp_path)] == ["step-9"]
    assert [path.name[:8] for path in (tmp_path / "checkpoints").iterdir() if path.name != "step-9"] == [".step-5."]
    monkeypatch.undo()
    drop_newer(tmp_path, 9)
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step-9"]


def test_all_are_kept(tmp_path: Path) -> None:
    save(tmp_path, steps=(1, 2, 10))
    assert [folder.name for folder in checkpoint_folders(tmp_path)] == ["step-1", "step-2", "step-10"]


def truncate(folder: Path) -> None:
    data = (folder / STATE).read_bytes()
    (folder / STATE).write_bytes(data[: len(data) // 2])


def flip_a_bit(folder: Path) -> None:
    path = folder / "adapter" / "adapter_model.safetensors"
    data = bytearray(path.read_bytes())
    data[-5] ^= 1
    path.write_bytes(data)


def cut_the_record(folder: Path) -> None:
    text = (folder / RECORD).read_text()
    (folder / RECORD).write_text(text[: random.Random(0).randrange(len(text))])


def change_the_record(folder: Path) -> None:
    record = json.loads((folder / RECORD).read_text())
    record["progress"]["step"] += 1
    (folder / RECORD).write_text(json.dumps(record))


def remove_the_state(folder: Path) -> None:
    (folder / STATE).unlink()


def remove_the_record(folder: Path) -> None:
    (folder / RECORD).unlink()


DAMAGES = {
    truncate: f"{STATE} does not match its hash",
    flip_a_bit: "adapter/adapter_model.safetensors does not match its hash",
    cut_the_record: "cut off or not JSON",
    change_the_record: "does not match its own hash",
    remove_the_state: f"{STATE} is missing",
    remove_the_record: f"{RECORD} is missing",
}


@pytest.mark.parametrize("harm", DAMAGES, ids=lambda harm: harm.__name__)
def test_a_damaged_checkpoint_is_found_and_the_one_before_is_used(tmp_path: Path, harm) -> None:
    save(tmp_path, steps=(2, 4, 6))
    newest = checkpoint_folders(tmp_path)[-1]
    assert damage(newest) is None
    harm(newest)
    checkpoint, problems = find_checkpoint(tmp_path)
    assert checkpoint is not None and checkpoint.step == 4
    assert len(problems) == 1 and DAMAGES[harm] in problems[0] and "step-6" in problems[0]
    drop_newer(tmp_path, 4)
    assert [folder.name for folder in checkpoint_folders(tmp_path)] == ["step-2", "step-4"]


FILES = ("adapter/adapter_config.json", "adapter/adapter_model.safetensors", STATE, RECORD)

HARMS = {
    "empty": lambda data, draw: b"",
    "cut off": lambda data, draw: data[: draw.randrange(1, len(data))],
    "a bit flipped": lambda data, draw: _flipped(data, draw.randrange(len(data) * 8)),
    "longer": lambda data, draw: data + b"\0",
    "noise": lambda data, draw: draw.randbytes(len(data)),
}


def _flipped(data: bytes, bit: int) -> bytes:
    changed = bytearray(data)
    changed[bit // 8] ^= 1 << bit % 8
    return bytes(changed)


def test_harm_to_any_file_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save(tmp_path, steps=(2, 4))
    newest = checkpoint_folders(tmp_path)[-1]
    draw = random.Random(0)
    assert {str(path.relative_to(newest)) for path in newest.rglob("*") if path.is_file()} == set(FILES)
    for name in FILES:
        whole = (newest / name).read_bytes()
        for harm, change in HARMS.items():
            for _ in range(5):
                (newest / name).write_bytes(change(whole, draw))
                assert (found := damage(newest)) is not None and name in found, f"{name}: {harm}"
                checkpoint, problems = find_checkpoint(tmp_path)
                assert checkpoint is not None and checkpoint.step == 2 and len(problems) == 1
        (newest / name).write_bytes(whole)
        assert damage(newest) is None
    read = Path.read_text

    def unreadable(path: Path, *more: str, **given: str) -> str:
        if path == newest / RECORD:
            raise OSError(5, "Input/output error")
        return read(path, *more, **given)

    monkeypatch.setattr(Path, "read_text", unreadable)
    assert damage(newest) == f"{RECORD} can't be read: Input/output error"


def test_no_whole_checkpoint_is_an_error_and_none_at_all_is_not(tmp_path: Path) -> None:
    assert find_checkpoint(tmp_path) == (None, [])
    save(tmp_path, steps=(2, 4))
    for folder in checkpoint_folders(tmp_path):
        truncate(folder)
    with pytest.raises(WorkError, match=r"no checkpoint .* is whole.*step-4.*step-2.*delete that folder"):
        find_checkpoint(tmp_path)


def test_what_a_crash_left_half_written_is_no_checkpoint(tmp_path: Path) -> None:
    save(tmp_path)
    leftover = tmp_path / "checkpoints" / ".step-4.x1.tmp"
    leftover.mkdir()
    checkpoint, _ = find_checkpoint(tmp_path)
    assert checkpoint is not None and checkpoint.step == 2
    drop_newer(tmp_path, 2)
    assert not leftover.exists()


def test_a_save_that_fails_leaves_the_older_ones(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, optimizer = save(tmp_path)

    def full(tensors: object) -> bytes:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(state, "save", full)
    with pytest.raises(WorkError, match="No space left on device"):
        save_checkpoint(tmp_path, model, optimizer, Progress(step=4), SETTINGS, keep=1)
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step-2"]
