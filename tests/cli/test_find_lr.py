"""`rankwise find-lr` from its line to its document, exit code and what it leaves behind."""

from __future__ import annotations

import json

import pytest
import yaml

from rankwise.cli import find_lr
from rankwise.cli.main import main
from tests.recipes.trained import run_document, save_model

SHORT = ["--steps", "24", "--restarts", "1", "--lowest", "1e-4", "--highest", "3"]


@pytest.fixture
def run_file(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(run_document(tmp_path, save_model(tmp_path / "model"))))
    return path


def test_document_picture_and_apply(run_file, capsys):
    (run_file.parent / "run.find-lr.png").write_bytes(b"of an earlier test")
    assert main(["find-lr", str(run_file), *SHORT, "--apply", "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert document["lr"] > 0 and document["applied"] is True
    assert all(set(point) == {"lr", "loss"} for point in document["curve"]) and len(document["curve"]) > 3
    assert (run_file.parent / "run.find-lr.png").read_bytes().startswith(b"\x89PNG")
    assert yaml.safe_load(run_file.read_text())["train"]["lr"] == document["lr"]
    assert not (run_file.parent / "run").exists()
    find_lr.show({**document, "applied": False})  # the same for people
    text = capsys.readouterr().out
    assert text.startswith("learning rate ") and document["picture"] in text and "--apply" in text


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--steps", "5"], "5 steps"),
        (["--lowest", "1", "--highest", "0.1"], "1 to 0.1"),
        (["--apply", "train.lr=1e-3"], "an override sets it too"),
        (["train.lrr=1e-3"], "train.lrr"),
        (["--out", "{root}/model/config.json/x.png"], "can't be made"),
        (["--out", "{root}/model"], "is a folder"),
    ],
)
def test_wrong_requests(run_file, capsys, arguments, message):
    arguments = [part.replace("{root}", str(run_file.parent)) for part in arguments]
    before = run_file.read_text()
    overrides, flags = [a for a in arguments if a.startswith("train.")], [a for a in arguments if a[:6] != "train."]
    assert main(["find-lr", str(run_file), *overrides, *flags, "--json"]) == 2
    assert message in json.loads(capsys.readouterr().out)["error"]["message"]
    assert run_file.read_text() == before


def test_a_curve_that_says_nothing_fails_the_work(run_file, capsys):
    lines = ["--steps", "10", "--restarts", "1", "--lowest", "1e-9", "--highest", "1e-8"]
    assert main(["find-lr", str(run_file), *lines, "--json"]) == 1
    assert json.loads(capsys.readouterr().out)["error"]["code"] == 1
