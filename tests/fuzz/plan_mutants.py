"""Mutants of plan files whose checksums are right, so that recipes, tables and ops are what is checked."""

from __future__ import annotations

import struct
import zlib
from collections.abc import Sequence

from blind import choose
from numpy.random import Generator

__all__ = ["plan"]

_HEAD_BYTES = 48
"""Bytes before the body: eight that are the same in all plans, and five words."""
_NUMBERS = (0, 1, -1, 2, 3, 7, 8, 13, 255, 4096, 65536, 2**31 - 1, 2**31, 2**32 - 1, 2**40, 2**62, -(2**63))


def plan(random: Generator, corpus: Sequence[bytes]) -> bytes:
    """Changes one to three words of a plan, most of them in the part of one level, and corrects the checksum."""
    data = bytearray(choose(random, corpus))
    levels = _levels_of(data)
    for _ in range(int(random.integers(1, 4))):
        first = levels if random.random() < 0.9 else _HEAD_BYTES
        at = first + 8 * int(random.integers((len(data) - first) // 8))
        _change(random, data, at, levels)
    if random.random() < 0.05:
        del data[_HEAD_BYTES + 8 * int(random.integers((len(data) - _HEAD_BYTES) // 8)) :]
    data[32:48] = struct.pack("<2q", len(data), zlib.crc32(data[_HEAD_BYTES:]))
    return bytes(data)


def _levels_of(data: bytearray) -> int:
    """Returns where the levels begin: after the texts, the weights and the tables."""
    at = _HEAD_BYTES
    at += 8 + _padded(_word(data, at))
    count, at = _word(data, at), at + 8
    for _ in range(count):
        _form, width, _size, active, mask = struct.unpack_from("<5q", data, at)
        at += 40 + _padded(mask) + _padded(width * active)
    count, at = _word(data, at), at + 8
    for _ in range(count):
        kind, size = struct.unpack_from("<2q", data, at)
        at += 16 + _padded(size * (8 if kind == 2 else 4))
    return at


def _word(data: bytearray, at: int) -> int:
    return int(struct.unpack_from("<q", data, at)[0])


def _padded(size: int) -> int:
    return -(-size // 8) * 8


def _change(random: Generator, data: bytearray, at: int, levels: int) -> None:
    """Changes a word: to a number at the edge of some range, by a little, to another word, or one half of it."""
    choice, word = random.random(), _word(data, at)
    if choice < 0.3:
        word = choose(random, _NUMBERS)
    elif choice < 0.6:
        word += int(random.choice([-64, -8, -2, -1, 1, 2, 8, 64]))
    elif choice < 0.75:
        word = _word(data, levels + 8 * int(random.integers((len(data) - levels) // 8)))
    elif choice < 0.9:
        # Fields of 32 bits lie in pairs.
        struct.pack_into("<i", data, at + 4 * int(random.integers(2)), int(random.integers(-3, 20)))
        return
    else:
        word = word * int(random.choice([2, 3, 16])) + int(random.integers(2))
    struct.pack_into("<Q", data, at, word % (1 << 64))
