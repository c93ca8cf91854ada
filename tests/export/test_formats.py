"""What is known of the formats before torch is: settings, packages, room on the disk."""

from __future__ import annotations

import dataclasses
import shutil
import subprocess
import sys
from collections import namedtuple

import pytest

from rankwise.errors import RequestError, WorkError
from rankwise.export import formats
from rankwise.export.formats import FORMATS, Format, need_package, need_space, settled
from rankwise.recipes.export import WRITERS


def test_every_format_has_its_writer():
    assert set(WRITERS) == set(FORMATS)


def test_every_choice_is_of_a_setting_and_every_package_says_how_to_install_it():
    for format in FORMATS.values():
        assert set(format.choices) <= set(format.settings)
        assert (format.package is None) == (format.install == "")


def test_settings_given_and_by_default():
    assert settled("merged", {"dtype": "bf16"}) == {"dtype": "bf16", "max_shard_size": "5GB"}


def test_a_setting_without_effect_is_refused_with_whose_it_is(monkeypatch):
    monkeypatch.setitem(FORMATS, "other", Format("nothing", settings={"depth": 3}))
    with pytest.raises(RequestError, match=r"--depth has no effect with --to merged: it belongs to --to other; leave"):
        settled("merged", {"depth": 4})
    with pytest.raises(
        RequestError, match=r"--max-shard-size has no effect with --to other: it belongs to --to merged"
    ):
        settled("other", {"max_shard_size": "5GB"})


def test_unknown_names_and_values():
    with pytest.raises(RequestError, match="unknown format 'megred'; did you mean 'merged'"):
        settled("megred", {})
    with pytest.raises(RequestError, match=r"--dtype 'bf61' is unknown for --to merged; did you mean 'bf16'"):
        settled("merged", {"dtype": "bf61"})


def test_a_missing_package_is_named_with_the_command(monkeypatch):
    lacking = dataclasses.replace(FORMATS["merged"], package="no_such_package", install="pip install it")
    monkeypatch.setitem(FORMATS, "other", lacking)
    with pytest.raises(RequestError, match=r"--to other needs the package no_such_package, .*: pip install it"):
        need_package("other")
    need_package("merged")


def test_room_on_the_disk(monkeypatch, tmp_path):
    usage = namedtuple("usage", "total used free")
    asked = []

    def disk_usage(path):
        asked.append(path)
        return usage(10**12, 0, 600 * formats.MEGABYTE)

    monkeypatch.setattr(shutil, "disk_usage", disk_usage)
    need_space(tmp_path / "not" / "there", 500 * formats.MEGABYTE)
    assert asked == [tmp_path], "the nearest folder that is there"
    with pytest.raises(WorkError, match=r"needs about 616 MB, and its disk has 600 MB free; free space or choose"):
        need_space(tmp_path / "out", 600 * formats.MEGABYTE)


def test_a_bad_line_is_refused_without_torch():
    code = (
        "import sys; from rankwise.cli.main import main\n"
        "assert main(['export', 'x', '--to', 'megred', '--out', 'y']) == 2\n"
        "assert 'torch' not in sys.modules and 'transformers' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)
