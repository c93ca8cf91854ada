"""What bytes are read from: an open file, a decompressor of the standard library's or of pyarrow's, bytes in memory."""

from __future__ import annotations

from typing import IO, TYPE_CHECKING, Any, TypeAlias

if TYPE_CHECKING:
    Stream: TypeAlias = IO[bytes]
else:  # checked at run time, `IO` wants a `mode`, which bytes in memory and decompressors do not have
    Stream = Any
