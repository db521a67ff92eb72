"""The bytes of a plan file, piece by piece; `docs/format.md` describes them, and `plan_file.cpp` reads them.

Everything is little-endian and takes whole words of 8 bytes, so that the reader needs no offsets.
"""

from __future__ import annotations

import hashlib
import struct
import zlib
from collections.abc import Iterable

import numpy as np

from dsr_tool.formats.coding import gap_bytes
from dsr_tool.runtime.kernels.ops import ABI, LAYOUT
from dsr_tool.sparsity.at_rest import BitMask
from dsr_tool.sparsity.tensor import Array, SparseTensor

__all__ = ["MAGIC", "Tables", "Weights", "block", "counted", "document", "numbers", "string"]

MAGIC, VERSION = b"\x89DSRPLAN", 1
_TYPES = {np.dtype(np.float32): 0, np.dtype(np.int32): 1, np.dtype(np.int64): 2}
"""Numbers of the types of tables (TableType in check.h)."""
_FULL, _BITS, _DISTANCES = range(3)
"""Forms of the mask of a weight (WeightForm in stored.h)."""


def numbers(*values: int) -> bytes:
    """Returns whole numbers as words."""
    return struct.pack(f"<{len(values)}q", *values)


def block(content: bytes) -> bytes:
    """Returns bytes, filled up to whole words."""
    return content + bytes(-len(content) % 8)


def string(text: str) -> bytes:
    """Returns a text with its length; a zero ends it. Half of a surrogate pair, which JSON may hold, becomes `?`."""
    content = text.encode(errors="replace").replace(b"\0", b"") + b"\0"
    return numbers(len(content)) + block(content)


def document(body: bytes) -> bytes:
    """Returns a whole file: the head, with the checksum of the body, and the body."""
    total = len(MAGIC) + 40 + len(body)
    return MAGIC + numbers(VERSION, ABI, _layout_digest(), total, zlib.crc32(body)) + body


def _layout_digest() -> int:
    """Returns the sum of the checksums of all rows of the layout, modulo 2^32, as the library computes it."""
    return sum(zlib.crc32(f"{row.name} {int(row.number)} {row.nbytes}".encode()) for row in LAYOUT) % (1 << 32)


class Tables:
    """Arrays of numbers that ops read: biases, pixel masks, index tables. Equal ones are stored once."""

    def __init__(self) -> None:
        self._numbers: dict[bytes, int] = {}
        self._pieces: list[bytes] = []

    def add(self, array: Array) -> int:
        """Returns the number of an array, and stores it unless there is one like it.

        Args:
            array: float32, int32 or int64.
        """
        kind = _TYPES[array.dtype]
        content = np.ascontiguousarray(array).tobytes()
        key = hashlib.blake2b(bytes([kind]) + content).digest()
        if key not in self._numbers:
            self._numbers[key] = len(self._pieces)
            self._pieces.append(numbers(kind, array.size) + block(content))
        return self._numbers[key]

    def encode(self) -> bytes:
        """Returns the bytes of all arrays."""
        return numbers(len(self._pieces)) + b"".join(self._pieces)


class Weights:
    """Weights of products: values or codes, and masks. Equal ones are stored once, however many levels use them."""

    def __init__(self) -> None:
        self._numbers: dict[bytes, int] = {}
        self._pieces: list[bytes] = []

    def add(self, weight: SparseTensor) -> int:
        """Returns the number of a weight, and stores it unless there is one like it; its shape does not count."""
        form, mask = _mask_bytes(weight)
        values = np.ascontiguousarray(weight.values)
        head = numbers(form, values.itemsize, weight.mask.size, values.size, len(mask))
        content = head + block(mask) + block(values.tobytes())
        key = hashlib.blake2b(content).digest()
        if key not in self._numbers:
            self._numbers[key] = len(self._pieces)
            self._pieces.append(content)
        return self._numbers[key]

    def encode(self) -> bytes:
        """Returns the bytes of all weights."""
        return numbers(len(self._pieces)) + b"".join(self._pieces)


def _mask_bytes(weight: SparseTensor) -> tuple[int, bytes]:
    """Returns the form and the bytes of a mask: the smaller one of bits and distances."""
    mask = weight.mask
    if mask.active == mask.size:
        return _FULL, b""
    distances = gap_bytes(mask.positions)
    if len(distances) < -(-mask.size // 8):
        return _DISTANCES, distances.tobytes()
    bits = mask.bits if isinstance(mask, BitMask) else np.packbits(mask.to_bool())
    return _BITS, bits.tobytes()


def counted(pieces: Iterable[bytes]) -> bytes:
    """Returns a count, and pieces after it."""
    listed = list(pieces)
    return numbers(len(listed)) + b"".join(listed)
