"""NumPy's .npz container: a deterministic writer, and a reader for untrusted files.

A .npz is a zip archive with one .npy file (a "member") per array. Nothing is unpacked to disk.
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
from typing import IO, Any

import numpy as np
import numpy.typing as npt

from dsr_tool.errors import FormatError, UsageError, first_line
from dsr_tool.sparsity.tensor import Array

__all__ = ["NpzReader", "write_npz"]

_LEVEL = 9
"""Deflate level. Column indices of ResNet-50 at sparsity 0.9 are 11 % larger at numpy's level 6, 33 % at level 1."""

_MAX_DIRECTORY_BYTES = 4 << 20
"""Largest directory that is read: zipfile reads all of it, however large the file claims it to be."""

_MAX_HEADER_BYTES = 1024
"""Largest .npy header; numpy parses it as Python source, so its length is limited."""

_MAX_RATIO = 1032
"""Largest ratio of decompressed to compressed bytes that deflate can reach."""

_END, _END_BYTES = b"PK\x05\x06", 22
"""Signature and length of the record that ends a zip file, when it has no comment."""

_LOCATOR64, _LOCATOR64_BYTES = b"PK\x06\x07", 20
"""Signature and length of the record before it in a zip64 file."""

_LOCAL_BYTES = 30
"""Fixed part of a member's local header; a name and an extra field follow, with their lengths in its last 4 bytes."""

_MAX_REASON = 300
"""Characters of a reason that an error quotes."""

_ENCRYPTED = 1
_BY_UNIX = 3
"""Bit of a member's flags, and its creator system, as the zip format numbers them."""


def write_npz(path: Path, arrays: Mapping[str, Array]) -> None:
    """Writes arrays like `numpy.savez_compressed`, but smaller, and with the same bytes for the same arrays.

    Args:
        path: the file.
        arrays: arrays by name.

    Raises:
        UsageError: there are more than 65,535 arrays or 4 GiB, the limits of zip files without extensions.
    """
    try:
        with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED, allowZip64=False) as archive:
            for name, array in arrays.items():
                file = io.BytesIO()
                np.lib.format.write_array(file, array, version=(1, 0), allow_pickle=False)
                # A ZipInfo made by hand is dated 1980, so the time of writing does not change the bytes.
                member = zipfile.ZipInfo(f"{name}.npy")
                member.create_system, member.external_attr = _BY_UNIX, (stat.S_IFREG | 0o644) << 16
                archive.writestr(member, file.getbuffer(), zipfile.ZIP_DEFLATED, _LEVEL)
    except zipfile.LargeZipFile as error:
        raise UsageError(
            f"this model does not fit into a .npz file ({first_line(error)}); export an archive (.dsr) instead."
        ) from error


