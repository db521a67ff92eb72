"""Strict reader of safetensors files, which archives and mask files are.

The format and the writer are those of the `safetensors` package. Its reader takes the last of two equal names silently
and maps the file into memory. Archives come from strangers and are decoded within a memory limit, so they are read here
with plain reads, and anything ambiguous is refused.
"""

from __future__ import annotations

import math
import os
import threading
import weakref
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeGuard

import numpy as np

from dsr_tool.errors import FormatError
from dsr_tool.formats.documents import is_count, parse_json
from dsr_tool.sparsity.mask import MAX_RANK
from dsr_tool.sparsity.tensor import Array

__all__ = ["Stream", "TensorFile", "header_bytes", "is_safetensors"]

_LENGTH_BYTES = 8
"""Bytes before the header; they hold its length."""

_MIN_HEADER_BYTES = 2
"""Bytes of the shortest JSON object."""

_MAX_HEADER_BYTES = 64 << 20
"""Largest header, in bytes; it is parsed as a whole, so its length must not be believed without a limit."""

_MAX_ENTRIES = 1 << 48
"""Largest number of entries of an array, which keeps products of sizes and itemsizes within int64."""

_MAX_READ = 1 << 30
"""Most bytes per call of the system, which refuses 2 GiB on macOS."""

_SEEKING = threading.Lock()
"""Held between a seek and its read where the system has no read from an offset."""

_OTHER_FORMATS = {b"PK\x03\x04": "a zip file, as .npz and .pth files are", b"\x08": "an ONNX file"}
"""First bytes of files that are opened by mistake, for the error message."""

_TYPES = {
    "BOOL": "?",
    "U8": "u1",
    "I8": "i1",
    "I16": "<i2",
    "I32": "<i4",
    "I64": "<i8",
    "F16": "<f2",
    "F32": "<f4",
    "F64": "<f8",
}


@dataclass(frozen=True)
class Stream:
    """One named array of a file.

    Attributes:
        dtype: its numpy type, little-endian.
        shape: its shape.
        start: offset of its first byte in the file.
        nbytes: its length in bytes.
    """

    dtype: np.dtype[Any]
    shape: tuple[int, ...]
    start: int
    nbytes: int


