"""The base class of containers: everything that is specific to one kind of file stands in one class.

A new container is one file with a subclass of `Container`, and one line in `exporters/containers.py`. Modules with
containers import torch, onnx and scipy inside functions: the runtime loads the table to open a file without them.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from safetensors import SafetensorError, safe_open

from dsr_tool.errors import FileError
from dsr_tool.formats.tensor_file import is_safetensors
from exporters.values import PALETTE, VALUES

if TYPE_CHECKING:
    from dsr_tool.runtime.source import Model
    from exporters.checked import CheckedModel
    from exporters.contents import Contents
    from exporters.verify.result import Verification

__all__ = ["Container", "Draft", "ExportOptions", "Head"]

_ZIP, _ZIP_HEADER_BYTES = b"PK\x03\x04", 30
_HEAD_BYTES = _ZIP_HEADER_BYTES + (1 << 16)
"""Bytes of a file that are read to recognise it: a zip header and the longest name that may follow it."""


class Head:
    """The beginning of a file, by which a container recognises it; the name of the file does not count.

    Attributes:
        path: the file.
        start: its first bytes, 65,566 at most.
    """

    def __init__(self, path: Path) -> None:
        """Reads the first bytes of a file.

        Raises:
            FileError: the file cannot be read.
        """
        self.path = path
        try:
            with path.open("rb") as file:
                self.start = file.read(_HEAD_BYTES)
        except OSError as error:
            raise FileError(f"{str(path)!r} cannot be read: {error.strerror or error}.") from error

    @property
    def zip_member(self) -> bytes:
        """Name of the first member of a zip archive; empty for any other file."""
        if not self.start.startswith(_ZIP):
            return b""
        # Bytes 26 and 27 of a local file header are the length of the name, which follows the 30 bytes of the header.
        return self.start[_ZIP_HEADER_BYTES:][: int.from_bytes(self.start[26:28], "little")]

    @property
    def is_safetensors(self) -> bool:
        """True for a file that begins as safetensors files do, even if the rest of its header is damaged."""
        return is_safetensors(self.start)

    @cached_property
    def safetensors_metadata(self) -> Mapping[str, str] | None:
        """Metadata of a safetensors file; None if there is no header that can be read."""
        if not self.is_safetensors:
            return None
        try:
            # The library reads the header alone, and checks it; the tensors behind it are not touched.
            with safe_open(self.path, framework="np") as file:
                return dict(file.metadata() or {})
        except (SafetensorError, OSError, ValueError):
            return None


@dataclass(frozen=True)
class ExportOptions:
    """Settings of one export; `export` has compared them with what the container offers.

    Attributes:
        encoding: name of one of the container's encodings.
        values: one of the container's values.
        compact: True to remove channels that no active weight reaches.
        batch: number of inputs of one run, for containers that compile.
        levels: levels of the processor to compile for; all that the library holds if empty.
    """

    encoding: str = "auto"
    values: str = "fp32"
    compact: bool = False
    batch: int = 1
    levels: tuple[str, ...] = ()


@dataclass(frozen=True)
class Draft:
    """A model that is encoded for a container but not yet written.

    Attributes:
        write: fills the file at a path.
        notes: remarks for the user that belong to the export and not to its verification.
    """

    write: Callable[[Path], None]
    notes: tuple[str, ...] = ()


class Container(ABC):
    """One kind of file that models are written to.

    Attributes:
        name: value of `--to`, and the `kind` in reports and verifications.
        endings: endings of such files, the usual one first; a path with the ending of another container is refused.
        encodings: values of `--encoding`, ways in which sparse weights can be stored.
        values: values of `--values`, types in which weights can be stored.
        has_graph: True if the file holds a computation, so that sessions run it; such a container has a `reader`.
        holds: what such a file has instead of a computation, for messages.
        measurable: True if the file says which weights are sparse; such a container has a `measure`.
        compacts: True if dead channels can be removed from the graph that the file holds.
        compiles: True if the file holds a plan, which is made for one batch size and some levels of the processor.
        preprocesses: True if the file says how pictures become inputs.
    """

    name: ClassVar[str]
    endings: ClassVar[tuple[str, ...]]
    encodings: ClassVar[tuple[str, ...]]
    values: ClassVar[tuple[str, ...]] = tuple(name for name in VALUES if name != PALETTE)
    has_graph: ClassVar[bool] = False
    holds: ClassVar[str] = "weights and no computation"
    measurable: ClassVar[bool] = False
    compacts: ClassVar[bool] = False
    compiles: ClassVar[bool] = False
    preprocesses: ClassVar[bool] = False

    @abstractmethod
    def recognises(self, head: Head) -> bool:
        """Tells from the beginning of a file whether it is one of this container."""

    @abstractmethod
    def encode(self, checked: CheckedModel, options: ExportOptions) -> Draft:
        """Encodes a model; every check of the container's own runs here, before anything is written.

        Raises:
            UsageError: the container cannot hold the model with these options.
        """

    @abstractmethod
    def verify(self, path: Path, checked: CheckedModel, *, samples: int, seed: int) -> Verification:
        """Compares a file with its model: the weights bit for bit, and the outputs by running the file.

        Args:
            path: the file.
            checked: the model.
            samples: size of the second batch of random inputs; the first batch has one.
            seed: seed of the inputs.

        Raises:
            CheckFailed: the file holds another architecture.
            FormatError: the file is damaged.
        """

    def reader(self) -> Callable[[Path], Model]:
        """Imports the packages that opening a file needs, and returns the function that opens one for the runtime.

        The function raises `DsrError` if a package is missing, and `FormatError` for a damaged file. It is asked for
        only if `has_graph` is True.
        """
        raise NotImplementedError

    def measure(self, path: Path) -> Contents:
        """Decodes a file and counts the bytes of each part. It is called only if `measurable` is True.

        Raises:
            FormatError: the file is damaged.
        """
        raise NotImplementedError
