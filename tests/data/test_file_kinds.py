"""The same rows in every kind of file, compressed or not, alone and in folders and archives."""

from __future__ import annotations

import bz2
import csv
import datetime
import decimal
import gzip
import io
import json
import lzma
import zipfile
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.feather
import pyarrow.parquet as pq
import pytest

from rankwise.data.config import Reading
from rankwise.data.fields import Turn
from rankwise.data.file_kinds import COMPRESSIONS, FILE_KINDS, named_kind
from rankwise.data.readers.columnar import read_parquet
from rankwise.data.rows import read_rows
from rankwise.errors import RequestError
from tests.data.builders import turns

ROWS = [
    {"prompt": "plain", "completion": "text"},
    {"prompt": 'a "quote", a comma\tand a tab', "completion": "one\ntwo\r\nthree"},
    {"prompt": "über 🎉", "completion": "a\u2028b\u0085c"},
]
TURNS = [turns(row["prompt"], row["completion"]) for row in ROWS]


def delimited(separator: str) -> bytes:
    text = io.StringIO()
    writer = csv.DictWriter(text, ["prompt", "completion"], delimiter=separator, lineterminator="\n")
    writer.writeheader()
    writer.writerows(ROWS)
    return text.getvalue().encode()


def parquet() -> bytes:
    sink = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(ROWS), sink, row_group_size=2)
    return sink.getvalue()


def arrow() -> bytes:
    sink = io.BytesIO()
    pyarrow.feather.write_feather(pa.Table.from_pylist(ROWS), sink)
    return sink.getvalue()


def arrow_stream() -> bytes:
    sink = io.BytesIO()
    table = pa.Table.from_pylist(ROWS)
    with pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table)
    return sink.getvalue()


JSONL = "".join(json.dumps(row) + "\n" for row in ROWS).encode()
CONTENTS: dict[str, dict[str, bytes]] = {
    "jsonl": {"jsonl": JSONL, "crlf": JSONL.replace(b"\n", b"\r\n"), "no end": JSONL[:-1]},
    "json": {
        "list": json.dumps(ROWS, indent=2).encode(),
        "data": json.dumps({"version": "1", "data": ROWS}).encode(),
        "columns": json.dumps({key: [row[key] for row in ROWS] for key in ROWS[0]}).encode(),
        "lines": JSONL,
        "mark": b"\xef\xbb\xbf" + json.dumps(ROWS).encode(),
    },
    "csv": {"csv": delimited(","), "mark": b"\xef\xbb\xbf" + delimited(",")},
    "tsv": {"tsv": delimited("\t")},
    "parquet": {"parquet": parquet()},
    "arrow": {"feather": arrow(), "stream": arrow_stream()},
    "text": {"text": b"one\n\n  two\r\nthree"},
}


def zstd(content: bytes) -> bytes:
    sink = pa.BufferOutputStream()
    with pa.CompressedOutputStream(sink, "zstd") as stream:
        stream.write(content)
    return sink.getvalue().to_pybytes()


PACK: dict[str, Callable[[bytes], bytes]] = {
    "gzip": gzip.compress,
    "bzip2": bz2.compress,
    "xz": lzma.compress,
    "zstd": zstd,
}
TEXT_KINDS = [name for name, kind in FILE_KINDS.items() if not kind.seeks]


def test_every_kind_and_compression_is_here():
    assert set(CONTENTS) == set(FILE_KINDS)
    assert set(PACK) == set(COMPRESSIONS)


def expected(kind: str) -> list:
    return [turns_of_text(text) for text in ("one", "  two", "three")] if kind == "text" else TURNS


def turns_of_text(text: str) -> tuple[Turn, ...]:
    return (Turn("text", text),)


@pytest.mark.parametrize(("kind", "form"), [(kind, form) for kind, forms in CONTENTS.items() for form in forms])
def test_the_same_rows_in_every_kind(tmp_path, kind, form):
    for suffix in FILE_KINDS[kind].suffixes:
        path = tmp_path / f"rows{suffix}"
        path.write_bytes(CONTENTS[kind][form])
        found = read_rows(str(path))
        assert found.problems == ()
        assert [row.turns for row in found.rows] == expected(kind)
        assert f"{path}: " in found.why


