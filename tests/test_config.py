"""Strict dataclasses: wrong types are named in words, not in Python's."""

from __future__ import annotations

from dataclasses import dataclass, field

import pytest

from rankwise import config as config_module
from rankwise.config import build
from rankwise.errors import RequestError


@dataclass(frozen=True)
class Settings:
    count: int = 1
    rate: float = 1.0
    length: int | float | None = None
    is_on: bool = False
    name: str = "x"
    names: list[str] = field(default_factory=list)
    pair: tuple[float, float] = (0.0, 1.0)
    ranks: dict[str, int] = field(default_factory=dict)
    rows: list[int] | dict[str, list[int]] | None = None


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("count", "abc", "a whole number"),
        ("rate", "abc", "a number"),
        ("length", "abc", "a number or null"),
        ("is_on", "perhaps", "true or false"),
        ("name", [1], "text"),
        ("names", 3, "a list, each item text"),
        ("pair", [1], "2 values, each a number"),
        ("ranks", {"q": "many"}, "a mapping, each value a whole number"),
        (
            "rows",
            "x",
            "a list, each item a whole number or a mapping, each value a list, each item a whole number or null",
        ),
    ],
)
def test_a_wrong_type_is_said_in_words(name, value, words):
    with pytest.raises(RequestError) as error:
        build(Settings, {name: value}, "train")
    assert error.value.message == f"train.{name} must be {words}, not {value!r}"


@pytest.mark.parametrize("name", ["count", "rate", "is_on", "name", "names", "pair", "ranks"])
def test_null_is_a_wrong_type_too(name):
    with pytest.raises(RequestError, match=f"train.{name} must be .*, not null"):
        build(Settings, {name: None}, "train")


@pytest.mark.parametrize("name", ["length", "rows"])
def test_null_is_a_value_where_the_type_has_it(name):
    assert getattr(build(Settings, {name: None}, "train"), name) is None


@pytest.mark.parametrize(
    ("value", "kind", "exact"),
    [
        (3, int, True), (True, int, False), (3, float, False), (3.0, float, True), ("3", str, True), ("3", int, False),
        (3, int | str | None, True), ("3", int | str | None, False), ("a", str | None, True),
        ("a", str | list[str], False),
        (["a"], str | list[str], True), (["a", 3], list[str], False), ({"a": 3}, dict[str, int], True),
        ({"a": True}, dict[str, int], False), ({3: 3}, dict[str, int], False), (True, bool | str, True),
        (2.0, int | float, False), ((1.0, 2.0), tuple[float, float], False), (1, bool, False),
    ],
)  # fmt: skip
def test_only_what_is_beyond_doubt_passes_without_the_parser(value, kind, exact):
    assert config_module._is_exactly(value, kind) == exact
