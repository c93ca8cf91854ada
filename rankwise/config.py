"""Strict dataclasses from plain mappings: an unknown key names the nearest known one, a wrong type names the value.

Each room keeps its own small frozen dataclass; this module only builds them. jsonargparse checks the types.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
from collections.abc import Container, Mapping
from types import UnionType
from typing import Any, TypeVar, Union, get_args, get_origin, get_type_hints

from rankwise.errors import RequestError, did_you_mean

T = TypeVar("T")

_WORDS: dict[Any, str] = {
    int: "a whole number", float: "a number", bool: "true or false", str: "text", type(None): "null",
}  # fmt: skip


def build(cls: type[T], values: Mapping[str, Any] | None, where: str) -> T:
    """An instance of the dataclass `cls` from `values`; `where` names the section in messages (`train`, `adapter`).

    Raises: RequestError for a key that `cls` does not have, or a value of the wrong type.
    """
    if values is None:
        values = {}
    if not isinstance(values, Mapping):
        raise RequestError(f"{where} must be a mapping of settings, not {values!r}")
    fields = {field.name for field in dataclasses.fields(cls) if field.init}  # type: ignore[arg-type]
    for key in values:
        if key not in fields:
            raise RequestError(f"unknown setting '{where}.{key}'{did_you_mean(str(key), sorted(fields))}")
    hints = _hints(cls)
    checked = {key: checked_value(value, hints[key], f"{where}.{key}") for key, value in values.items()}
    missing = [
        field.name
        for field in dataclasses.fields(cls)  # type: ignore[arg-type]
        if field.init
        and field.default is dataclasses.MISSING
        and field.default_factory is dataclasses.MISSING
        and field.name not in checked
    ]
    if missing:
        raise RequestError(f"missing setting '{where}.{missing[0]}'")
    return cls(**checked)


@functools.cache
def _hints(cls: type) -> dict[str, Any]:
    return get_type_hints(cls)


def _is_exactly(value: Any, kind: Any) -> bool:
    """Whether `value` is of this type beyond doubt: nothing that jsonargparse might read as something else.

    Text is only where nothing but text may stand: "50" for a number or text is the number.
    """
    arguments = get_args(kind)
    if get_origin(kind) in (Union, UnionType):
        others = {member for member in arguments if member is not type(None)}
        return (len(others) == 1 or type(value) not in (str, float)) and any(_is_exactly(value, m) for m in others)
    if get_origin(kind) is list:
        return type(value) is list and all(_is_exactly(item, arguments[0]) for item in value)
    if get_origin(kind) is dict:
        return type(value) is dict and all(
            _is_exactly(key, arguments[0]) and _is_exactly(item, arguments[1]) for key, item in value.items()
        )
    return kind in (bool, int, float, str) and type(value) is kind


def checked_value(value: Any, kind: Any, name: str) -> Any:
    """`value` as type `kind` (`2e-4` that YAML reads as text becomes a float), or RequestError naming `name`.

    Null is a value like any other: only a type with None in it takes it.
    """
    if value is None:  # jsonargparse takes it for "not given", whatever the type
        if type(None) in get_args(kind):
            return None
        raise RequestError(f"{name} must be {_type_name(kind)}, not null")
    if _is_exactly(value, kind):
        return value  # a parser takes a quarter of a millisecond, and an adapter's configuration has twenty values
    from jsonargparse import ArgumentParser

    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--value", type=kind)
    try:
        return parser.parse_object({"value": value}).value
    except argparse.ArgumentError:
        raise RequestError(f"{name} must be {_type_name(kind)}, not {value!r}") from None


def check_types(instance: Any, beside: Container[str] = ()) -> None:
    """Raises: RequestError for a field of a dataclass that holds another type than it says. Nothing is converted.

    Fields in `beside` are not looked at.
    """
    for name, kind in _hints(type(instance)).items():
        if name not in beside and not _holds(getattr(instance, name), kind):
            raise RequestError(f"{name} must be {_type_name(kind)}, not {getattr(instance, name)!r}")


def _holds(value: Any, kind: Any) -> bool:
    """Whether `value` is of this type; a whole number is a number, true and false are none."""
    arguments = get_args(kind)
    if get_origin(kind) in (Union, UnionType):
        return any(_holds(value, member) for member in arguments)
    if get_origin(kind) is list:
        return isinstance(value, list) and all(_holds(item, arguments[0]) for item in value)
    if get_origin(kind) is dict:
        return isinstance(value, dict) and all(
            _holds(key, arguments[0]) and _holds(item, arguments[1]) for key, item in value.items()
        )
    if isinstance(value, bool):
        return kind is bool
    return isinstance(value, (int, float) if kind is float else kind)


def _type_name(kind: Any) -> str:
    """A type in words: `a number`, `a whole number or null`."""
    arguments = get_args(kind)
    if get_origin(kind) in (Union, UnionType):
        members = [member for member in arguments if not (member is int and float in arguments)]  # int is a number too
        return " or ".join(_type_name(member) for member in members)
    if get_origin(kind) is tuple:
        return f"{len(arguments)} values, each {_type_name(arguments[0])}"
    if get_origin(kind) is list:
        return f"a list, each item {_type_name(arguments[0])}"
    if get_origin(kind) in (dict, Mapping):
        return f"a mapping, each value {_type_name(arguments[1])}"
    return _WORDS.get(kind, str(kind))


def to_dict(instance: Any) -> dict[str, Any]:
    """A dataclass as plain YAML-able values: tuples become lists."""
    return {field.name: _plain(getattr(instance, field.name)) for field in dataclasses.fields(instance) if field.init}


def _plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return to_dict(value)
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return value
