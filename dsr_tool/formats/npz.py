"""NumPy's .npz container: the same bytes for the same arrays, and a reader that trusts nothing in a file.

A .npz is a zip archive with one .npy file for each array. Nothing is unpacked to disk.
"""

from __future__ import annotations

import contextlib
import io
import math
import stat
import warnings
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np

from dsr_tool.errors import FormatError, UsageError, first_line
from dsr_tool.sparsity.tensor import Array

__all__ = ["NpzReader", "write_npz"]

_LEVEL = 9
"""The column indices of ResNet-50 at 0.9 are 11 % larger at level 6, which numpy takes, and 33 % larger at level 1."""
_MAX_DIRECTORY_BYTES = 4 << 20
_MAX_HEADER_BYTES = 1024
_MAX_RATIO = 1032
"""No deflate stream holds more than so many times its own bytes."""
_END, _END_BYTES = b"PK\x05\x06", 22
_LOCATOR64, _LOCATOR64_BYTES = b"PK\x06\x07", 20
_LOCAL_BYTES = 30
_LONGEST_REASON = 300
_ENCRYPTED = 1
_BY_UNIX = 3


def write_npz(path: Path, arrays: Mapping[str, Array]) -> None:
    """Write arrays as `numpy.savez_compressed` does, but smaller, and without a date.

    Raises:
        UsageError: more than 65,535 arrays or 4 GiB, the limits of zip files that every reader knows.
    """
    try:
        with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED, allowZip64=False) as archive:
            for name, array in arrays.items():
                file = io.BytesIO()
                np.lib.format.write_array(file, array, version=(1, 0), allow_pickle=False)
                # A member that is made like this is dated 1980, whenever it is written.
                member = zipfile.ZipInfo(f"{name}.npy")
                member.create_system, member.external_attr = _BY_UNIX, (stat.S_IFREG | 0o644) << 16
                archive.writestr(member, file.getbuffer(), zipfile.ZIP_DEFLATED, _LEVEL)
    except zipfile.LargeZipFile as error:
        raise UsageError(
            f"this model does not fit into a .npz file ({first_line(error)}); export an archive (.dsr) instead."
        ) from error


