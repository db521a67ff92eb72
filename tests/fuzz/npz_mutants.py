"""Mutants of zip files of numpy arrays, with correct checksums."""

from __future__ import annotations

import io
import struct
import warnings
import zipfile
from collections.abc import Sequence

from blind import TEXTS, any_bytes, choose
from numpy.random import Generator

__all__ = ["npz"]

BOMB_BYTES = 256 << 20
"""Size of a member that inflates without end; a quarter of the memory that a reader may take."""


def npz(random: Generator, corpus: Sequence[bytes]) -> bytes:
    """Makes a zip whose members are changed, renamed, duplicated, absent or without end, with correct checksums."""
    with zipfile.ZipFile(io.BytesIO(choose(random, corpus))) as source:
        members = [(name, source.read(name)) for name in source.namelist()]
    i = int(random.integers(len(members)))
    name, data = members[i]
    choice = random.random()
    if choice < 0.55:
        members[i] = name, _changed_array(random, data)
    elif choice < 0.65:
        members[i] = choose(random, (*TEXTS, "a/b.npy", "C:\\x.npy", members[0][0])) or "x", data
    elif choice < 0.75:
        members.append((name, choose(random, members)[1]))
    elif choice < 0.85:
        del members[i]
    elif choice < 0.98:
        other = int(random.integers(len(members)))
        members[i], members[other] = (name, members[other][1]), (members[other][0], data)
    else:
        members[i] = name, data + bytes(BOMB_BYTES)
    return _zipped(members)


def _changed_array(random: Generator, data: bytes) -> bytes:
    """Changes the values of an array in their own type, its header, or any byte."""
    choice = random.random()
    if choice < 0.3:
        return any_bytes(random, [data])
    end = data.index(b"\n") + 1 if b"\n" in data[:1000] else len(data)
    head, body = data[:end], bytearray(data[end:])
    if choice < 0.6:
        old, new = choose(random, _HEADER_CHANGES)
        return head.replace(old, new) + body
    for _ in range(int(random.integers(1, 4))):
        if len(body) >= 4:
            at = 4 * int(random.integers(len(body) // 4))
            body[at : at + 4] = struct.pack("<i", int(random.integers(-3, 2**31)) >> int(random.integers(32)))
    return head + bytes(body)


_HEADER_CHANGES = (
    (b"(", b"(9,"),
    (b",), }", b"00000000,), }"),
    (b"<i4", b"<i8"),
    (b"<i4", b"|O "),
    (b"<f4", b"|O8"),
    (b"<f4", b"<c8"),
    (b"False", b"True "),
    (b"<f4", b"<M8"),
    (b"'shape': (", b"'shape': (-1, "),
    (b"'shape'", b"'shope'"),
    (b"{", b"[" * 30 + b"{"),
)


def _zipped(members: Sequence[tuple[str, bytes]]) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as target, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # zipfile warns about duplicate names, which are meant here
        for name, data in members:
            target.writestr(zipfile.ZipInfo(name), data, compress_type=zipfile.ZIP_DEFLATED)
    return buffer.getvalue()
