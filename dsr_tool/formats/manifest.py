"""What an archive says about itself: names of streams, entries of the manifest, packed documents, checksums."""

from __future__ import annotations

import zlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from dsr_tool.errors import FormatError
from dsr_tool.formats.codecs import CODECS
from dsr_tool.formats.tensor_file import whole
from dsr_tool.sparsity.layers import LayerSpec
from dsr_tool.sparsity.tensor import Array

__all__ = [
    "FORMAT_VERSION",
    "GRAPH",
    "MANIFEST",
    "METADATA",
    "PACKED",
    "Entry",
    "check_claim",
    "container_header_bytes",
    "crc32_of",
    "most_decoded_bytes",
    "pack",
    "packed_stream",
    "unpack",
]

FORMAT_VERSION = (1, 0)
MANIFEST, GRAPH, METADATA = ":manifest", ":graph", "dsr_archive"
PACKED = "packed"
"""Codec of the many small tensors that share one stream per type: norms, biases and buffers."""
_MAX_DOCUMENT_BYTES = 64 << 20
_FREE_DOCUMENT_BYTES, _MAX_DOCUMENT_RATIO = 4 << 20, 256
_FREE_DECODED_BYTES, _MAX_DECODED_RATIO, _MAX_DECODED_BYTES = 256 << 20, 10_000, 16 << 30
_DTYPES = ("bool", "uint8", "int8", "int16", "int32", "int64", "float16", "float32", "float64")


@dataclass(frozen=True)
class Entry:
    """One tensor of the state_dict, as the manifest lists it.

    Attributes:
        spec: name, shape, role and reason.
        dtype: numpy name of its type.
        codec: how it is stored.
        active: entries that are stored.
        crc32: checksum of each stream, by suffix.
    """

    spec: LayerSpec
    dtype: str
    codec: str
    active: int
    crc32: Mapping[str, int]

    @property
    def nbytes_decoded(self) -> int:
        """Bytes of memory to decode it: the tensor, and unless all is active its positions and a bitmap."""
        sparse = 0 if self.active == self.spec.size else 8 * self.active + self.spec.size
        return self.spec.size * np.dtype(self.dtype).itemsize + sparse

    def stream(self, suffix: str) -> str:
        """Name of one of its streams in the container."""
        return f"{self.spec.name}:{suffix}" if suffix else self.spec.name

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return {
            **self.spec.to_dict(),
            "dtype": self.dtype,
            "codec": self.codec,
            "active": self.active,
            "crc32": dict(self.crc32),
        }

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Entry:
        """The inverse of `to_dict`.

        Raises:
            FormatError: a type or codec of another version, or a count that cannot be.
        """
        data = dict(data)
        dtype, codec, active, crc32 = (data.pop(key) for key in ("dtype", "codec", "active", "crc32"))
        spec = LayerSpec.from_dict(data)
        if dtype not in _DTYPES or (codec not in CODECS and codec != PACKED):
            raise FormatError(
                f"tensor {spec.name!r} has type {dtype!r} and codec {codec!r}, which this version cannot read."
            )
        if spec.role == "sparse" and not dtype.startswith("float"):
            raise FormatError(f"tensor {spec.name!r} is sparse and of type {dtype!r}; weights are of floating point.")
        if not whole(active) or not 0 <= active <= spec.size:
            raise FormatError(f"tensor {spec.name!r} claims {active!r} active of {spec.size} entries.")
        if not all(map(whole, crc32.values())) or (codec == PACKED and (crc32 or active < spec.size)):
            raise FormatError(f"tensor {spec.name!r} has checksums or a count that do not go with codec {codec!r}.")
        return cls(spec, dtype, codec, active, dict(crc32))


def check_claim(path: Path, entries: Iterable[Entry], file_bytes: int, most: int | None = None) -> None:
    """Raise `FormatError` where a file claims more than `most` bytes decoded; by its size when absent."""
    claimed = sum(entry.nbytes_decoded for entry in entries)
    most = most_decoded_bytes(file_bytes) if most is None else most
    if claimed > most:
        raise FormatError(
            f"{str(path)!r} claims {claimed:,} bytes of weights, more than the {most:,} allowed; raise "
            f"max_decoded_bytes if you trust the file."
        )


def most_decoded_bytes(file_bytes: int) -> int:
    """What a file of so many bytes may claim to hold decoded."""
    return min(_FREE_DECODED_BYTES + _MAX_DECODED_RATIO * file_bytes, _MAX_DECODED_BYTES)


def packed_stream(dtype: str) -> str:
    """Name of the stream that holds all packed tensors of one type."""
    return f":{PACKED}:{dtype}"


def container_header_bytes(path: Path) -> int:
    """Bytes of a safetensors file that are no tensor data: the length of its table, and the table."""
    with path.open("rb") as file:
        return 8 + int.from_bytes(file.read(8), "little")


def crc32_of(array: Array) -> int:
    """Zlib's checksum of the bytes of an array."""
    return zlib.crc32(np.ascontiguousarray(array).data)


def pack(document: str) -> Array:
    """A JSON document as compressed bytes."""
    return np.frombuffer(zlib.compress(document.encode("utf-8"), 9), np.uint8)


def unpack(packed: Array) -> bytes:
    """The inverse of `pack`, not decoded; raises `FormatError` for damage and for documents without end.

    A document may be 256 times as long as it is stored, or 4 MiB, so that small files are quick to refuse.
    """
    most = min(_FREE_DOCUMENT_BYTES + _MAX_DOCUMENT_RATIO * packed.nbytes, _MAX_DOCUMENT_BYTES)
    coder = zlib.decompressobj()
    try:
        raw = coder.decompress(packed.tobytes(), most)
    except zlib.error as error:
        raise FormatError(f"a document of the archive cannot be decoded ({error}); the file is damaged.") from error
    if not coder.eof or coder.unused_data:
        raise FormatError(f"a document of the archive does not end within {most:,} bytes; the file is damaged.")
    return raw
