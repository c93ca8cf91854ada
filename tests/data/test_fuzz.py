"""Whatever is in a file, reading it gives rows or problems, and rows that are read are those that were written."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rankwise.data.columns import Columns
from rankwise.data.config import WHOLE, DataConfig, Reading
from rankwise.data.encoder import Encoder
from rankwise.data.fields import RowError
from rankwise.data.file_kinds import COMPRESSIONS, FILE_KINDS
from rankwise.data.formats import FORMATS
from rankwise.data.readers.records import Record
from rankwise.data.rows import Row, Rows, read_rows
from rankwise.data.sources import parts
from rankwise.errors import RequestError
from tests import tiny
from tests.data.builders import FIXTURES, tokenizer_of
from tests.data.fuzzing import FREE_BYTES, ROWS, TALKS, TEXTS, VALUES, damaged, looking
from tests.data.test_file_kinds import CONTENTS, PACK
from tests.data.test_tools import ADDED, HERMES

SEEDS = sorted((FIXTURES / "fuzz").iterdir())
"""Files that long sessions found, each of which once was an exception."""


def check(path: Path, reading: Reading) -> Rows | None:
    """Rows and problems in good order, or None for a request that is refused in one line."""
    try:
        rows = read_rows(str(path), reading)
    except RequestError as error:
        assert error.message and "\n" not in error.message
        return None
    for problem in rows.problems:
        assert problem.line >= 1 and problem.reason and "\n" not in problem.reason and len(problem.reason) < 1000
    assert all(row.line >= 1 and row.turns for row in rows.rows)
    assert rows.rows or rows.problems, "a file never leaves nothing behind"
    return rows


READINGS = st.sampled_from(
    [Reading(), Reading("text"), Reading("messages"), Reading(text_rows="paragraph"),
     Reading(columns={"text": "{a}{text}"}), Reading(columns={"prompt": "text", "completion": "b.c.0"})]
)  # fmt: skip


@pytest.mark.parametrize("kind", FILE_KINDS)
def test_any_bytes_in_any_kind_of_file(tmp_path, kind):
    path = tmp_path / f"rows{FILE_KINDS[kind].suffixes[0]}"
    good = list(CONTENTS[kind].values())

    @looking(60)
    @given(content=st.one_of(FREE_BYTES, damaged(good)), reading=READINGS)
    def run(content: bytes, reading: Reading) -> None:
        path.write_bytes(content)
        check(path, reading)

    run()


@pytest.mark.parametrize("compression", COMPRESSIONS)
def test_any_bytes_in_any_compressed_file(tmp_path, compression):
    path = tmp_path / f"rows.jsonl{COMPRESSIONS[compression].suffix}"
    packed = PACK[compression](b'{"text": "some text"}\n' * 40)

    @looking(40)
    @given(content=st.one_of(FREE_BYTES, damaged([packed]), FREE_BYTES.map(PACK[compression])))
    def run(content: bytes) -> None:
        path.write_bytes(content)
        check(path, Reading())

    run()


def test_any_bytes_in_archives_and_files_without_a_name(tmp_path):
    import zipfile

    whole = io.BytesIO()
    with zipfile.ZipFile(whole, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("a.jsonl", b'{"text": "some text"}\n' * 40)
        archive.writestr("b.csv.gz", PACK["gzip"](b"text\nx\n"))

    @looking(60)
    @given(content=st.one_of(FREE_BYTES, damaged([whole.getvalue()])), name=st.sampled_from(["a.zip", "a", "a.gz"]))
    def run(content: bytes, name: str) -> None:
        (tmp_path / name).write_bytes(content)
        check(tmp_path / name, Reading())

    run()


@pytest.mark.parametrize("name", FORMATS)
def test_any_value_in_any_format(name):
    @looking(60)
    @given(row=ROWS)
    def run(row: dict[str, Any]) -> None:
        try:
            turns = FORMATS[name].turns(row)
        except RowError as reason:
            assert str(reason) and len(str(reason)) < 1000
            return
        assert turns and hash(turns) is not None
        assert FORMATS[name].turns(row) == turns

    run()


@pytest.mark.parametrize("template", [tiny.CHATML, HERMES, None])
def test_any_conversation_through_a_template(template):
    tokenizer = tokenizer_of(template, ADDED)
    config = DataConfig(train="unused", max_length=100)

    @looking(40)
    @given(talk=TALKS, tools=st.one_of(st.none(), VALUES))
    def run(talk: list[dict[str, Any]], tools: Any) -> None:
        try:
            turns = FORMATS["messages"].turns({"messages": talk, "tools": tools})
        except RowError:
            return
        try:
            chunk = Encoder(tokenizer, config, WHOLE).encode([Row("f", 1, turns)])
        except RequestError as error:
            assert error.message
            return
        assert len(chunk.problems) + chunk.counts.rows == 1
        for example in chunk.examples:
            assert len(example.input_ids) == len(example.labels) <= 100 and example.num_trained > 0
            trained = "".join(example.text[slice(*span)] for span in example.spans)
            silent = [turn.content.strip() for turn in turns if turn.role == "tool"]
            assert all(f"<tool_response>\n{text}" not in trained for text in silent)

    run()


@looking(100)
@given(mapping=st.dictionaries(TEXTS, st.one_of(TEXTS, st.text("{}ab.0!:[]", max_size=8)), max_size=3), row=ROWS)
def test_any_mapping_of_columns(mapping, row):
    try:
        columns = Columns(mapping)
        columns.check([(1, row)], "f", is_start=False)
        found = columns.apply(row)
    except (RequestError, RowError) as reason:
        assert str(reason)
        return
    assert set(found) <= set(mapping)


LINES = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), max_size=20)
CELLS = LINES.filter(lambda text: text.strip() == text and text != "")


def jsonl(rows: list[dict[str, Any]]) -> bytes:
    return "".join(json.dumps(row, ensure_ascii=len(str(row)) % 2 == 0) + "\n" for row in rows).encode()


def delimited(separator: str) -> Callable[[list[dict[str, Any]]], bytes]:
    def written(rows: list[dict[str, Any]]) -> bytes:
        text = io.StringIO()
        writer = csv.DictWriter(text, list(rows[0]), delimiter=separator, lineterminator="\r\n")
        writer.writeheader()
        writer.writerows(rows)
        return text.getvalue().encode()

    return written


def parquet(rows: list[dict[str, Any]]) -> bytes:
    sink = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(rows), sink)
    return sink.getvalue()


def arrow(rows: list[dict[str, Any]]) -> bytes:
    sink = io.BytesIO()
    table = pa.Table.from_pylist(rows)
    with pa.ipc.new_file(sink, table.schema) as writer:
        writer.write_table(table, max_chunksize=2)
    return sink.getvalue()


WRITERS: dict[str, Callable[[list[dict[str, Any]]], bytes]] = {
    "jsonl": jsonl,
    "json": lambda rows: json.dumps(rows, indent=1).encode(),
    "csv": delimited(","),
    "tsv": delimited("\t"),
    "parquet": parquet,
    "arrow": arrow,
}


@pytest.mark.parametrize("kind", WRITERS)
def test_what_was_written_is_read(tmp_path, kind):
    path = tmp_path / f"rows{FILE_KINDS[kind].suffixes[0]}"

    @looking(40)
    @given(rows=st.lists(st.fixed_dictionaries({"a": LINES, "b c": CELLS}), min_size=1, max_size=6))
    def run(rows: list[dict[str, str]]) -> None:
        path.write_bytes(WRITERS[kind](rows))
        (part,) = parts(str(path), "line")
        items = list(part.items())
        assert [item.value for item in items if isinstance(item, Record)] == rows
        assert len(items) == len(rows)

    run()


@looking(100)
@given(talk=TALKS)
def test_what_parses_is_the_same_in_every_kind_of_file(tmp_path_factory, talk):
    row = {"messages": talk}
    try:
        turns = FORMATS["messages"].turns(json.loads(json.dumps(row, allow_nan=False)))
    except (RowError, ValueError, TypeError):
        return
    folder = tmp_path_factory.mktemp("kinds")
    for kind in ("jsonl", "json"):
        path = folder / f"rows.{kind}"
        path.write_bytes(WRITERS[kind]([row]))
        found = read_rows(str(path), Reading("messages"))
        assert [each.turns for each in found.rows] == [turns]


@pytest.mark.parametrize("seed", SEEDS, ids=lambda seed: seed.name)
def test_seeds_that_long_sessions_found(seed):
    for reading in (Reading(), Reading("text"), Reading(text_rows="paragraph"), Reading(columns={"text": "{a}{text}"})):
        check(seed, reading)
