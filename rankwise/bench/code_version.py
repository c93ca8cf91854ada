"""Which code computed a result: a digest of the source that could change it, and of the libraries below.

The source is found by following imports from one module: what it can't reach can't change its results. Modules that
only say things to people are left out by name. A file counts by its syntax tree without docstrings, so that comments,
docstrings and layout change nothing.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from importlib.metadata import version
from pathlib import Path

from rankwise.files import sha256_bytes

PACKAGE = "rankwise"
SPEAKING = (
    "rankwise", "rankwise.errors", "rankwise.files", "rankwise.say", "rankwise.models.quiet", "rankwise.train.log",
    "rankwise.train.interrupt", "rankwise.evaluate.progress", "rankwise.recipes.finetune_report",
    "rankwise.recipes.output", "rankwise.recipes.provenance", "rankwise.data.overlap", "rankwise.data.preview",
)  # fmt: skip
"""Modules whose results are messages, logs, records and locks: no loss depends on them."""

LIBRARIES = ("torch", "transformers", "tokenizers", "numpy")
"""Packages whose versions are part of the code's version: another one may round, cut or draw differently."""


@dataclass(frozen=True)
class CodeVersion:
    """`name`: the digest of all. `files`: that of each module, and the version of each library."""

    name: str
    files: dict[str, str]


def code_version(start: str) -> CodeVersion:
    """The version of the module `start` and of what it imports, directly or not."""
    files = {module: _digest(_file(module)) for module in sorted(_reached(start)) if module not in SPEAKING}
    files |= {name: version(name) for name in LIBRARIES}
    name = sha256_bytes("".join(f"{key}={value}\n" for key, value in files.items()).encode())[:12]
    return CodeVersion(name, files)


def _root() -> Path:
    return Path(__file__).parents[1]


def _file(module: str) -> Path:
    place = _root().joinpath(*module.split(".")[1:])
    return place / "__init__.py" if place.is_dir() else place.with_suffix(".py")


def _reached(start: str) -> set[str]:
    seen, waiting = set[str](), [start]
    while waiting:
        module = waiting.pop()
        if module in seen or module in SPEAKING:
            continue
        seen.add(module)
        waiting += _imports(_file(module))
    return seen


def _imports(file: Path) -> frozenset[str]:
    return _read(file, *_stamp(file))[0]


def _digest(file: Path) -> str:
    return _read(file, *_stamp(file))[1]


def _stamp(file: Path) -> tuple[int, int]:
    state = file.stat()
    return state.st_mtime_ns, state.st_size


@cache
def _read(file: Path, changed_at_ns: int, size: int) -> tuple[frozenset[str], str]:
    """The modules of the package that a file imports, wherever its import statements stand, and its digest."""
    tree = ast.parse(file.read_text(encoding="utf-8"))
    imports = frozenset(_imported(tree))
    for node in ast.walk(tree):
        body = getattr(node, "body", None)
        if isinstance(body, list):
            node.body = [part for part in body if not _is_text(part)]  # type: ignore[attr-defined]
    return imports, sha256_bytes(ast.unparse(tree).encode())[:12]


def _imported(tree: ast.Module) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name.split(".")[0] == PACKAGE)
        elif isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == PACKAGE:
            inside = [f"{node.module}.{alias.name}" for alias in node.names]
            modules = [name for name in inside if _file(name).is_file()]
            yield from modules
            if len(modules) < len(inside):
                yield node.module


def _is_text(node: ast.AST) -> bool:
    """A docstring, or text below a constant that describes it."""
    return isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str)
