"""Strategies for fuzzing: bytes near to good files, JSON near to good rows, and how long to look.

In the suite the examples are few and always the same. `RANKWISE_FUZZ=20000 pytest tests/data/test_fuzz.py` looks for
new ones, that many for each test; what it finds belongs in `fixtures/fuzz`.
"""

from __future__ import annotations

import os
from typing import Any

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st

from rankwise.data.chat import ROLES
from rankwise.data.formats import FORMATS

WANTED = int(os.environ.get("RANKWISE_FUZZ", "0"))


def looking(examples: int) -> settings:
    """Settings of one test: so many fixed examples in the suite, or as many new ones as asked for."""
    return settings(
        max_examples=WANTED or examples,
        derandomize=not WANTED,
        database=None,
        deadline=None,
        suppress_health_check=list(HealthCheck),
    )


FRAGMENTS = [
    b"\n", b"\r", b"\r\n", b'"', b'""', b",", b"\t", b"{", b"}", b"[", b"]", b":", b"\\", b"\\u", b"\\ud800",
    b"\\udc00", b"\0", b"\xff", b"\xfe", b"\xff\xfe", b"\xef\xbb\xbf", b"\xc3", b"\xf0\x9f", b"NaN", b"-Infinity",
    b"1e999",
    b"9" * 5000, b"null", b"true", b'{"text":"a"}', b'{"text":"a","text":"b"}', b"[" * 200, b'{"a":' * 200, b"PAR1",
    b"ARROW1\0\0", b"\x1f\x8b", b"PK\x03\x04", b"\x28\xb5\x2f\xfd", b"text", b"\xe2\x80\xa8", b"\x1a", b"\x0b\x0c",
]  # fmt: skip

FREE_BYTES = st.one_of(
    st.binary(max_size=200),
    st.lists(st.one_of(st.sampled_from(FRAGMENTS), st.binary(max_size=6)), max_size=20).map(b"".join),
)


@st.composite
def damaged(draw: st.DrawFn, contents: list[bytes]) -> bytes:
    """A good file with pieces put in, taken out or overwritten."""
    content = draw(st.sampled_from(contents))
    for _ in range(draw(st.integers(0, 4))):
        start = draw(st.integers(0, len(content)))
        length = draw(st.integers(0, 12))
        piece = draw(st.one_of(st.sampled_from(FRAGMENTS), st.binary(max_size=8), st.just(b"")))
        content = content[:start] + piece + content[start + length :]
    return content


FIELDS = sorted({name for form in FORMATS.values() for name in form.fields})
TURN_FIELDS = [
    "role", "content", "from", "value", "tool_calls", "function_call", "tool_call_id", "name", "weight", "train",
    "type", "text", "function", "arguments", "id", "thinking", "images", "history",
]  # fmt: skip
TEXTS = st.one_of(
    st.text(max_size=12),
    st.sampled_from(
        ["", " ", "\n", "q", "a", "text", "{}", "[]", '{"name": "f", "arguments": {}}', "[1", "NaN", *ROLES]
    ),
)
SCALARS = st.one_of(
    st.none(), st.booleans(), st.integers(-3, 3), st.sampled_from([10**30, -(10**400)]), st.floats(), TEXTS,
    st.binary(max_size=3),
)  # fmt: skip
KEYS = st.one_of(st.sampled_from([*FIELDS, *TURN_FIELDS]), st.text(max_size=4))
VALUES: st.SearchStrategy[Any] = st.recursive(
    SCALARS,
    lambda inner: st.one_of(st.lists(inner, max_size=4), st.dictionaries(KEYS, inner, max_size=5)),
    max_leaves=14,
)

CALLS = st.lists(
    st.fixed_dictionaries(
        {"function": st.fixed_dictionaries({"name": TEXTS, "arguments": st.one_of(TEXTS, VALUES)})},
        optional={"id": TEXTS, "type": TEXTS},
    ),
    max_size=2,
)
CONTENTS = st.one_of(
    TEXTS,
    st.none(),
    st.lists(st.fixed_dictionaries({"type": st.sampled_from(["text", "image"]), "text": TEXTS}), max_size=2),
)
TURNS = st.fixed_dictionaries(
    {"role": st.one_of(st.sampled_from(["user", "assistant", "user", "assistant", "system", "tool", *ROLES]), TEXTS),
     "content": CONTENTS},
    optional={"tool_calls": CALLS, "train": st.booleans(), "weight": SCALARS, "name": TEXTS, "tool_call_id": TEXTS},
)  # fmt: skip
TALKS = st.one_of(
    st.lists(TURNS, max_size=6),
    st.lists(st.tuples(TEXTS, TEXTS), min_size=1, max_size=3).map(
        lambda pairs: [
            {"role": role, "content": text}
            for pair in pairs
            for role, text in zip(("user", "assistant"), pair, strict=True)
        ]
    ),
)
ROWS = st.one_of(
    st.dictionaries(KEYS, VALUES, max_size=6),
    st.fixed_dictionaries({}, optional={name: st.one_of(TEXTS, VALUES, TALKS) for name in FIELDS}),
    st.fixed_dictionaries({"messages": TALKS}, optional={"tools": VALUES, "system": TEXTS}),
    st.fixed_dictionaries({"conversations": TALKS}, optional={"tools": VALUES, "system": TEXTS}),
)
