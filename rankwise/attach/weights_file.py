"""A safetensors file as one mapped buffer: its tensors are views, and one pass over the buffer checks them all.

The format (huggingface/safetensors, "Format"): eight bytes, the header's length N, little-endian; N bytes of JSON, name
to {dtype, shape, data_offsets [begin, end)}; then the data, which the offsets cover without a gap or an overlap. All of
that is checked, so a torn or forged file can't reach beyond its own bytes. What the library does in 168 calls for an
adapter of 84 layers is one mapping here, and a look for nan and infinity one sum: most of what swapping costs.
"""

from __future__ import annotations

import functools
import json
import math
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from jaxtyping import UInt8
from torch import Tensor
from torch._utils import _unflatten_dense_tensors

from rankwise.errors import RequestError

DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I64": torch.int64,
    "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2,
}  # fmt: skip
"""The format's names of torch's dtypes."""

LONGEST_HEADER_BYTES = 100_000_000
"""The format's own bound."""


@dataclass(frozen=True)
class Weights:
    """The tensors by name, in the order of the file, and where they have one dtype all of them as one vector."""

    tensors: dict[str, Tensor]
    flat: Tensor | None

    def not_finite(self) -> str | None:
        """The name of the first tensor with a value that is not finite, or None.

        A sum is finite only if every value is; one that is not (it may have overflowed) has each tensor looked at.
        """
        if self.flat is not None and self.flat.is_floating_point():
            wide = torch.promote_types(self.flat.dtype, torch.float32)
            if math.isfinite(float(self.flat.sum(dtype=wide))):
                return None
        for name, tensor in self.tensors.items():
            if tensor.is_floating_point() and not torch.isfinite(tensor.to(torch.float32)).all():
                return name
        return None


class _Entry(NamedTuple):
    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    begin: int
    end: int


class _Header(NamedTuple):
    """Tensors by their place in the data, their shapes as tensors without data, and how many bytes they are."""

    entries: list[_Entry]
    shapes: list[Tensor]
    has_one_dtype: bool
    num_bytes: int


class _Torn(Exception):  # noqa: N818 (the reason only: the caller adds the file's name)
    """What is wrong with a file."""


def read_weights(path: Path) -> Weights:
    """All tensors of a safetensors file. Until they are copied they are the file's bytes, as the library's are.

    Raises: RequestError for a file that is torn, not of this format, or can't be read.
    """
    try:
        with open(path, "rb", buffering=0) as file:
            size = os.fstat(file.fileno()).st_size
            length = int.from_bytes(file.read(8), "little")
            if size < 8 or length > min(size - 8, LONGEST_HEADER_BYTES):
                raise _Torn("its header is cut off")
            header = file.read(length)
        known = _entries(header)
        # mapped privately: a write to the tensors does not reach the file
        data = torch.from_file(str(path), shared=False, size=size, dtype=torch.uint8)[8 + length :]
        if known.num_bytes != len(data):
            raise _Torn(f"it has {len(data)} bytes of data where its header speaks of {known.num_bytes}")
    except (_Torn, OSError) as error:
        raise RequestError(f"'{path}' is torn or not a safetensors file: {error}") from None
    return _tensors(known, data)


@functools.lru_cache(maxsize=8)
def _entries(header: bytes) -> _Header:
    """What a file's header says.

    Adapters that are swapped for each other have the same header, so it is understood and checked once.

    Raises: _Torn for a header that is not JSON, or that says what can't be.
    """
    try:
        found = json.loads(header, object_pairs_hook=_once)
    except (ValueError, RecursionError):
        raise _Torn("its header is not JSON") from None
    if not isinstance(found, dict):
        raise _Torn("its header is no JSON object")
    entries = [_entry(name, entry) for name, entry in found.items() if name != "__metadata__"]
    entries.sort(key=lambda entry: entry.begin)
    place = 0
    for entry in entries:
        if entry.begin != place:
            raise _Torn(f"the data of '{entry.name}' does not begin where that before it ends")
        place = entry.end
    shapes = [torch.empty(entry.shape, dtype=entry.dtype, device="meta") for entry in entries]
    return _Header(entries, shapes, len({entry.dtype for entry in entries}) == 1, place)


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object in which no name stands twice: which of the two is meant, readers would not agree on."""
    found = dict(pairs)
    if len(found) != len(pairs):
        raise _Torn("its header has a name twice")
    return found


def _tensors(header: _Header, data: UInt8[Tensor, " bytes"]) -> Weights:
    entries = header.entries
    if header.has_one_dtype:
        flat = data.view(entries[0].dtype)
        # all views in one call: made one by one they cost as much as copying the adapter
        parts = _unflatten_dense_tensors(flat, header.shapes)
        return Weights({entry.name: part for entry, part in zip(entries, parts, strict=True)}, flat)
    return Weights({entry.name: _cut(data, entry) for entry in entries}, None)


def _entry(name: str, entry: Any) -> _Entry:
    """What a header says of a tensor. Raises: _Torn where it can't be."""
    try:
        dtype, shape, (begin, end) = DTYPES[entry["dtype"]], entry["shape"], entry["data_offsets"]
        fits = type(shape) is list and end - begin == math.prod(shape) * dtype.itemsize
        for size in (*shape, begin, end):
            fits = fits and type(size) is int and size >= 0
    except (KeyError, TypeError, ValueError):
        raise _Torn(f"the header's entry for '{name}' can't be") from None
    if not fits:
        raise _Torn(f"the header's entry for '{name}' can't be")
    return _Entry(name, dtype, tuple(shape), begin, end)


def _cut(data: UInt8[Tensor, " bytes"], entry: _Entry) -> Tensor:
    """The values that lie in these bytes; a copy of them where they are not aligned."""
    part = data[entry.begin : entry.end]
    return (part if entry.begin % entry.dtype.itemsize == 0 else part.clone()).view(entry.dtype).view(entry.shape)