class NpzReader:
    """An open .npz file. Use it as a context manager.

    Attributes:
        path: where it lies.
        names: the arrays in it.
        nbytes: size of the file in bytes.
    """

    def __init__(self, path: Path) -> None:
        """Open a file and read its directory.

        Raises:
            FormatError: it is no zip file, or has members that no .npz has.
        """
        self.path = path
        with self._reading("it is not a .npz file, or it is cut off"):
            self.nbytes = self._check_end()
            self._zip = zipfile.ZipFile(path)
        members = self._zip.infolist()
        self._members = {member.orig_filename.removesuffix(".npy"): member for member in members}
        self.names = frozenset(self._members)
        try:
            self._check_members(members)
        except FormatError:
            self._zip.close()
            raise

    def __enter__(self) -> NpzReader:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._zip.close()

    def stored_bytes(self, name: str) -> int:
        """Bytes of one array as it lies in the file."""
        return self._members[name].compress_size

    @property
    def container_bytes(self) -> int:
        """Bytes of the zip file that are no arrays: a header for each, the directory and its end."""
        directory = self.nbytes - self._zip.start_dir
        with self.path.open("rb") as file:
            return directory + sum(_local_header_bytes(file, member) for member in self._members.values())

    def read(self, name: str, dtype: Any, shape: tuple[int, ...]) -> Array:
        """One array, which must have this type and shape; no more of it is unpacked than they need.

        Raises:
            FormatError: it has not, or it is damaged.
        """
        dtype, member = np.dtype(dtype), self._member(name)
        nbytes = math.prod(shape) * dtype.itemsize
        with self._reading(f"array {name!r} cannot be read"), self._zip.open(member) as file:
            found = _read_header(file)
            if found != (shape, False, dtype):
                raise self.damaged(f"array {name!r} is not of type {dtype} and shape {shape}")
            # Equal, so that reading ends at the end of the member, where its checksum is looked at.
            if member.file_size - file.tell() != nbytes:
                raise self.damaged(f"array {name!r} does not have the {nbytes:,} bytes that its shape takes")
            array: Array = np.frombuffer(file.read(nbytes), dtype).reshape(shape).copy()
        return array

    def read_bytes(self, name: str, most: int) -> bytes:
        """A one-dimensional array of bytes, whose length the file tells.

        Raises:
            FormatError: it is something else, longer than `most` bytes, or damaged.
        """
        member = self._member(name)
        if member.file_size > most:
            raise self.damaged(f"array {name!r} is larger than the {most:,} bytes allowed")
        with self._reading(f"array {name!r} cannot be read"), self._zip.open(member) as file:
            shape, _, _ = _read_header(file)
        return self.read(name, np.uint8, shape[:1]).tobytes()

    def damaged(self, what: str) -> FormatError:
        """The error that says what is wrong with this file, cut where the file itself makes it long."""
        shown = what if len(what) <= _LONGEST_REASON else f"{what[:_LONGEST_REASON]}..."
        return FormatError(f".npz file {str(self.path)!r} is damaged: {shown}; export it again or fetch a whole copy.")

    def _member(self, name: str) -> zipfile.ZipInfo:
        if name not in self._members:
            raise self.damaged(f"it has no array {name!r}")
        return self._members[name]

    def _check_end(self) -> int:
        """Look at the end of the file before zipfile does, which reads a directory of any size; returns the size."""
        with self.path.open("rb") as file:
            size = file.seek(0, io.SEEK_END)
            file.seek(max(size - _END_BYTES - _LOCATOR64_BYTES, 0))
            tail = file.read()
        end = tail[-_END_BYTES:]
        if not end.startswith(_END) or tail.startswith(_LOCATOR64):
            raise self.damaged("it does not end with the directory of a .npz file")
        if int.from_bytes(end[12:16], "little") > _MAX_DIRECTORY_BYTES:
            raise self.damaged(f"its directory has more than {_MAX_DIRECTORY_BYTES:,} bytes")
        return size

    def _check_members(self, members: list[zipfile.ZipInfo]) -> None:
        for member in members:
            name = member.orig_filename
            if name != member.filename or not name.endswith(".npy") or "/" in name or "\\" in name:
                raise self.damaged(f"member {name!r} is no array")
            if member.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED) or member.flag_bits & _ENCRYPTED:
                raise self.damaged(f"array {name!r} is compressed by another method than deflate, or encrypted")
            if member.file_size > _MAX_RATIO * member.compress_size:
                raise self.damaged(f"array {name!r} claims more bytes than its part of the file can hold")
        if len(self._members) != len(members):
            raise self.damaged("two of its arrays have one name")
        # So that what all of them unpack to is bounded by the size of the file.
        if sum(member.compress_size for member in members) > self.nbytes:
            raise self.damaged("its arrays overlap or reach beyond its end")

    @contextlib.contextmanager
    def _reading(self, what: str) -> Iterator[None]:
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("error")
                yield
        except (FormatError, MemoryError):
            raise
        except Exception as error:  # zipfile, zlib and numpy's parser of headers raise whatever they trip over
            raise self.damaged(f"{what} ({first_line(error)})") from error


def _read_header(file: Any) -> tuple[tuple[int, ...], bool, np.dtype[Any]]:
    """Shape, whether the order is Fortran's, and type of a .npy file, read up to its data."""
    version = np.lib.format.read_magic(file)
    # Later versions may announce a header of 4 GiB, and only names of fields need them.
    if version != (1, 0):
        raise ValueError(f"its .npy version is {version}")
    header: tuple[tuple[int, ...], bool, np.dtype[Any]]
    header = np.lib.format.read_array_header_1_0(file, max_header_size=_MAX_HEADER_BYTES)
    return header


def _local_header_bytes(file: Any, member: zipfile.ZipInfo) -> int:
    file.seek(member.header_offset + _LOCAL_BYTES - 4)
    lengths = file.read(4)
    return _LOCAL_BYTES + int.from_bytes(lengths[:2], "little") + int.from_bytes(lengths[2:], "little")
