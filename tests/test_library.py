"""The library's surface: names, and that they stay functions whatever is imported first."""

from __future__ import annotations

import json
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

import rankwise as rw

ROOT = Path(__file__).parents[1]


def run(code: str) -> str:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout


def test_importing_the_package_imports_nothing_heavy():
    modules = json.loads(run("import sys, json, rankwise; print(json.dumps(sorted(sys.modules)))"))
    assert not {"torch", "transformers", "rich", "yaml"} & set(modules)


@pytest.mark.parametrize("name", sorted(rw.SURFACE))
def test_every_name_is_there(name):
    value = getattr(rw, name)
    assert callable(value) and value.__module__.startswith("rankwise.")
    assert name in dir(rw)


def test_rooms_do_not_hide_the_functions_of_the_same_name():
    code = """
import rankwise.attach.inject, rankwise.ranks, rankwise.train.config
from rankwise.train import config
from rankwise.attach import inject
import rankwise as rw
assert rw.attach is inject.attach and rw.ranks is inject.ranks, (rw.attach, rw.ranks)
assert config.TrainConfig.__module__ == "rankwise.train.config"
from rankwise.recipes.finetune import train
assert rw.train is train
print("good")
"""
    assert run(code) == "good\n"


def test_an_unknown_name_lists_what_there_is():
    with pytest.raises(AttributeError, match=r"rankwise has no 'atach'; it offers BaseAlone, .*LoraConfig"):
        rw.atach  # noqa: B018


def test_one_version():
    assert tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"] == rw.__version__
