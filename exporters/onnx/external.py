"""External data: tensors of an ONNX file whose bytes lie in other files beside it.

The file of a stranger names these files. So nothing outside the folder of the ONNX file is ever opened, whatever the
name is or links to, and sizes are compared before anything is read.
"""

from __future__ import annotations

import math
import stat
from collections.abc import Iterable
from pathlib import Path, PurePosixPath, PureWindowsPath

import numpy as np
from onnx import TensorProto, helper

from dsr_tool.errors import FileError, FormatError

__all__ = ["bring_in"]

_KEYS = ("location", "offset", "length", "checksum")
"""Entries that the standard has; others are ignored, as it asks."""
_MOST_BYTES = (1 << 31) - (1 << 24)
"""Largest external data in bytes that is read: a parsed file ends at 2 GiB, as its parts are checked as one message."""
_MOST_USES = 4
"""Times that the bytes of a data file may be claimed: tied weights may share theirs, but a small file must not fill the
memory."""
_HALF_BYTES = frozenset(
    getattr(TensorProto, name) for name in ("UINT4", "INT4", "FLOAT4E2M1") if hasattr(TensorProto, name)
)
"""Types of which two entries share a byte."""


def bring_in(path: Path, tensors: Iterable[TensorProto]) -> int:
    """Reads external data into the tensors that refer to it; afterwards none does.

    Args:
        path: the ONNX file; its data lie in the same folder or below.
        tensors: its tensors, without negative sizes.

    Returns:
        The bytes of all data files together.

    Raises:
        FileError: a data file is missing or cannot be read.
        FormatError: a data file lies outside of the folder, or does not hold what the tensors claim.
    """
    reader = _Reader(path)
    for tensor in tensors:
        if tensor.data_location == TensorProto.EXTERNAL:
            tensor.raw_data = reader.read(tensor)
            tensor.ClearField("data_location")
        # Of tensors that hold their own data, these entries mean nothing. Only where they are: any change to a tensor
        # that an attribute lacks would give it one.
        if tensor.external_data:
            del tensor.external_data[:]
    return sum(reader.sizes.values())


class _Reader:
    """Reads the data of one ONNX file.

    Attributes:
        sizes: size of each data file that was read, in bytes, by its path.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._folder = path.absolute().parent.resolve()
        self._claimed = 0
        self.sizes: dict[Path, int] = {}

    def read(self, tensor: TensorProto) -> bytes:
        """Returns the bytes of a tensor."""
        entries = self._entries(tensor)
        file = self._inside(entries["location"])
        size = self._size(file)
        offset = self._count(tensor, entries, "offset", 0)
        nbytes = _nbytes(self._path, tensor)
        length = self._count(tensor, entries, "length", nbytes)
        if length != nbytes or offset + nbytes > size:
            raise FormatError(
                f"{str(self._path)!r}: tensor {tensor.name[:80]!r} of {nbytes:,} bytes claims {length:,} bytes at "
                f"{offset:,} of {file.name!r}, which has {size:,}; the files do not belong together, or are damaged."
            )
        self._claimed += nbytes
        if self._claimed > min(_MOST_USES * sum(self.sizes.values()), _MOST_BYTES):
            raise FormatError(
                f"{str(self._path)!r} claims more than {self._claimed - nbytes:,} bytes of external data from files of "
                f"{sum(self.sizes.values()):,} bytes; {_MOST_BYTES:,} bytes are read at most."
            )
        with file.open("rb") as stream:
            stream.seek(offset)
            content = stream.read(nbytes)
        if len(content) != nbytes:
            raise FileError(f"{str(file)!r} became shorter while it was read; read it again.")
        return content

    def _entries(self, tensor: TensorProto) -> dict[str, str]:
        pairs = [(entry.key, entry.value) for entry in tensor.external_data if entry.key in _KEYS]
        entries = dict(pairs)
        if len(entries) != len(pairs) or not entries.get("location"):
            raise FormatError(
                f"{str(self._path)!r}: tensor {tensor.name[:80]!r} names no file of its data, or several; the file is "
                f"damaged."
            )
        return entries

    def _inside(self, location: str) -> Path:
        """Returns the real path of a data file.

        Raises:
            FormatError: it is not in the folder of the ONNX file.
        """
        # Names of both systems, since a file may have been written on the other one.
        parts = {*PurePosixPath(location).parts, *PureWindowsPath(location).parts}
        absolute = PurePosixPath(location).is_absolute() or PureWindowsPath(location).anchor
        if absolute or ".." in parts or "\0" in location:
            raise self._outside(location)
        try:
            file = (self._folder / location).resolve()
        except (OSError, RuntimeError) as error:  # a name that is too long, or links in a circle
            raise self._outside(location) from error
        # After all links are followed.
        if not file.is_relative_to(self._folder):
            raise self._outside(location)
        return file

    def _outside(self, location: str) -> FormatError:
        return FormatError(
            f"{str(self._path)!r} keeps weights in {location[:120]!r}, which is not in its folder; data are read from "
            f"beside the file alone, so put both into one folder, without links."
        )

    def _size(self, file: Path) -> int:
        """Returns the size of a data file in bytes."""
        if file not in self.sizes:
            try:
                found = file.stat(follow_symlinks=False)
            except OSError as error:
                raise FileError(
                    f"{str(self._path)!r} keeps weights in {str(file)[:200]!r}, which cannot be read "
                    f"({error.strerror or error}); put that file beside it."
                ) from error
            # A device or a pipe could block or never end.
            if not stat.S_ISREG(found.st_mode):
                raise FormatError(f"{str(self._path)!r} keeps weights in {str(file)!r}, which is no plain file.")
            self.sizes[file] = found.st_size
        return self.sizes[file]

    def _count(self, tensor: TensorProto, entries: dict[str, str], key: str, default: int) -> int:
        text = entries.get(key, "")
        if not text:
            return default
        # ASCII digits alone: int() also takes signs, spaces and digits of other scripts.
        if not (text.isascii() and text.isdigit() and len(text) < 20):
            raise FormatError(
                f"{str(self._path)!r}: tensor {tensor.name[:80]!r} has the {key} {text[:40]!r}, which is no count of "
                f"bytes; the file is damaged."
            )
        return int(text)


def _nbytes(path: Path, tensor: TensorProto) -> int:
    """Returns the bytes that a tensor of its shape and type has."""
    size: int = math.prod(tensor.dims)
    if tensor.data_type in _HALF_BYTES:
        return -(-size // 2)
    try:
        dtype = np.dtype(helper.tensor_dtype_to_np_dtype(tensor.data_type))
    except (KeyError, TypeError) as error:
        raise FormatError(
            f"{str(path)!r}: tensor {tensor.name[:80]!r} has an unknown type; the file is damaged."
        ) from error
    if dtype.hasobject:
        raise FormatError(f"{str(path)!r}: tensor {tensor.name[:80]!r} holds text, which no other file may hold.")
    return size * dtype.itemsize
