"""A gate's folder: what does not fit is refused with the reason, and it is whole or not there."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import rankwise as rw
from rankwise.adapters.gate_config import GateConfig
from rankwise.attach.attachment import adapter_layers
from rankwise.errors import RequestError, WorkError
from tests import tiny
from tests.attach.gate_cases import TASKS, disturbed, saved_adapters


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    root = tmp_path_factory.mktemp("gates")
    folders = saved_adapters(root / "adapters")
    rw.save_adapter(rw.attach_gate(tiny.llama(), folders, GateConfig("soft", per="layer")), root / "gate")
    embedded = rw.attach_embedding(tiny.llama(), folders["movies"], ["a", "b"])
    rw.save_adapter(disturbed(embedded, 1), root / "vectors")
    return root


@pytest.fixture
def gate(whole, tmp_path) -> Path:
    return Path(shutil.copytree(whole / "gate", tmp_path / "gate"))


def edit(folder: Path, change) -> None:
    content = json.loads((folder / "tasks.json").read_text())
    change(content)
    (folder / "tasks.json").write_text(json.dumps(content))


def edit_tables(folder: Path, change) -> None:
    tables = load_file(folder / "tasks.safetensors")
    change(tables)
    save_file(tables, folder / "tasks.safetensors")


EDITS = {
    "not-json": (lambda f: (f / "tasks.json").write_text("{"), "can't be read"),
    "a-list": (lambda f: (f / "tasks.json").write_text("[]"), "must hold a JSON object"),
    "unknown-key": (lambda f: edit(f, lambda c: c.update(taks=1)), r"unknown setting 'tasks.json.taks'; did you mean"),
    "new-format": (lambda f: edit(f, lambda c: c.update(format=2)), "format 2 is not one"),
    "no-tasks": (lambda f: edit(f, lambda c: c.update(tasks=[])), "there is no task"),
    "left-the-folder": (
        lambda f: edit(f, lambda c: c.update(tasks=["../x", "b", "c"], adapters={"../x": "../x", "b": "b", "c": "c"})),
        r"task name '../x' can't be used",
    ),
    "adapter-left": (
        lambda f: edit(f, lambda c: c["adapters"].update({"../../etc": "movies"})), "adapter name '../../etc' can't be"
    ),
    "other-task": (lambda f: edit(f, lambda c: c["adapters"].update(movies="films")), "which is not among"),
    "one-missing": (lambda f: edit(f, lambda c: c["adapters"].pop("games")), "each task needs one adapter"),
    "both": (lambda f: edit(f, lambda c: c.update(embedding={})), "a gate or an embedding"),
    "mode": (lambda f: edit(f, lambda c: c["gate"].update(mode="sof")), "unknown gate mode 'sof'; did you mean 'soft'"),
    "wrong-type": (lambda f: edit(f, lambda c: c.update(tasks="movies")), "must be a list"),
    "no-folder": (lambda f: shutil.rmtree(f / "games"), "lacks the adapter 'games'"),
    "torn-adapter": (
        lambda f: (f / "games" / "adapter_model.safetensors").write_bytes(b"x"), r"adapter 'games' .*torn"
    ),
    "no-tables": (lambda f: (f / "tasks.safetensors").unlink(), "lacks 'logits/model.layers.0'"),
    "torn-tables": (lambda f: (f / "tasks.safetensors").write_bytes(b"0"), "torn or not a safetensors file"),
    "a-shape": (
        lambda f: edit_tables(f, lambda t: t.update({"logits/model.layers.0": torch.zeros(2)})), r"has shape \[2\]"
    ),
    "a-stranger": (lambda f: edit_tables(f, lambda t: t.update({"logits/x": torch.zeros(3)})), "holds 'logits/x'"),
    "not-finite": (
        lambda f: edit_tables(f, lambda t: t["logits/model.layers.0"].fill_(float("nan"))), "not finite"
    ),
    "a-router": (lambda f: edit(f, lambda c: c.update(router={})), "lacks 'router/weight'"),
}  # fmt: skip


@pytest.mark.parametrize("what", EDITS)
def test_a_folder_that_does_not_fit_itself(what, gate):
    change, message = EDITS[what]
    change(gate)
    model = tiny.llama()
    with pytest.raises(RequestError, match=message):
        rw.load_adapter(model, gate)
    assert not adapter_layers(model)


def test_a_refused_folder_leaves_the_attached_adapter(whole, gate):
    edit_tables(gate, lambda t: t.update({"logits/x": torch.zeros(3)}))
    model = rw.load_adapter(tiny.llama(), whole / "gate")
    ids = tiny.token_ids()
    with torch.no_grad():
        before = model(input_ids=ids).logits
        with pytest.raises(RequestError, match="logits/x"):
            rw.load_adapter(model, gate)
        assert torch.equal(model(input_ids=ids).logits, before)


def test_a_gate_of_another_model(whole):
    with pytest.raises(RequestError, match="adapter 'movies'"):
        rw.load_adapter(tiny.llama(hidden_size=64), whole / "gate")


def test_vectors_that_are_not_there(whole, tmp_path):
    folder = Path(shutil.copytree(whole / "vectors", tmp_path / "vectors"))
    rw.load_adapter(tiny.llama(), folder)
    edit_tables(folder, lambda t: t.pop("vectors/a/model.layers.0.self_attn.q_proj"))
    with pytest.raises(RequestError, match=r"lacks 'vectors/a/model.layers.0.self_attn.q_proj'"):
        rw.load_adapter(tiny.llama(), folder)


def test_loading_swaps_a_gate_and_a_plain_adapter_in_place(whole):
    ids = tiny.token_ids()
    model = rw.load_adapter(tiny.llama(), whole / "adapters" / "movies")
    with torch.no_grad():
        plain = model(input_ids=ids).logits
        rw.load_adapter(model, whole / "gate")
        with rw.on_task(model, "movies"):
            assert torch.allclose(model(input_ids=ids).logits, plain, atol=1e-5)
        rw.load_adapter(model, whole / "adapters" / "movies")
        assert torch.equal(model(input_ids=ids).logits, plain)
        assert model.rankwise_attachment.mixture is None


def test_saving_again_replaces_the_adapters_and_keeps_other_files(whole, gate):
    (gate / "tokenizer.json").write_text("{}")
    (gate / "notes").mkdir()
    (gate / "notes" / "a.txt").write_text("mine")
    two = rw.attach_gate(tiny.llama(), {task: whole / "adapters" / task for task in TASKS[:2]})
    rw.save_adapter(two, gate)
    assert sorted(entry.name for entry in gate.iterdir()) == [
        "books",
        "movies",
        "notes",
        "tasks.json",
        "tokenizer.json",
    ]
    assert (gate / "notes" / "a.txt").read_text() == "mine"
    assert not list(gate.parent.glob(".*"))


def test_save_pretrained_writes_the_same_folder(whole, tmp_path):
    model = rw.load_adapter(tiny.llama(), whole / "gate")
    model.save_pretrained(tmp_path / "out")
    for file in ("tasks.json", "tasks.safetensors", "movies/adapter_model.safetensors", "books/adapter_config.json"):
        assert (tmp_path / "out" / file).read_bytes() == (whole / "gate" / file).read_bytes()


def test_what_is_not_finite_is_not_saved(whole, tmp_path):
    model = rw.load_adapter(tiny.llama(), whole / "gate")
    model.rankwise_attachment.mixture.logits.data[0, 0] = float("inf")
    with pytest.raises(WorkError, match="the gate was not saved"):
        rw.save_adapter(model, tmp_path / "out")
    assert not (tmp_path / "out").exists()


SAVER = """
import os, signal, sys, torch
import rankwise as rw
from pathlib import Path
from rankwise.attach import gate_folder
from tests import tiny
folder, steps = Path(sys.argv[1]), int(sys.argv[2])
model = rw.load_adapter(tiny.llama(), folder)
with torch.no_grad():
    for parameter in model.parameters():
        parameter.fill_(0.5)
write, count = gate_folder._write_adapter, 0
def dying(*arguments):
    global count
    write(*arguments)
    count += 1
    if count == steps:
        os.kill(os.getpid(), signal.SIGKILL)
gate_folder._write_adapter = dying
rw.save_adapter(model, folder)
"""


@pytest.mark.parametrize("steps", [2])
def test_a_kill_while_saving_leaves_the_old_folder(steps, gate):
    before = {file.relative_to(gate): file.read_bytes() for file in gate.rglob("*") if file.is_file()}
    root = Path(__file__).parents[2]
    done = subprocess.run(
        [sys.executable, "-c", SAVER, str(gate), str(steps)], capture_output=True, cwd=root,
        env={**os.environ, "PYTHONPATH": str(root), "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert {file.relative_to(gate): file.read_bytes() for file in gate.rglob("*") if file.is_file()} == before
    rw.load_adapter(tiny.llama(), gate)