class TensorFile:
    """An open safetensors file.

    Attributes:
        streams: the arrays by name.
        metadata: the texts of `__metadata__` by name.
        nbytes: size of the file in bytes.
        header_bytes: bytes before the first array: the length of the header, and the header.
    """

    def __init__(self, path: Path) -> None:
        """Reads and checks the header.

        Raises:
            FormatError: the file is not a safetensors file, has a name twice, or its arrays overlap or leave gaps.
            OSError: the file cannot be read.
        """
        self._file = path.open("rb", buffering=0)
        # The file stays open as long as this object, so decoding continues if the path is replaced meanwhile.
        weakref.finalize(self, self._file.close)
        self.nbytes = os.fstat(self._file.fileno()).st_size
        start = self._file.read(_LENGTH_BYTES)
        length = int.from_bytes(start, "little")
        self.header_bytes = _LENGTH_BYTES + length
        if not _MIN_HEADER_BYTES <= length <= _MAX_HEADER_BYTES or self.header_bytes > self.nbytes:
            other = next((kind for first, kind in _OTHER_FORMATS.items() if start.startswith(first)), "")
            raise FormatError(f"it looks like {other}" if other else f"its header claims {length:,} bytes")
        # The length is checked against the file first, so a claim of 64 MiB costs a hostile file 64 MiB.
        header = parse_json(self._read(_LENGTH_BYTES, length).tobytes(), "its header")
        metadata = header.pop("__metadata__", {})
        if not isinstance(metadata, dict) or not all(isinstance(text, str) for text in metadata.values()):
            raise FormatError("its metadata is not an object of strings")
        self.metadata: dict[str, str] = metadata
        self.streams = {name: self._stream(name, entry) for name, entry in header.items()}
        self._check_layout()

    def get(self, name: str) -> Array:
        """Reads one array.

        Raises:
            FormatError: the file has been cut since it was opened, or a truth value is neither 0 nor 1.
        """
        stream = self.streams[name]
        raw = self._read(stream.start, stream.nbytes)
        if stream.dtype == np.bool_ and raw.max(initial=0) > 1:
            raise FormatError("a truth value is neither 0 nor 1")
        return raw.view(stream.dtype).reshape(stream.shape)

    def _read(self, start: int, nbytes: int) -> Array:
        array, done = np.empty(nbytes, np.uint8), 0
        while done < nbytes:
            # A read may return less than was asked for.
            count = _read_at(self._file.fileno(), array.data[done : done + _MAX_READ], start + done)
            if not count:
                raise FormatError("it ends before its last array does")
            done += count
        return array

    def _stream(self, name: str, entry: object) -> Stream:
        """Returns the stream that an entry of the header describes; raises `FormatError` if it describes none."""
        shown = f"stream {name[:80]!r}"
        if not isinstance(entry, dict) or entry.keys() != {"dtype", "shape", "data_offsets"}:
            raise FormatError(f"{shown} is not described by dtype, shape and data_offsets")
        kind, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
        if not isinstance(kind, str) or kind not in _TYPES:
            raise FormatError(f"{shown} has type {str(kind)[:20]!r}; allowed are {', '.join(_TYPES)}")
        if not (_are_counts(shape) and _are_counts(offsets) and len(shape) <= MAX_RANK and len(offsets) == 2):
            raise FormatError(f"{shown} has a shape or offsets that are not lists of counts")
        # A size of 0 does not make the others harmless: numpy multiplies them as well.
        if math.prod(n or 1 for n in shape) > _MAX_ENTRIES:
            raise FormatError(f"{shown} claims more than 2^48 entries")
        dtype = np.dtype(_TYPES[kind])
        nbytes = math.prod(shape) * dtype.itemsize
        if offsets[1] - offsets[0] != nbytes:
            raise FormatError(f"{shown} has {offsets[1] - offsets[0]:,} bytes, but its shape needs {nbytes:,}")
        return Stream(dtype, tuple(shape), self.header_bytes + offsets[0], nbytes)

    def _check_layout(self) -> None:
        """Raises unless the streams fill the file from the header to its end, one after the other."""
        end = self.header_bytes
        # Empty streams share a start with the next one; sorted by size as well, they come first.
        for stream in sorted(self.streams.values(), key=lambda stream: (stream.start, stream.nbytes)):
            if stream.start != end:
                raise FormatError("its streams overlap or leave gaps")
            end += stream.nbytes
        if end != self.nbytes:
            raise FormatError(f"its streams end at byte {end:,}, but it has {self.nbytes:,} bytes")


def is_safetensors(start: bytes) -> bool:
    """Returns whether a file begins as safetensors files do, from its first nine bytes or more."""
    # Eight bytes are the length of the header, a JSON object. No header reaches 4 GiB, so four of them are zero;
    # without that test, any file with a brace as its ninth byte would count.
    return start[4:9] == b"\0\0\0\0{"


def header_bytes(path: Path) -> int:
    """Returns the bytes of a safetensors file before its first array, without checking the file."""
    with path.open("rb") as file:
        return _LENGTH_BYTES + int.from_bytes(file.read(_LENGTH_BYTES), "little")


def _read_at(file: int, buffer: memoryview, start: int) -> int:
    """Reads from an offset into a buffer, and returns the number of bytes.

    Threads, and processes that were forked from one another, share a file's position, so it is not used.
    """
    if hasattr(os, "preadv"):
        return os.preadv(file, [buffer], start)
    with _SEEKING:  # Windows, where nothing forks
        os.lseek(file, start, os.SEEK_SET)
        read = os.read(file, len(buffer))
    buffer[: len(read)] = read
    return len(read)


def _are_counts(values: object) -> TypeGuard[list[int]]:
    return isinstance(values, list) and all(map(is_count, values))
