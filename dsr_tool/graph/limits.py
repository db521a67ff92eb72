"""Memory limits of graphs that come out of files: a few bytes of a graph can ask for any amount of memory.

Whoever runs a graph sets a limit with `room`, and functions that make arrays call `claim` before they allocate.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Sequence
from contextvars import ContextVar

import numpy as np
import numpy.typing as npt

from dsr_tool.errors import FormatError
from dsr_tool.sparsity.mask import MAX_RANK
from dsr_tool.sparsity.tensor import Array

__all__ = ["FREE_BYTES", "claim", "numbers", "room"]

FREE_BYTES = 256 << 20
"""Bytes that every graph may use for one array, however small its input and weights are."""

_room: ContextVar[float] = ContextVar("room", default=math.inf)


@contextlib.contextmanager
def room(nbytes: float) -> Iterator[None]:
    """Grant the kernels called within at most so many bytes for each array that they make."""
    token = _room.set(nbytes)
    try:
        yield
    finally:
        _room.reset(token)


def claim(shape: Sequence[int], dtype: npt.DTypeLike) -> None:
    """Raise `FormatError` where an array of this shape and type would take more than the room there is.

    Neither does any value have so many dimensions: numpy's `take` crashes the process where it would make too many.
    """
    if len(shape) > MAX_RANK:
        raise FormatError(f"a value would have {len(shape)} dimensions, more than {MAX_RANK}.")
    nbytes = math.prod(shape) * np.dtype(dtype).itemsize
    if nbytes > _room.get():
        raise FormatError(f"a value would take {nbytes:.3g} bytes, more than a graph of this size is granted.")


def numbers(array: Array) -> list[int]:
    """Sizes or axes as Python's numbers, of as many axes as a value may have at most; pads have two for each."""
    if array.size > 2 * MAX_RANK:
        raise FormatError(f"{array.size:,} sizes or axes are given; no value has more than {MAX_RANK} dimensions.")
    result: list[int] = array.tolist()
    return result
