"""A safetensors file as one mapped buffer: its tensors are views, and one pass over the buffer checks them all.

The format (huggingface/safetensors, "Format"): eight bytes, the header's length N, little-endian; N bytes of JSON, name
to {dtype, shape, data_offsets [begin, end)}; then the data, which the offsets cover without a gap or an overlap. All of
that is checked, so a torn or forged file can't reach beyond its own bytes. What the library does in 168 calls for an
adapter of 84 layers is one mapping here, and a look for nan and infinity one sum: most of what swapping costs.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import UInt8
from torch import Tensor

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


class _Torn(Exception):  # noqa: N818 (the reason only: the caller adds the file's name)
    """What is wrong with a file."""


def read_weights(path: Path) -> Weights:
    """All tensors of a safetensors file. Until they are copied they are the file's bytes, as the library's are.

    Raises: RequestError for a file that is torn, not of this format, or can't be read.
    """
    try:
        header, data = _parts(path)
        return _tensors(header, data)
    except (_Torn, OSError) as error:
        raise RequestError(f"'{path}' is torn or not a safetensors file: {error}") from None


def _parts(path: Path) -> tuple[dict[str, Any], UInt8[Tensor, " bytes"]]:
    """The header, and the data, mapped from the file (privately: a write to the tensors does not reach it)."""
    with open(path, "rb", buffering=0) as file:
        size = os.fstat(file.fileno()).st_size
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or length > min(size - 8, LONGEST_HEADER_BYTES):
            raise _Torn("its header is cut off")
        try:
            header = json.loads(file.read(length), object_pairs_hook=_once)
        except (ValueError, RecursionError):
            raise _Torn("its header is not JSON") from None
    if not isinstance(header, dict):
        raise _Torn("its header is no JSON object")
    return header, torch.from_file(str(path), shared=False, size=size, dtype=torch.uint8)[8 + length :]


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object in which no name stands twice: which of the two is meant, readers would not agree on."""
    found = dict(pairs)
    if len(found) != len(pairs):
        raise _Torn("its header has a name twice")
    return found


def _tensors(header: Mapping[str, Any], data: UInt8[Tensor, " bytes"]) -> Weights:
    entries = [(name, *_entry(name, entry)) for name, entry in header.items() if name != "__metadata__"]
    entries.sort(key=lambda entry: entry[3])
    place = 0
    for name, _, _, begin, end in entries:
        if begin != place:
            raise _Torn(f"the data of '{name}' does not begin where that before it ends")
        place = end
    if place != len(data):
        raise _Torn(f"it has {len(data)} bytes of data where its header speaks of {place}")
    dtypes = {dtype for _, dtype, *_ in entries}
    if len(dtypes) == 1:
        dtype = dtypes.pop()
        flat = data.view(dtype)
        parts = flat.split([(end - begin) // dtype.itemsize for *_, begin, end in entries])
        return Weights({entry[0]: part.view(entry[2]) for entry, part in zip(entries, parts, strict=True)}, flat)
    return Weights(
        {name: _cut(data, dtype, begin, end).view(shape) for name, dtype, shape, begin, end in entries}, None
    )


def _entry(name: str, entry: Any) -> tuple[torch.dtype, list[int], int, int]:
    """dtype, shape and offsets of a header's entry. Raises: _Torn for one that says what can't be."""
    wrong = _Torn(f"the header's entry for '{name}' can't be")
    try:
        dtype, shape, (begin, end) = DTYPES[entry["dtype"]], entry["shape"], entry["data_offsets"]
        fits = type(shape) is list and end - begin == math.prod(shape) * dtype.itemsize
        for size in (*shape, begin, end):
            fits = fits and type(size) is int and size >= 0
    except (KeyError, TypeError, ValueError):
        raise wrong from None
    if not fits:
        raise wrong
    return dtype, shape, begin, end


def _cut(data: UInt8[Tensor, " bytes"], dtype: torch.dtype, begin: int, end: int) -> Tensor:
    """The values that lie in these bytes; a copy of them where they are not aligned."""
    part = data[begin:end]
    return (part if begin % dtype.itemsize == 0 else part.clone()).view(dtype)
