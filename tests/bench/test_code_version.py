"""What makes results stale, and what does not."""

from __future__ import annotations

import pytest

from rankwise.bench import code_version as module
from rankwise.bench.code_version import SPEAKING, code_version
from rankwise.recipes.bench import CELL_MODULE


@pytest.fixture
def tree(tmp_path, monkeypatch):
    """A small package in rankwise's place."""
    for name, text in {
        "__init__.py": "", "a.py": '"""Doc."""\nfrom rankwise.b import f\nimport rankwise.say\n', "say.py": "X = 1\n",
        "b.py": "def f():\n    from rankwise.c import deep\n    return deep() + 1\n", "d.py": "Y = 1\n",
        "c/__init__.py": "", "c/deep.py": "from rankwise.a import f\n",
    }.items():  # fmt: skip
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    monkeypatch.setattr(module, "_root", lambda: tmp_path)
    return tmp_path


def test_reached_files_count_and_no_others(tree):
    files = code_version("rankwise.a").files
    assert {name for name in files if name.startswith("rankwise")} == {"rankwise.a", "rankwise.b", "rankwise.c.deep"}
    assert "torch" in files


@pytest.mark.parametrize(
    ("file", "text", "is_other"),
    [
        ("b.py", "def f():\n    from rankwise.c import deep\n    return deep() + 2\n", True),
        (
            "b.py",
            'def f():\n    """New."""\n    from rankwise.c import deep  # why\n\n    return (deep() + 1)\n',
            False,
        ),
        ("a.py", '"""Other words."""\nfrom rankwise.b import f\nimport rankwise.say\n', False),
        ("c/deep.py", "from rankwise.a import f\nZ = 1\n", True),
        ("a.py", "from rankwise.b import f\nimport rankwise.d\n", True),
        ("say.py", "X = 2\n", False),
        ("d.py", "Y = 2\n", False),
    ],
)
def test_what_changes_the_version(tree, file, text, is_other):
    before = code_version("rankwise.a")
    (tree / file).write_text(text)
    after = code_version("rankwise.a")
    assert (after.name != before.name) == is_other == (after.files != before.files)


def test_a_library_counts(tree, monkeypatch):
    before = code_version("rankwise.a").name
    monkeypatch.setattr(module, "version", lambda name: "0")
    assert code_version("rankwise.a").name != before


def test_the_real_cell():
    files = code_version(CELL_MODULE).files
    assert {
        "rankwise.adapters.lora",
        "rankwise.train.loop",
        "rankwise.data.packing",
        "rankwise.models.head_loss",
    } <= set(files)
    assert not {"rankwise.cli.bench", "rankwise.bench.markdown", "rankwise.train.log", *SPEAKING} & set(files)
