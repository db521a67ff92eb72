"""The manifest of an archive: one entry per tensor, the names of streams, checksums, and the limit on decoded bytes."""

from __future__ import annotations

import zlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from dsr_tool.errors import FormatError
from dsr_tool.formats.codecs import is_codec
from dsr_tool.formats.documents import is_count
from dsr_tool.formats.grid import GRIDS
from dsr_tool.sparsity.layers import LayerSpec
from dsr_tool.sparsity.tensor import Array

__all__ = [
    "FORMAT_VERSION",
    "GRAPH",
    "MANIFEST",
    "METADATA",
    "PACKED",
    "Entry",
    "check_decoded_bytes",
    "crc32_of",
    "most_decoded_bytes",
    "packed_stream",
]

FORMAT_VERSION = (1, 2)
"""Major and minor version of the archives that are written. Readers refuse other majors and accept other minors."""

METADATA = "dsr_archive"
"""Key in the metadata of a safetensors file by which an archive is known."""

MANIFEST, GRAPH = ":manifest", ":graph"
"""Names of the streams that hold the two documents."""

PACKED = "packed"
"""Codec name of small dense tensors (norms, biases, buffers), which share one stream per dtype."""

_FREE_DECODED_BYTES, _MAX_DECODED_RATIO, _MAX_DECODED_BYTES = 256 << 20, 10_000, 16 << 30
"""A file may claim to decode to this many bytes plus this many times its own bytes, and never more than 16 GiB."""

_DTYPES = ("bool", "uint8", "int8", "int16", "int32", "int64", "float16", "float32", "float64")


@dataclass(frozen=True)
class Entry:
    """One tensor of the state_dict, as the manifest lists it.

    Attributes:
        spec: name, shape, role and the reason for the role.
        dtype: numpy name of the type of its values.
        codec: name of the codec that stores it, or `PACKED`.
        active: number of stored entries.
        crc32: checksum of each of its streams, by suffix.
    """

    spec: LayerSpec
    dtype: str
    codec: str
    active: int
    crc32: Mapping[str, int]

    @property
    def decoded_bytes(self) -> int:
        """Bytes of memory that decoding needs: the dense tensor, positions and a boolean mask, and rows of a grid."""
        # Decoding holds int64 positions and, for inverted runs, one byte per entry.
        sparse = 0 if self.active == self.spec.size else 8 * self.active + self.spec.size
        # A float32 scale and an int64 count; rows may have no entries, so their number is not bounded by the size.
        rows = 12 * self.spec.matrix_shape[0] if self.codec in GRIDS else 0
        return self.spec.size * np.dtype(self.dtype).itemsize + sparse + rows

    def stream(self, suffix: str) -> str:
        """Returns the name in the file of the stream with a suffix."""
        return f"{self.spec.name}:{suffix}" if suffix else self.spec.name

    def to_dict(self) -> dict[str, Any]:
        """Returns plain values for JSON."""
        return {
            **self.spec.to_dict(),
            "dtype": self.dtype,
            "codec": self.codec,
            "active": self.active,
            "crc32": dict(self.crc32),
        }

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Entry:
        """Returns the entry of plain values, the inverse of `to_dict`.

        Raises:
            FormatError: the dtype or codec is unknown, or a count or checksum is impossible.
        """
        data = dict(data)  # the caller's stays whole; LayerSpec ignores fields that are left
        dtype, codec, active, crc32 = (data.pop(key) for key in ("dtype", "codec", "active", "crc32"))
        spec = LayerSpec.from_dict(data)
        if dtype not in _DTYPES or (codec != PACKED and not is_codec(codec)):
            raise FormatError(
                f"tensor {spec.name!r} has type {dtype!r} and codec {codec!r}, which this version cannot read."
            )
        # Kernels and scipy compute with sparse weights; integers would fail there, far from the cause.
        if spec.role == "sparse" and not dtype.startswith("float"):
            raise FormatError(f"sparse tensor {spec.name!r} has type {dtype!r}, expected a floating-point type.")
        if not is_count(active) or active > spec.size:
            raise FormatError(f"tensor {spec.name!r} claims {active!r} active of {spec.size} entries.")
        if not all(map(is_count, crc32.values())) or (codec == PACKED and (crc32 or active < spec.size)):
            raise FormatError(f"tensor {spec.name!r} has checksums or a count that codec {codec!r} cannot have.")
        return cls(spec, dtype, codec, active, dict(crc32))


def check_decoded_bytes(path: Path, entries: Iterable[Entry], file_bytes: int, limit: int | None = None) -> None:
    """Refuses a file that claims to decode to too much, before anything is decoded.

    Args:
        path: the file, for the message.
        entries: all tensors that it lists.
        file_bytes: its size.
        limit: bytes allowed; None for `most_decoded_bytes(file_bytes)`.

    Raises:
        FormatError: the entries need more.
    """
    claimed = sum(entry.decoded_bytes for entry in entries)
    limit = most_decoded_bytes(file_bytes) if limit is None else limit
    if claimed > limit:
        raise FormatError(
            f"{str(path)!r} claims {claimed:,} bytes of weights, more than the {limit:,} allowed; raise "
            f"max_decoded_bytes if you trust the file."
        )


def most_decoded_bytes(file_bytes: int) -> int:
    """Returns the bytes that a file of this size may decode to: 10,000 times its size plus 256 MiB, at most 16 GiB."""
    return min(_FREE_DECODED_BYTES + _MAX_DECODED_RATIO * file_bytes, _MAX_DECODED_BYTES)


def packed_stream(dtype: str) -> str:
    """Returns the name of the stream with all packed tensors of a dtype."""
    return f":{PACKED}:{dtype}"


def crc32_of(array: Array) -> int:
    """Returns zlib's CRC-32 of the bytes of an array."""
    return zlib.crc32(np.ascontiguousarray(array).data)  # a view, not a copy as tobytes() would be
