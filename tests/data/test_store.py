from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from rankwise.data.example import Example
from rankwise.data.store import Examples, Store, StoreWriter, packed, records, unpacked

BASE = Example(
    input_ids=(7, 8, 9, 10, 11),
    labels=(-100, -100, 9, -100, 11),
    text="Ask: what\nAnswer thereof",
    spans=((4, 9), (10, 20)),
    prompt_ids=(7, 8),
    prompt_text="Ask: what",
    answer="Answer thereof",
    file="a.jsonl",
    line=3,
)
CASES = {
    "usual": BASE,
    "all trained": replace(BASE, labels=BASE.input_ids),
    "other labels": replace(BASE, labels=(-100, 1, 2, 3, -100)),
    "longer labels": replace(BASE, labels=(-100, 7, 8)),
    "no prompt": replace(BASE, prompt_ids=(), prompt_text="", answer=""),
    "parts": replace(BASE, parts=(2, 3)),
    "weights": replace(BASE, weights=((2, 3, 0.1), (4, 5, 2.0))),
    "odd letters": replace(BASE, text="\u2028 é \U0001f600\0\t", prompt_text="\u2028 é \U0001f600\0\t", answer="\n"),
    "large ids": replace(BASE, input_ids=(2**31 - 1, 0, 9, 10, 11)),
}


@pytest.mark.parametrize("name", CASES)
def test_a_record_gives_the_example_back(name: str) -> None:
    example = CASES[name]
    assert unpacked(packed(example), "", example.file, example.line) == replace(example, source=example.prompt_text)


def test_the_instruction_is_taken_off() -> None:
    assert unpacked(packed(BASE), "Ask: ", "", 0).source == "what"


def stored(folder: Path, examples: list[Example], chunk: int = 3) -> Store:
    with StoreWriter(folder) as writer:
        for start in range(0, len(examples), chunk):
            part = examples[start : start + chunk]
            writer.add(records(part, [hash(e.line) % 97 for e in part], [0] * len(part)))
    return Store(folder, list(writer.files), {})


def numbered(count: int, file: str = "a") -> list[Example]:
    return [
        replace(BASE, file=file, line=n, input_ids=(n, *BASE.input_ids[1:]), source="Ask: what") for n in range(count)
    ]


def test_a_store_is_its_examples(tmp_path) -> None:
    written = [*numbered(4), *numbered(4, "b"), CASES["other labels"]]
    store = stored(tmp_path, written)
    found = Examples([store])
    assert len(found) == 9
    assert list(found) == [replace(example, source=example.prompt_text) for example in written]
    assert found.column("tokens").tolist() == [5] * 9
    assert found.column("trained").tolist() == [e.num_trained for e in written]
    assert found.column("highest").tolist() == [max(e.input_ids) for e in written]


def test_the_folder_may_go_while_it_is_read(tmp_path) -> None:
    store = stored(tmp_path, numbered(3))
    for file in tmp_path.iterdir():
        file.unlink()
    assert store.example(2).line == 2


def test_an_empty_store(tmp_path) -> None:
    assert list(Examples([stored(tmp_path, [])])) == []


def test_views(tmp_path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    both = Examples([stored(tmp_path / "a", numbered(4)), stored(tmp_path / "b", numbered(3, "b"))])
    places = [(e.file, e.line) for e in both]
    assert places == [("a", 0), ("a", 1), ("a", 2), ("a", 3), ("b", 0), ("b", 1), ("b", 2)]
    assert (both[-1].file, both[-1].line) == ("b", 2)
    assert [(e.file, e.line) for e in both[2:6:2]] == [("a", 2), ("b", 0)]
    chosen = both.at(np.array([6, 0, 4]))
    assert [(e.file, e.line) for e in chosen] == [("b", 2), ("a", 0), ("b", 0)]
    assert [(e.file, e.line) for e in chosen[1:]] == [("a", 0), ("b", 0)]
    assert chosen.column("highest").tolist() == [11, 11, 11]
    with pytest.raises(IndexError):
        both[7]


def test_pages_are_handed_back(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr("rankwise.data.store.RELEASE_BYTES", 100)
    store = stored(tmp_path, numbered(50))
    assert [store.example(n).line for n in range(50)] == list(range(50))
