"""Run lengths and byte planes, both Huffman-coded: the building blocks of the delta codec and of packed tensors.

`docs/format.md` describes every byte.
"""

from __future__ import annotations

import math
import zlib
from typing import Any

import numpy as np
import numpy.typing as npt

from dsr_tool.errors import FormatError
from dsr_tool.sparsity.mask import Mask
from dsr_tool.sparsity.tensor import Array

__all__ = ["decode_planes", "decode_runs", "encode_planes", "encode_runs", "gap_bytes", "inflate"]

_SKIP = 255
"""Byte of a run that moves by 255 positions without an entry there."""

_LEAST_SAVED = 16
"""A byte plane is Huffman-coded if that saves at least one byte in this many: decoding takes time, raw bytes take none.
The mantissa planes of trained weights shrink by 0 to 4 %, so they stay raw."""

_BLOCK = 1 << 16
"""Values that are rotated at a time, so that they stay in the cache."""

_RAW_DEFLATE = -15
"""Window bits by which zlib reads and writes deflate without a header, with the largest window (2^15 bytes)."""


def encode_runs(mask: Mask) -> npt.NDArray[np.uint8]:
    """Returns the gaps between the entries of the rarer symbol, Huffman-coded.

    The rarer symbol is the active entries if they are at most half, else the inactive ones. A gap is the number of
    positions between two entries; 255 of them are skipped by a byte of their own.

    Args:
        mask: any mask.
    """
    positions = mask.positions
    if mask.active * 2 > mask.size:
        positions = np.flatnonzero(~mask.to_bool().reshape(-1))
    return _deflate(gap_bytes(positions).tobytes())


def gap_bytes(positions: npt.NDArray[np.int64]) -> npt.NDArray[np.uint8]:
    """Returns the number of positions between each entry and the one before as a byte; a byte of 255 skips 255 of them.

    Args:
        positions: strictly increasing positions of the entries.
    """
    gaps = np.diff(positions, prepend=-1) - 1
    if gaps.size == 0 or gaps.max() < _SKIP:
        return gaps.astype(np.uint8)
    skips = gaps // _SKIP
    runs = np.full(len(gaps) + int(skips.sum()), _SKIP, dtype=np.uint8)
    runs[np.cumsum(skips + 1) - 1] = gaps % _SKIP
    return runs