def test_lines_are_those_where_rows_begin(tmp_path):
    lines = {}
    for kind, forms in CONTENTS.items():
        for form, content in forms.items():
            path = tmp_path / f"{form}{FILE_KINDS[kind].suffixes[0]}"
            path.write_bytes(content)
            lines[form] = [row.line for row in read_rows(str(path)).rows]
    assert lines == {
        "jsonl": [1, 2, 3], "crlf": [1, 2, 3], "no end": [1, 2, 3], "list": [2, 6, 10], "data": [1, 2, 3],
        "columns": [1, 2, 3], "lines": [1, 2, 3], "mark": [2, 3, 6], "csv": [2, 3, 6], "tsv": [2, 3, 6],
        "parquet": [1, 2, 3], "feather": [1, 2, 3], "stream": [1, 2, 3], "text": [1, 3, 4],
    }  # fmt: skip


@pytest.mark.parametrize("compression", COMPRESSIONS)
@pytest.mark.parametrize("kind", TEXT_KINDS)
def test_compressed_files(tmp_path, kind, compression):
    content = next(iter(CONTENTS[kind].values()))
    path = tmp_path / f"rows{FILE_KINDS[kind].suffixes[0]}{COMPRESSIONS[compression].suffix}"
    path.write_bytes(PACK[compression](content))
    found = read_rows(str(path))
    assert ([row.turns for row in found.rows], found.problems) == (expected(kind), ())
    assert found.why.endswith(f", {compression})")
    path.write_bytes(PACK[compression](content)[:-9])
    cut = read_rows(str(path))
    assert cut.problems[-1].of_file and len(cut.problems) == 1, "what a cut archive lacks is said"
    path.write_bytes(content)
    (problem,) = read_rows(str(path)).problems
    assert "can't be read" in problem.reason


@pytest.mark.parametrize("kind", ["parquet", "arrow"])
def test_columnar_files_are_not_compressed_again(tmp_path, kind):
    path = tmp_path / f"rows.{kind}.gz"
    path.write_bytes(gzip.compress(next(iter(CONTENTS[kind].values()))))
    (problem,) = read_rows(str(path)).problems
    assert "are compressed inside; decompress this one" in problem.reason


def test_archives(tmp_path):
    path = tmp_path / "rows.zip"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("b/rows.csv", CONTENTS["csv"]["csv"])
        archive.writestr("a.jsonl.gz", gzip.compress(JSONL))
        archive.writestr("README.md", "about")
    found = read_rows(str(path))
    assert found.problems == ()
    assert {row.file for row in found.rows} == {f"{path}/a.jsonl.gz", f"{path}/b/rows.csv"}
    assert [row.turns for row in found.rows] == [*TURNS, *TURNS]
    path.write_bytes(path.read_bytes()[:-30])
    (problem,) = read_rows(str(path)).problems
    assert problem.of_file and "can't be read" in problem.reason


def test_archives_without_rows_or_with_a_password(tmp_path):
    path = tmp_path / "rows.zip"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("README.md", "about")
    assert [problem.reason for problem in read_rows(str(path)).problems] == ["the archive holds no data files"]
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("rows.jsonl", JSONL)
    content = bytearray(path.read_bytes())
    for mark, flags in ((b"PK\x03\x04", 6), (b"PK\x01\x02", 8)):
        content[content.index(mark) + flags] |= 1
    path.write_bytes(content)
    assert [problem.reason for problem in read_rows(str(path)).problems] == ["is encrypted; unpack it first"]


def test_folders(tmp_path):
    (tmp_path / "part" / "deep").mkdir(parents=True)
    (tmp_path / "part" / "b.jsonl").write_bytes(JSONL)
    (tmp_path / "part" / "deep" / "a.csv").write_bytes(delimited(","))
    (tmp_path / "part" / "LICENSE").write_text("free")
    (tmp_path / "part" / "dataset_info.json").write_text("{}")
    (tmp_path / "part" / ".hidden.jsonl").write_text("no")
    (tmp_path / "part" / "deep" / "round").symlink_to(tmp_path / "part")
    found = read_rows(str(tmp_path / "part"))
    assert [Path(row.file).name for row in found.rows] == ["b.jsonl"] * 3 + ["a.csv"] * 3
    assert found.notes == (
        f"of the folder '{tmp_path}/part' left out, since they are no data files: LICENSE, dataset_info.json",
    )
    assert read_rows([str(tmp_path / "part" / "b.jsonl"), str(tmp_path / "part" / "deep")]).rows == found.rows
    (tmp_path / "empty.jsonl").mkdir()
    with pytest.raises(RequestError, match=r"the folder '.*empty.jsonl' holds no data files"):
        read_rows(str(tmp_path / "empty.jsonl"))


