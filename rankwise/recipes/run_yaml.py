"""The text of a run file: YAML and `key=value` overrides to plain mappings, and the paths in these made absolute.

Nothing here knows what a setting means; `rankwise.recipes.run` does.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import yaml

from rankwise.data.config import HUB_PREFIX, OFF, TEMPLATE_SUFFIX
from rankwise.errors import RequestError
from rankwise.recipes.run_tasks import absolute_task_paths
from rankwise.train.config import AUTO

EMBEDDED_MODELS = ("demo", "demo-encoder")
DATA_FILES = ("train", "valid", "test")
FROM = "from"


class _Plain(yaml.SafeLoader):
    """Refuses keys that are no plain words, and one that stands twice: the first would silently have no effect.

    A date or a number that Python can't hold is an error of the file, as any other.
    """

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        """As the base class's, for mappings of words without repeats."""
        seen: set[str] = set()
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode):
                raise _wrong("a list or mapping stands where the name of a setting should", key)
            if key.value in seen:
                raise _wrong(f"'{key.value}' is set twice", key)
            seen.add(key.value)
        return super().construct_mapping(node, deep)

    def construct_object(self, node: yaml.Node, deep: bool = False) -> Any:
        """As the base class's."""
        try:
            return super().construct_object(node, deep)
        except ValueError as error:  # the 99th day of a month, a whole number of thousands of digits
            raise _wrong(f"a value can't be read ({str(error).split(';')[0]}); quote it if it is text", node) from None


def _wrong(problem: str, node: yaml.Node) -> yaml.constructor.ConstructorError:
    return yaml.constructor.ConstructorError(None, None, problem, node.start_mark)


def _loaded(text: str) -> Any:
    """Raises: YAMLError."""
    try:
        return yaml.load(text, _Plain)  # noqa: S506 (SafeLoader with checks more)
    except RecursionError:
        raise yaml.YAMLError("lists and mappings are nested too deep") from None


def read_yaml(path: Path) -> dict[str, Any]:
    """A YAML file with a mapping in it.

    Raises: RequestError for a missing file, broken YAML, or anything but a mapping.
    """
    if path.is_dir():
        raise RequestError(f"'{path}' is a folder, not a run file; a run's folder has its own in '{path / 'run.yaml'}'")
    try:
        document = _loaded(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise RequestError(f"there is no run file '{path}'") from None
    except (OSError, UnicodeDecodeError) as error:
        raise RequestError(f"cannot read the run file '{path}': {error}") from None
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark
        where = f", line {mark.line + 1}" if mark else ""
        raise RequestError(f"the run file '{path}' is not YAML{where}: {error.problem}") from None
    except yaml.YAMLError as error:
        raise RequestError(f"the run file '{path}' is not YAML: {error}") from None
    if not isinstance(document, dict):
        raise RequestError(f"the run file '{path}' must hold settings (model:, data:, train:, ...), not {document!r}")
    return {str(key): value for key, value in document.items()}


def parse_override(text: str) -> dict[str, Any]:
    """`train.lr=1e-3` as {"train": {"lr": 1e-3}}; the value is YAML.

    Raises: RequestError when it is not `key=value`.
    """
    key, equals, value = text.partition("=")
    names = key.split(".")
    if not equals or not all(names):
        raise RequestError(f"'{text}' is not a setting; write key=value, as in train.lr=1e-3")
    try:
        parsed: Any = _loaded(value)
    except yaml.YAMLError:
        raise RequestError(f"the value of '{text}' is not YAML; quote it") from None
    for name in reversed(names):
        parsed = {name: parsed}
    return parsed


def absolute_paths(document: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """The document with every path in it made absolute, relative ones from `folder`.

    Raises: RequestError for the home folder of a user whom this machine does not have.
    """

    def absolute(value: Any) -> Any:
        if isinstance(value, list):
            return [absolute(item) for item in value]
        if isinstance(value, Mapping) and "path" in value:  # a source of training rows
            return {**value, "path": absolute(value["path"])}
        if not isinstance(value, str) or value.startswith(HUB_PREFIX):
            return value
        try:
            return os.path.normpath(folder / Path(value).expanduser())
        except RuntimeError:
            raise RequestError(f"'{value}': there is no home folder of that user; write ./{value} for a file") from None

    def model(value: Any) -> Any:
        if not isinstance(value, str) or value in EMBEDDED_MODELS:
            return value
        is_path = value.startswith((".", "~", os.sep)) or (folder / value).is_dir()
        return absolute(value) if is_path else value

    def cache(value: Any) -> Any:
        return value if value in (AUTO, OFF, "") else absolute(value)

    def template(value: Any) -> Any:
        return absolute(value) if isinstance(value, str) and value.endswith(TEMPLATE_SUFFIX) else value

    places: list[tuple[str, str, Callable[[Any], Any]]] = [("data", name, absolute) for name in DATA_FILES]
    places += [
        ("data", "cache", cache),
        ("data", "chat_template", template),
        ("adapter", FROM, absolute),
        ("model", "name", model),
    ]
    result = dict(document)
    for section, name, change in places:
        inside = result.get(section)
        if isinstance(inside, Mapping) and name in inside:
            result[section] = {**inside, name: change(inside[name])}
    if isinstance(result.get("tasks"), Mapping):
        result["tasks"] = absolute_task_paths(result["tasks"], absolute)
    if "output" in result:
        result["output"] = absolute(result["output"])
    return result