class NpzReader:
    """An open .npz file, to be used as a context manager.

    Attributes:
        path: path of the file.
        names: names of its arrays.
        nbytes: size of the file in bytes.
    """

    def __init__(self, path: Path) -> None:
        """Opens a file and checks its directory.

        Raises:
            FormatError: the file is not a zip file, or has members that a .npz file cannot have.
        """
        self.path = path
        with self._reading("it is not a .npz file, or it is cut off"):
            self.nbytes = self._check_end_record()
            self._zip = zipfile.ZipFile(path)
        members = self._zip.infolist()
        # orig_filename: zipfile cuts `filename` at a zero byte, so two members could pretend to have one name.
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
        """Returns the compressed bytes of one array."""
        return self._members[name].compress_size

    @property
    def container_bytes(self) -> int:
        """Bytes of the zip file that are not arrays: local headers, the directory and the record at its end."""
        directory = self.nbytes - self._zip.start_dir
        with self.path.open("rb") as file:
            return directory + sum(_local_header_bytes(file, member) for member in self._members.values())

    def read(self, name: str, dtype: npt.DTypeLike, shape: tuple[int, ...]) -> Array:
        """Returns one array. Nothing beyond the bytes that `dtype` and `shape` need is decompressed.

        Args:
            name: name of the array.
            dtype: the type that it must have.
            shape: the shape that it must have.

        Raises:
            FormatError: it is missing, has another type or shape, or is damaged.
        """
        dtype, member = np.dtype(dtype), self._member(name)
        nbytes = math.prod(shape) * dtype.itemsize
        with self._reading(f"array {name!r} cannot be read"), self._zip.open(member) as file:
            found = _read_header(file)
            if found != (shape, False, dtype):
                raise self.damaged(f"array {name!r} is not of type {dtype} and shape {shape}")
            # Reading must end at the end of the member, because zipfile compares the checksum there.
            if member.file_size - file.tell() != nbytes:
                raise self.damaged(f"array {name!r} does not have the {nbytes:,} bytes that its shape needs")
            array: Array = np.frombuffer(file.read(nbytes), dtype).reshape(shape).copy()
        return array

    def read_bytes(self, name: str, limit: int) -> bytes:
        """Returns a one-dimensional array of bytes, of the length that the file states.

        Args:
            name: name of the array.
            limit: largest number of bytes of the member, its .npy header included.

        Raises:
            FormatError: it is missing, of another type, longer than `limit`, or damaged.
        """
        member = self._member(name)
        if member.file_size > limit:
            raise self.damaged(f"array {name!r} is larger than the {limit:,} bytes allowed")
        with self._reading(f"array {name!r} cannot be read"), self._zip.open(member) as file:
            shape, _, _ = _read_header(file)
        return self.read(name, np.uint8, shape[:1]).tobytes()

    def damaged(self, what: str) -> FormatError:
        """Returns the error for a fault of this file; a reason that quotes long names is cut."""
        shown = what if len(what) <= _MAX_REASON else f"{what[:_MAX_REASON]}..."
        return FormatError(f".npz file {str(self.path)!r} is damaged: {shown}; export it again or fetch a whole copy.")

    def _member(self, name: str) -> zipfile.ZipInfo:
        if name not in self._members:
            raise self.damaged(f"it has no array {name!r}")
        return self._members[name]

    def _check_end_record(self) -> int:
        """Returns the size of the file; raises unless it ends with a plain end record and a directory of fair size."""
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
                raise self.damaged(f"member {name!r} is not an array")
            if member.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED) or member.flag_bits & _ENCRYPTED:
                raise self.damaged(f"array {name!r} is compressed by another method than deflate, or encrypted")
            if member.file_size > _MAX_RATIO * member.compress_size:
                raise self.damaged(f"array {name!r} claims more bytes than deflate can make of its part of the file")
        if len(self._members) != len(members):
            raise self.damaged("two of its arrays have the same name")
        # Members that share bytes could decompress to any multiple of the size of the file.
        if sum(member.compress_size for member in members) > self.nbytes:
            raise self.damaged("its arrays overlap or reach beyond its end")

    @contextlib.contextmanager
    def _reading(self, what: str) -> Iterator[None]:
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("error")  # numpy only warns about headers of old Pythons
                yield
        except (FormatError, MemoryError):
            raise
        except Exception as error:  # zipfile, zlib and numpy's parser of headers raise errors of many classes
            raise self.damaged(f"{what} ({first_line(error)})") from error


def _read_header(file: IO[bytes]) -> tuple[tuple[int, ...], bool, np.dtype[Any]]:
    """Returns shape, whether the order is Fortran's, and dtype of a .npy file, and leaves `file` at its data."""
    version = np.lib.format.read_magic(file)
    # Later versions allow headers of 4 GiB, and only structured arrays need them.
    if version != (1, 0):
        raise ValueError(f"its .npy version is {version}, expected (1, 0)")
    header: tuple[tuple[int, ...], bool, np.dtype[Any]]
    header = np.lib.format.read_array_header_1_0(file, max_header_size=_MAX_HEADER_BYTES)
    return header


def _local_header_bytes(file: IO[bytes], member: zipfile.ZipInfo) -> int:
    file.seek(member.header_offset + _LOCAL_BYTES - 4)
    lengths = file.read(4)
    return _LOCAL_BYTES + int.from_bytes(lengths[:2], "little") + int.from_bytes(lengths[2:], "little")
