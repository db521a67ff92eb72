"""What an operator is: a function of arrays, whose keyword parameters are the ONNX attributes by name.

Graphs come out of files, and a few bytes of one can ask for any amount of memory. So whoever runs one grants `room`,
and kernels `claim` what they make before they make it.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import math
from collections.abc import Callable, Iterator, Sequence
from contextvars import ContextVar
from typing import Any

import numpy as np
import numpy.typing as npt

from dsr_tool.core.container import MAX_RANK
from dsr_tool.core.graph import Array
from dsr_tool.errors import FormatError

__all__ = ["FREE_BYTES", "Kernel", "Table", "claim", "numbers", "room", "takes"]

FREE_BYTES = 256 << 20
"""Room that every graph has, however small its input and weights are."""

Kernel = Callable[..., Any]
Table = dict[str, Kernel]

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


@functools.cache
def takes(kernel: Kernel) -> tuple[int, float]:
    """How many inputs a kernel needs, and how many it takes at most."""
    if isinstance(kernel, np.ufunc):
        # Called with more, it would write into them.
        return kernel.nin, kernel.nin
    parameters = inspect.signature(kernel).parameters.values()
    positional = [parameter for parameter in parameters if parameter.kind is parameter.POSITIONAL_OR_KEYWORD]
    any_number = any(parameter.kind is parameter.VAR_POSITIONAL for parameter in parameters)
    needed = sum(parameter.default is parameter.empty for parameter in positional)
    return needed, math.inf if any_number else len(positional)
