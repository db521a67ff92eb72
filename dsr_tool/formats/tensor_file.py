"""The container of archives: a safetensors file, read strictly.

The format is safetensors', and so is the writer. Its reader takes duplicate names without a word and maps the file into
memory, so that archives, which come from strangers and are decoded under a memory budget, are read here by plain reads.
"""

from __future__ import annotations

import json
import math
import os
import threading
import weakref
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from dsr_tool.errors import FormatError
from dsr_tool.sparsity.mask import MAX_RANK
from dsr_tool.sparsity.tensor import Array

__all__ = ["Container", "Stream", "parse_json", "whole"]

_MAX_HEADER_BYTES = 64 << 20
_LARGEST = 1 << 48
_OTHERS = {b"PK\x03\x04": "a zip file, as .npz and .pth files are", b"\x08": "an ONNX file"}
"""What files of other kinds start with, for those whose first bytes are the length of no header."""
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
    """One named array of the file.

    Attributes:
        dtype: its numpy type.
        shape: its shape.
        start: offset of its first byte in the file.
        nbytes: its length in bytes.
    """

    dtype: np.dtype[Any]
    shape: tuple[int, ...]
    start: int
    nbytes: int


class Container:
    """An open safetensors file.

    Attributes:
        streams: its arrays by name.
        metadata: its texts by name.
        nbytes: size of the file in bytes.
        header_bytes: bytes of it that are no array: the length of the header, and the header.
    """

    def __init__(self, path: Path) -> None:
        """Read and check the header.

        Raises:
            FormatError: it is no safetensors file, a name stands twice, or arrays overlap or leave gaps.
            OSError: it cannot be read.
        """
        self._file = path.open("rb", buffering=0)
        self._lock = threading.Lock()
        # The file stays open as long as this object lives, so that it may be replaced meanwhile.
        weakref.finalize(self, self._file.close)
        self.nbytes = os.fstat(self._file.fileno()).st_size
        start = self._file.read(8)
        length = int.from_bytes(start, "little")
        self.header_bytes = 8 + length
        if length > _MAX_HEADER_BYTES or not 10 <= self.header_bytes <= self.nbytes:
            other = next((kind for first, kind in _OTHERS.items() if start.startswith(first)), "")
            raise FormatError(f"it looks like {other}" if other else f"its header claims {length:,} bytes")
        header = parse_json(self._read(8, length).tobytes(), "its header")
        metadata = header.pop("__metadata__", {})
        if not isinstance(metadata, dict) or not all(isinstance(text, str) for text in metadata.values()):
            raise FormatError("its metadata are not texts")
        self.metadata: dict[str, str] = metadata
        self.streams = {name: self._stream(name, entry) for name, entry in header.items()}
        self._check_cover()

    def get(self, name: str) -> Array:
        """Read one array."""
        stream = self.streams[name]
        raw = self._read(stream.start, stream.nbytes)
        if stream.dtype == np.bool_ and raw.max(initial=0) > 1:
            raise FormatError("a truth value is neither 0 nor 1")
        return raw.view(stream.dtype).reshape(stream.shape)

    def _read(self, start: int, nbytes: int) -> Array:
        array, done = np.empty(nbytes, np.uint8), 0
        with self._lock:
            self._file.seek(start)
            while done < nbytes:
                count = self._file.readinto(memoryview(array)[done:])  # type: ignore[arg-type]
                if not count:
                    raise FormatError("it ends before its header says")
                done += count
        return array

    def _stream(self, name: str, entry: Any) -> Stream:
        if not isinstance(entry, dict) or entry.keys() != {"dtype", "shape", "data_offsets"}:
            raise FormatError(f"stream {name[:80]!r} is not described as a tensor")
        kind, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
        if not isinstance(kind, str) or kind not in _TYPES:
            raise FormatError(f"stream {name[:80]!r} is of type {str(kind)[:20]!r}, which archives do not have")
        if not (_whole_numbers(shape) and _whole_numbers(offsets) and len(shape) <= MAX_RANK and len(offsets) == 2):
            raise FormatError(f"stream {name[:80]!r} has a shape or place that is not understood")
        if math.prod(n or 1 for n in shape) > _LARGEST:  # numpy counts so, even where one of them is 0
            raise FormatError(f"stream {name[:80]!r} claims a shape that no array has")
        dtype = np.dtype(_TYPES[kind])
        nbytes = math.prod(shape) * dtype.itemsize
        if offsets[1] - offsets[0] != nbytes:
            raise FormatError(f"stream {name[:80]!r} has a place that does not fit its shape")
        return Stream(dtype, tuple(shape), self.header_bytes + offsets[0], nbytes)

    def _check_cover(self) -> None:
        """Raise unless the streams fill the file from the header to its end, one after the other."""
        end = self.header_bytes
        for stream in sorted(self.streams.values(), key=lambda stream: (stream.start, stream.nbytes)):
            if stream.start != end:
                raise FormatError("its streams overlap or leave gaps")
            end += stream.nbytes
        if end != self.nbytes:
            raise FormatError(f"its streams take {end:,} bytes, but it has {self.nbytes:,}")


def parse_json(raw: bytes, what: str) -> dict[str, Any]:
    """A JSON object in UTF-8 that names nothing twice.

    Raises:
        FormatError: it is anything else; the message starts with `what`.
    """
    try:
        document = json.loads(raw.decode("utf-8"), object_pairs_hook=_distinct)
    except (RecursionError, ValueError) as error:
        raise FormatError(f"{what} is not understood ({str(error)[:200]})") from error
    if not isinstance(document, dict):
        raise FormatError(f"{what} is not an object")
    return document


def whole(value: Any) -> bool:
    """Whether a value of a JSON document is a whole number of at least 0."""
    return type(value) is int and value >= 0


def _whole_numbers(values: Any) -> bool:
    return isinstance(values, list) and all(map(whole, values))


def _distinct(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    document = dict(pairs)
    if len(document) != len(pairs):
        twice, _ = Counter(name for name, _ in pairs).most_common(1)[0]
        raise ValueError(f"{twice[:80]!r} stands twice in it")
    return document
