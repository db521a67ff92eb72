"""Run lengths and byte planes, both Huffman-coded: what the delta codec and packed tensors are made of.

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

__all__ = ["decode_planes", "decode_runs", "encode_planes", "encode_runs", "inflate"]

_SKIP = 255
_LEAST_SAVED = 16
"""A byte plane is Huffman-coded where that saves at least one in so many bytes: decoding costs time, raw bytes none,
and the mantissa planes of trained weights shrink by 0 to 4 %."""
_BLOCK = 1 << 16
"""Values that are rotated at a time, so that they stay in the cache."""


def encode_runs(mask: Mask) -> npt.NDArray[np.uint8]:
    """Distances between entries of the rarer symbol, less one, Huffman-coded; 255 skips 255 positions, no entry."""
    positions = mask.positions
    if mask.active * 2 > mask.size:
        positions = np.flatnonzero(~mask.to_bool().reshape(-1))
    gaps = np.diff(positions, prepend=-1) - 1
    if gaps.size == 0 or gaps.max() < _SKIP:
        return _deflate(gaps.astype(np.uint8).tobytes())
    skips = gaps // _SKIP
    runs = np.full(len(gaps) + int(skips.sum()), _SKIP, dtype=np.uint8)
    runs[np.cumsum(skips + 1) - 1] = gaps % _SKIP
    return _deflate(runs.tobytes())


def decode_runs(coded: npt.NDArray[np.uint8], shape: tuple[int, ...], active: int) -> Mask:
    """The inverse of `encode_runs`.

    Raises:
        FormatError: the runs do not hold the positions of a mask of this shape with `active` entries.
    """
    size = math.prod(shape)
    rarer = min(active, size - active)
    # One byte an entry, and one for every 255 positions skipped.
    raw = inflate(coded, rarer + size // _SKIP)
    runs = np.frombuffer(raw, np.uint8)
    positions = runs.astype(np.int64)
    positions += 1
    positions[:1] -= 1
    if b"\xff" in raw:
        entry = runs != _SKIP
        positions -= ~entry
        positions = np.cumsum(positions, out=positions)[entry]
    else:
        np.cumsum(positions, out=positions)
    # Every step is at least one, so that the positions rise and the last is the largest.
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
    """Byte planes of the values rotated left by one bit, each behind its length, Huffman-coded where that helps.

    Rotating puts the eight exponent bits of a float32 into one plane and the sign last.

    Args:
        values: shape (n,).
        mantissas: whether to code the planes of floating-point numbers below the exponents too, where that helps.
    """
    width = values.dtype.itemsize
    unsigned = np.ascontiguousarray(values).view(f"<u{width}")
    rotated = (unsigned << 1) | (unsigned >> (8 * width - 1))
    planes = np.ascontiguousarray(rotated).view(np.uint8).reshape(-1, width)
    pieces: list[bytes] = []
    for i in range(width):
        raw = planes[:, i].tobytes()
        eligible = mantissas or i == width - 1 or values.dtype.kind != "f"
        coded = _deflate(raw).tobytes() if eligible else raw
        plane = coded if len(coded) <= len(raw) - max(len(raw) // _LEAST_SAVED, 1) else raw
        pieces += [len(plane).to_bytes(8, "little"), plane]
    return np.frombuffer(b"".join(pieces), np.uint8)


def decode_planes(stream: npt.NDArray[np.uint8], count: int, dtype: np.dtype[Any]) -> Array:
    """The inverse of `encode_planes`: `count` values of type `dtype`.

    Raises:
        FormatError: the stream does not hold exactly that.
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
        data = plane if length == count else inflate(plane, count)
        if len(data) != count:
            raise FormatError(f"a byte plane does not hold {count} bytes; the file is damaged.")
        planes[:, i] = np.frombuffer(data, np.uint8)
    if offset != len(raw):
        raise FormatError("the byte planes do not fill their stream; the file is damaged.")
    rotated = planes.reshape(-1).view(f"<u{width}")
    for start in range(0, count, _BLOCK):
        block = rotated[start : start + _BLOCK]
        sign = block << (8 * width - 1)
        block >>= 1
        block |= sign
    if dtype == np.bool_ and rotated.max(initial=0) > 1:
        raise FormatError("a truth value is neither 0 nor 1; the file is damaged.")
    return rotated.view(dtype)


def _deflate(data: bytes) -> npt.NDArray[np.uint8]:
    """Raw deflate with Huffman codes only: string matching makes gaps and planes larger, not smaller."""
    coder = zlib.compressobj(9, zlib.DEFLATED, -15, 9, zlib.Z_HUFFMAN_ONLY)
    return np.frombuffer(coder.compress(data) + coder.flush(), np.uint8)


def inflate(data: Any, most: int) -> bytes:
    """The bytes of a raw deflate stream; refuses streams that hold more than `most` bytes before making them.

    Args:
        data: bytes or an array of them.
        most: bytes allowed.

    Raises:
        FormatError: it holds more, is damaged, or does not end with its last byte.
    """
    coder = zlib.decompressobj(-15)
    try:
        raw = coder.decompress(data, most + 1)
    except zlib.error as error:
        raise FormatError(f"a coded stream cannot be decoded ({error}); the file is damaged.") from error
    if len(raw) > most or not coder.eof or coder.unused_data:
        raise FormatError(f"a coded stream does not end where it should ({most} bytes at most); the file is damaged.")
    return raw
