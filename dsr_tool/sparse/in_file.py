"""Weights that stay in the file they come from, so that a conversion has one of them in memory at a time.

Such a parameter is a memory map of the file that nobody reads: pages of a map that were read are memory of the process,
for as long as a tensor of the file lives. `read` takes the bytes of one weight from the file instead, into memory that
is free again with the result.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import nn

from dsr_tool.errors import FormatError

__all__ = ["CAN_MAP", "FileMaps", "Made", "bring_in", "is_in_file", "read", "values_of"]

_MAPS = Path("/proc/self/maps")
CAN_MAP = _MAPS.exists()
"""True if this system tells which file a tensor is a map of, as Linux does."""
_PLACE = "_dsr_place"
"""Attribute of a parameter that stays in its file: where it lies there."""


@dataclass(frozen=True)
class _Place:
    """A place in a file, where a tensor lies.

    Attributes:
        path: path of the file.
        start: offset of the tensor's first byte.
        version: what `_version` returned when the tensor was kept there.
    """

    path: str
    start: int
    version: tuple[int, ...]


class FileMaps:
    """The files that are mapped into the memory of this process now."""

    def __init__(self) -> None:
        """Reads the system's list; it is empty where there is none."""
        self._ranges: list[tuple[int, int, str, int]] = []
        # Names of files are any bytes; the system writes those of line feeds as digits.
        for line in os.fsdecode(_MAPS.read_bytes()).split("\n")[:-1] if CAN_MAP else ():
            addresses, permissions, offset, _, inode, *path = line.split(maxsplit=5)
            first, last = (int(number, 16) for number in addresses.split("-"))
            if path and inode != "0" and permissions.endswith("p"):
                self._ranges.append((first, last, path[0], int(offset, 16)))

    def keep(self, tensor: torch.Tensor) -> nn.Parameter | None:
        """Returns a parameter that stays in its file, or None for a tensor that is no contiguous part of one.

        The values must not be changed.
        """
        first, nbytes = tensor.data_ptr(), tensor.numel() * tensor.element_size()
        if not tensor.is_contiguous() or tensor.is_neg():
            return None
        path, start = self.place(first, nbytes) or ("", 0)
        if not path or not Path(path).is_file():
            return None
        parameter = nn.Parameter(tensor, requires_grad=False)
        setattr(parameter, _PLACE, _Place(path, start, _version(Path(path).stat())))
        return parameter

    def place(self, address: int, nbytes: int) -> tuple[str, int] | None:
        """Returns the path of the file that some bytes are a map of, and their offset there; None for other memory."""
        for start, end, path, offset in self._ranges:
            if start <= address and address + nbytes <= end:
                return path, offset + address - start
        return None


def _version(status: os.stat_result) -> tuple[int, ...]:
    """Returns what changes when a file is written again: device, number, bytes and the time of the last write in ns."""
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns


def is_in_file(tensor: torch.Tensor) -> bool:
    """Returns whether a parameter stays in its file."""
    return hasattr(tensor, _PLACE)


@torch.no_grad()
def read(tensor: torch.Tensor) -> torch.Tensor:
    """Returns the values of a tensor without its history: for a parameter in a file, a copy in memory.

    Raises:
        FormatError: the file was written, replaced or removed since the parameter was kept there.
        OSError: it cannot be read.
    """
    place: _Place | None = getattr(tensor, _PLACE, None)
    if place is None:
        return tensor.detach()
    values = torch.empty(tensor.shape, dtype=tensor.dtype)
    raw = values.reshape(-1).view(torch.uint8).numpy()
    try:
        with Path(place.path).open("rb", buffering=0) as file:
            file.seek(place.start)
            done, count = 0, 1
            while done < len(raw) and count:
                count = file.readinto(raw[done:].data)
                done += count
            same = done == len(raw) and _version(os.fstat(file.fileno())) == place.version
    except FileNotFoundError:
        same = False
    if not same:
        raise FormatError(
            f"--weights file {place.path!r} was changed or removed while it was read; convert again once nothing "
            f"writes to it."
        )
    return values


def bring_in(module: nn.Module) -> None:
    """Gives a module's parameters memory of their own if they stay in a file, in place."""
    for parameter in module.parameters():
        if is_in_file(parameter):
            parameter.data = read(parameter)
            delattr(parameter, _PLACE)


class Made(Mapping[str, torch.Tensor]):
    """Tensors by name that are made when they are asked for, each time anew."""

    def __init__(self, makers: Mapping[str, Callable[[], torch.Tensor]]) -> None:
        """Takes what makes each tensor."""
        self._makers = makers

    def __getitem__(self, name: str) -> torch.Tensor:
        return self._makers[name]()

    def __contains__(self, name: object) -> bool:
        return name in self._makers  # without making it

    def __iter__(self) -> Iterator[str]:
        return iter(self._makers)

    def __len__(self) -> int:
        return len(self._makers)


def values_of(module: nn.Module) -> Made:
    """Returns the state_dict of a module in masked storage, with weights that stay in a file read on access."""
    return Made({name: partial(read, tensor) for name, tensor in module.state_dict(keep_vars=True).items()})