def decode_runs(coded: npt.NDArray[np.uint8], shape: tuple[int, ...], active: int) -> Mask:
    """Returns the mask of coded runs, the inverse of `encode_runs`.

    Raises:
        FormatError: the runs are not those of a mask of this shape with `active` entries.
    """
    size = math.prod(shape)
    rarer = min(active, size - active)
    # One byte per entry, and one for every 255 positions skipped.
    raw = inflate(coded, rarer + size // _SKIP)
    runs = np.frombuffer(raw, np.uint8)
    # Each byte moves by its value plus one, except that the first starts before position 0.
    positions = runs.astype(np.int64)
    positions += 1
    positions[:1] -= 1
    if b"\xff" in raw:
        is_entry = runs != _SKIP
        positions -= ~is_entry
        positions = np.cumsum(positions, out=positions)[is_entry]
    else:
        np.cumsum(positions, out=positions)
    # Every step to an entry is at least one, so positions increase strictly and the last one is the largest.
    if len(positions) != rarer or (rarer and positions[-1] >= size):
        raise FormatError(f"a delta-coded mask does not hold {rarer} positions below {size}; the file is damaged.")
    if active == size:
        return Mask.full(shape)
    if active * 2 <= size:
        return Mask(shape, positions)
    flat = np.ones(size, dtype=np.bool_)
    flat[positions] = False
    return Mask(shape, np.flatnonzero(flat))


def encode_planes(values: Array, *, mantissas: bool = True) -> npt.NDArray[np.uint8]:
    """Returns the byte planes of values, each after its length and Huffman-coded if that makes it clearly smaller.

    Values are rotated left by one bit first, which puts the eight exponent bits of a float32 into one plane and the
    sign into the last place.

    Args:
        values: array of shape (n,).
        mantissas: whether planes below the exponents of floating-point values may be coded as well.
    """
    width = values.dtype.itemsize
    unsigned = np.ascontiguousarray(values).view(f"<u{width}")
    rotated = (unsigned << 1) | (unsigned >> (8 * width - 1))
    planes = np.ascontiguousarray(rotated).view(np.uint8).reshape(-1, width)
    pieces: list[bytes] = []
    for i in range(width):
        raw = planes[:, i].tobytes()
        may_code = mantissas or i == width - 1 or values.dtype.kind != "f"
        coded = _deflate(raw).tobytes() if may_code else raw
        plane = coded if len(coded) <= len(raw) - max(len(raw) // _LEAST_SAVED, 1) else raw
        pieces += [len(plane).to_bytes(8, "little"), plane]
    return np.frombuffer(b"".join(pieces), np.uint8)


def decode_planes(stream: npt.NDArray[np.uint8], count: int, dtype: np.dtype[Any]) -> Array:
    """Returns `count` values of type `dtype`, the inverse of `encode_planes`.

    Raises:
        FormatError: the stream does not hold exactly those.
    """
    width = dtype.itemsize
    planes = np.empty((count, width), dtype=np.uint8)
    raw, offset = memoryview(stream), 0  # type: ignore[arg-type]
    for i in range(width):
        length = int.from_bytes(raw[offset : offset + 8], "little")
        plane = raw[offset + 8 : offset + 8 + length]
        offset += 8 + length
        if length > count or offset > len(raw):
            raise FormatError(f"a byte plane does not hold {count} bytes; the file is damaged.")
        # The writer codes a plane only if that makes it shorter, so a full length means raw bytes.
        data = plane if length == count else inflate(plane, count)
        if len(data) != count:
            raise FormatError(f"a byte plane does not hold {count} bytes; the file is damaged.")
        planes[:, i] = np.frombuffer(data, np.uint8)
    if offset != len(raw):
        raise FormatError("the byte planes do not fill their stream; the file is damaged.")
    rotated = planes.reshape(-1).view(f"<u{width}")
    _rotate_right(rotated)
    # An array of booleans with other bytes is undefined behaviour in numpy.
    if dtype == np.bool_ and rotated.max(initial=0) > 1:
        raise FormatError("a truth value is neither 0 nor 1; the file is damaged.")
    return rotated.view(dtype)


def _rotate_right(values: npt.NDArray[np.unsignedinteger[Any]]) -> None:
    """Rotates unsigned integers right by one bit, in place and block by block."""
    sign_bit = 8 * values.itemsize - 1
    for start in range(0, len(values), _BLOCK):
        block = values[start : start + _BLOCK]
        sign = block << sign_bit
        block >>= 1
        block |= sign


def _deflate(data: bytes) -> npt.NDArray[np.uint8]:
    """Returns raw deflate with Huffman codes only: matching strings makes gaps and planes larger, not smaller."""
    encoder = zlib.compressobj(9, zlib.DEFLATED, _RAW_DEFLATE, 9, zlib.Z_HUFFMAN_ONLY)
    return np.frombuffer(encoder.compress(data) + encoder.flush(), np.uint8)


def inflate(data: Any, limit: int) -> bytes:
    """Returns the bytes of a raw deflate stream, and never allocates more than `limit` bytes for them.

    Args:
        data: bytes, or anything with the buffer protocol.
        limit: largest number of bytes allowed.

    Raises:
        FormatError: the stream holds more, is damaged, or does not end with its last byte.
    """
    decoder = zlib.decompressobj(_RAW_DEFLATE)
    try:
        raw = decoder.decompress(data, limit + 1)
    except zlib.error as error:
        raise FormatError(f"a coded stream cannot be decoded ({error}); the file is damaged.") from error
    if len(raw) > limit or not decoder.eof or decoder.unused_data:
        raise FormatError(f"a coded stream does not end where it should ({limit} bytes at most); the file is damaged.")
    return raw
