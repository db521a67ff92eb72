"""Weights that stay in the file they come from, so that a conversion has one of them in memory at a time.

Such a parameter is a memory map of the file that nobody reads: pages of a map that were read are memory of the process,
for as long as a tensor of the file lives. `read` takes the bytes of one weight from the file instead, into memory that
is free again with the result.
"""

from __future__ import annotations

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
"""Whether this system tells which file a tensor is a map of; Linux does."""
_PLACE = "_dsr_place"
"""Attribute of a parameter that stays in its file: where it lies there."""


@dataclass(frozen=True)
class _Place:
    """The first byte of a tensor in a file."""

    path: str
    start: int


class FileMaps:
    """The files that are mapped into the memory of this process now."""

    def __init__(self) -> None:
        """Reads the system's list; it is empty where there is none."""
        self._ranges: list[tuple[int, int, _Place]] = []
        for line in _MAPS.read_text().splitlines() if CAN_MAP else ():
            addresses, permissions, offset, _, inode, *path = line.split(maxsplit=5)
            first, last = (int(number, 16) for number in addresses.split("-"))
            if path and inode != "0" and permissions.endswith("p"):
                self._ranges.append((first, last, _Place(path[0], int(offset, 16))))

    def keep(self, tensor: torch.Tensor) -> nn.Parameter | None:
        """Returns a parameter that stays in its file, or None for a tensor that is no contiguous part of one.

        The values must not be changed.
        """
        first, nbytes = tensor.data_ptr(), tensor.numel() * tensor.element_size()
        for start, end, place in self._ranges:
            if start <= first and first + nbytes <= end and tensor.is_contiguous() and Path(place.path).is_file():
                parameter = nn.Parameter(tensor, requires_grad=False)
                setattr(parameter, _PLACE, _Place(place.path, place.start + first - start))
                return parameter
        return None


def is_in_file(tensor: torch.Tensor) -> bool:
    """Returns whether a parameter stays in its file."""
    return hasattr(tensor, _PLACE)


@torch.no_grad()
def read(tensor: torch.Tensor) -> torch.Tensor:
    """Returns the values of a tensor without its history: for a parameter in a file, a copy in memory.

    Raises:
        FormatError: the file is shorter than it was.
        OSError: it cannot be read.
    """
    place: _Place | None = getattr(tensor, _PLACE, None)
    if place is None:
        return tensor.detach()
    values = torch.empty(tensor.shape, dtype=tensor.dtype)
    raw = values.reshape(-1).view(torch.uint8).numpy()
    with Path(place.path).open("rb", buffering=0) as file:
        file.seek(place.start)
        done = 0
        while done < len(raw):
            count = file.readinto(raw[done:].data)
            if not count:
                raise FormatError(f"--weights file {place.path!r} was cut while it was read; convert again.")
            done += count
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
