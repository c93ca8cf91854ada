"""Parquet, Arrow and Feather files through pyarrow, a batch of rows at a time; `line` is the row's number.

A struct in Arrow has all its fields in every row: one that a row lacks is null there. Inside of a column such fields
are left out, or a conversation's turns would all have `tool_calls`, and a tool's schema every other tool's parameters.
Dates become ISO text, decimals their digits.
"""

from __future__ import annotations

import datetime
import decimal
import math
from collections.abc import Iterator, Sequence
from typing import Any

from rankwise.data.readers.records import Fault, Item, Record, UnreadableError, flaw, header_flaw
from rankwise.data.streams import Stream

BATCH_ROWS = 1000
_FILE_MAGIC = b"ARROW1"


def read_parquet(stream: Stream) -> Iterator[Item]:
    """The rows of a Parquet file.

    Raises: UnreadableError for a file that is not Parquet, or whose pages are damaged (from the first damaged row on).
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    first = 1
    try:
        with pq.ParquetFile(stream) as file:
            _check_columns(file.schema_arrow.names)
            for batch in file.iter_batches(batch_size=BATCH_ROWS, use_threads=False):
                yield from rows_of(batch, first)
                first += batch.num_rows
    except (pa.ArrowException, OSError, ValueError, MemoryError) as error:  # a damaged length asks for terabytes
        raise UnreadableError(f"can't be read as Parquet: {_short(error)}", first) from None


def read_arrow(stream: Stream) -> Iterator[Item]:
    """The rows of an Arrow file or stream (Feather 2 is an Arrow file).

    Raises: UnreadableError for a file that is neither, or is damaged (from the first damaged row on).
    """
    import pyarrow as pa

    first = 1
    try:
        head = stream.read(len(_FILE_MAGIC))
        stream.seek(0)
        if head == _FILE_MAGIC:
            with pa.ipc.open_file(stream) as file:
                _check_columns(file.schema.names)
                for number in range(file.num_record_batches):
                    batch = file.get_batch(number)
                    yield from _in_parts(batch, first)
                    first += batch.num_rows
        else:
            with pa.ipc.open_stream(stream) as batches:
                _check_columns(batches.schema.names)
                for batch in batches:
                    yield from _in_parts(batch, first)
                    first += batch.num_rows
    except (pa.ArrowException, OSError, ValueError, MemoryError) as error:  # a damaged length asks for terabytes
        raise UnreadableError(f"can't be read as Arrow: {_short(error)}", first) from None


def rows_of(batch: Any, first: int) -> Iterator[Item]:
    """The rows of a record batch or table, numbered from `first`."""
    try:
        found: Sequence[Any] = batch.to_pylist()
    except (ValueError, OverflowError) as error:  # text that is not UTF-8, a date that Python can't hold
        if batch.num_rows == 1:
            reason = "not UTF-8" if isinstance(error, UnicodeDecodeError) else f"a value can't be read: {_short(error)}"
            yield Fault(first, reason)
            return
        for index in range(batch.num_rows):
            yield from rows_of(batch.slice(index, 1), first + index)
        return
    for number, row in enumerate(found, start=first):
        try:
            value = {name: plain(cell) for name, cell in row.items()}
        except RecursionError:
            yield Fault(number, "lists and objects are nested too deep")
            continue
        wrong = flaw(value)
        yield Record(number, value) if wrong is None else Fault(number, wrong)


def plain(value: Any) -> Any:
    """A cell as a JSON file would hold it."""
    if isinstance(value, dict):
        return {name: plain(item) for name, item in value.items() if item is not None}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    if isinstance(value, (datetime.date, datetime.time)):
        return value.isoformat()
    if isinstance(value, (decimal.Decimal, datetime.timedelta)):
        return str(value)
    if isinstance(value, float) and math.isnan(value):  # how pandas writes a missing number
        return None
    return value


def _in_parts(batch: Any, first: int) -> Iterator[Item]:
    batch.validate(full=True)  # offsets that point outside would be read as they are
    for start in range(0, batch.num_rows, BATCH_ROWS):
        yield from rows_of(batch.slice(start, BATCH_ROWS), first + start)


def _check_columns(names: Sequence[str]) -> None:
    if wrong := header_flaw(names):
        raise UnreadableError(wrong)


def _short(error: Exception) -> str:
    if isinstance(error, MemoryError):
        return "it asks for more memory than there is"
    return " ".join(str(error).split())[:200].rstrip(".")
