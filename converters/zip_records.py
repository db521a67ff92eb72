"""The records of a zip file that `torch.save` wrote: each tensor has one, and must not reach into another.

torch's reader checks neither. Of a file that is read as a memory map, it takes as many bytes as the pickle claims.
"""

from __future__ import annotations

import struct
import sys
import zipfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import BinaryIO

import torch

from dsr_tool.errors import FormatError
from dsr_tool.sparse.in_file import FileMaps

__all__ = ["OverlapError", "Records"]

_HEADER = struct.Struct("<26x2H")
"""A record's own header: the lengths of its name and of what follows that, behind 26 bytes."""


class OverlapError(FormatError):
    """Signals that two parts of a file claim the same bytes."""

    def __init__(self, what: str) -> None:
        """Takes what claims them, in the plural."""
        super().__init__(
            f"is refused: {what} reach into another record; it is damaged or hostile, so take the weights from "
            f"where they were made."
        )


@dataclass(frozen=True)
class Records:
    """The records of a zip file, which share no byte.

    Attributes:
        sizes: bytes of each record that is not empty, by the offset of its first byte in the file.
        plain: whether tensors have the same bytes in the file as in memory.
    """

    sizes: dict[int, int]
    plain: bool

    @classmethod
    def of(cls, file: BinaryIO) -> Records | None:
        """Reads the directory of an open file; None for one that is damaged, of which torch's reader says more.

        Raises:
            FormatError: two records share bytes.
        """
        try:
            archive = zipfile.ZipFile(file)
            records = sorted(archive.infolist(), key=lambda record: record.header_offset)
            starts = [_start(file, record) for record in records]
        except Exception:  # noqa: BLE001 - a damaged zip may raise anything; torch's reader has the last word
            return None
        following = [*(record.header_offset for record in records[1:]), archive.start_dir]
        for record, start, end in zip(records, starts, following, strict=True):
            if start + record.compress_size > end:
                raise OverlapError(f"the bytes of {record.filename[-80:]!r}")
        sizes = {start: record.compress_size for start, record in zip(starts, records, strict=True)}
        return cls({start: size for start, size in sizes.items() if size}, _plain(archive, records))

    def require_own(self, content: object) -> bool:
        """Checks that the tensors of a file that was read as a map lie in its records.

        Returns:
            False for a file with tensors of which that cannot be told, since they are no plain part of the map.

        Raises:
            FormatError: a tensor claims more bytes than its record has.
        """
        maps = FileMaps()
        for tensor in _tensors(content):
            if tensor.layout != torch.strided:
                return False
            storage = tensor.untyped_storage()
            if not storage.nbytes() or tensor.is_meta:
                continue
            place = maps.place(storage.data_ptr(), storage.nbytes())
            if place is None:
                return False
            if storage.nbytes() > self.sizes.get(place[1], 0):
                raise OverlapError(f"{storage.nbytes():,} bytes of a tensor of shape {tuple(tensor.shape)}")
        return True


def _plain(archive: zipfile.ZipFile, records: Sequence[zipfile.ZipInfo]) -> bool:
    """Returns whether no record is compressed and numbers have the byte order of this machine."""
    if any(record.compress_type != zipfile.ZIP_STORED for record in records):
        return False
    try:
        orders = {archive.read(record) for record in records if record.filename.endswith("/byteorder")}
    except Exception:  # noqa: BLE001 - see above
        return False
    return orders <= {sys.byteorder.encode()}


def _start(file: BinaryIO, record: zipfile.ZipInfo) -> int:
    """Returns the offset of a record's first byte."""
    file.seek(record.header_offset)
    name: int
    extra: int
    name, extra = _HEADER.unpack(file.read(_HEADER.size))
    return record.header_offset + _HEADER.size + name + extra


def _tensors(content: object) -> Iterator[torch.Tensor]:
    """Yields the tensors in nested mappings and sequences."""
    seen: set[int] = set()
    left = [content]
    while left:
        one = left.pop()
        if isinstance(one, torch.Tensor):
            yield one
        elif isinstance(one, (dict, list, tuple)) and id(one) not in seen:
            seen.add(id(one))  # a file may nest one object in itself
            left.extend(one.values() if isinstance(one, dict) else one)