def test_a_folder_of_several_splits_is_refused(tmp_path):
    for name in ("train-00000.jsonl", "test-00000.jsonl"):
        (tmp_path / name).write_bytes(JSONL)
    with pytest.raises(RequestError, match=r"several splits \(train-00000.jsonl, test-00000.jsonl\)"):
        read_rows(str(tmp_path))
    assert len(read_rows(str(tmp_path / "train-*.jsonl")).rows) == 3


def test_paragraphs(tmp_path):
    path = tmp_path / "prose.txt"
    path.write_bytes(b"one\ntwo\n\n\nthree\r\n  four\n")
    found = read_rows(str(path), Reading(text_rows="paragraph"))
    assert [(row.line, row.turns[0].content) for row in found.rows] == [(1, "one\ntwo"), (5, "three\n  four")]


@pytest.mark.parametrize(
    ("name", "content", "kind"),
    [
        ("rows", JSONL, "JSONL"),
        ("rows.dat", b"  [" + JSONL.splitlines()[0] + b"]", "JSON"),
        ("rows.dat.gz", gzip.compress(JSONL), "JSONL, gzip"),
        ("rows.dat", parquet(), "Parquet"),
        ("rows.dat", arrow(), "Arrow"),
    ],
)
def test_names_that_say_nothing(tmp_path, name, content, kind):
    (tmp_path / name).write_bytes(content)
    found = read_rows(str(tmp_path / name))
    assert found.why.endswith(f"; {kind})")
    (tmp_path / name).write_bytes(b"neither\n" if not name.endswith(".gz") else gzip.compress(b"neither\n"))
    with pytest.raises(RequestError, match=r"the kind of the data file .* can't be told from its name or content"):
        read_rows(str(tmp_path / name))


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("rows.jsonl", gzip.compress(JSONL), "is jsonl by its name and gzip by its content"),
        ("rows.csv", parquet(), "is csv by its name and parquet by its content"),
        ("rows.jsonl.gz", bz2.compress(JSONL), "is gzip by its name and bzip2 by its content"),
        ("rows.json", JSONL.replace(b"\n", b",\n"), "not JSON"),
        ("rows.parquet", JSONL, "can't be read as Parquet"),
        ("rows.arrow", JSONL, "can't be read as Arrow"),
        ("rows.parquet", parquet()[:-20], "can't be read as Parquet"),
        ("rows.arrow", arrow()[:-20], "can't be read as Arrow"),
        ("rows.feather", b"FEA1" + bytes(40), "can't be read as Arrow"),
    ],
)
def test_content_that_is_not_what_the_name_says(tmp_path, name, content, words):
    (tmp_path / name).write_bytes(content)
    problems = read_rows(str(tmp_path / name)).problems
    assert words in problems[0].reason
    assert problems[0].of_file


def test_structs_lose_fields_that_are_null_inside(tmp_path):
    path = tmp_path / "rows.parquet"
    rows = [{"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a", "name": "x"}]}]
    pq.write_table(pa.Table.from_pylist(rows), path)
    with open(path, "rb") as stream:
        (item,) = read_parquet(stream)
    assert item.value == rows[0]


def test_cells_that_are_no_json(tmp_path):
    path = tmp_path / "rows.parquet"
    row = {
        "day": datetime.date(2024, 2, 3),
        "sum": decimal.Decimal("1.50"),
        "raw": b"\xff",
        "none": None,
        "nan": float("nan"),
    }
    pq.write_table(pa.Table.from_pylist([row]), path)
    with open(path, "rb") as stream:
        (item,) = read_parquet(stream)
    assert item.value == {"day": "2024-02-03", "sum": "1.50", "raw": b"\xff", "none": None, "nan": None}


def test_text_that_is_not_utf8_in_a_column(tmp_path):
    path = tmp_path / "rows.parquet"
    text = pa.array([b"good", b"\xff\xfe", b"fine"]).view(pa.string())
    pq.write_table(pa.table({"text": text}), path)
    found = read_rows(str(path))
    assert [row.line for row in found.rows] == [1, 3]
    assert [(problem.line, problem.reason) for problem in found.problems] == [(2, "not UTF-8")]


def test_kinds_by_name():
    assert named_kind("A.JSONL.GZ") == "jsonl"
    assert named_kind("rows.gz") is None
    assert named_kind("rows.csv.zst") == "csv"
