"""Memory limits of graphs that come from files: a few bytes of a graph can ask for any amount of memory.

Code that runs a graph sets a limit with `memory_limit`; functions that make arrays call `claim` before they allocate.
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

__all__ = ["claim", "folding_limit", "int_list", "memory_limit", "running_limit"]

FREE_BYTES = 256 << 20
"""Bytes that any graph may use, however small its input and weights are."""
MAX_FOLDED_RATIO = 10
"""Bytes computed from the weights alone, per byte of weights (dense), that are allowed on top of `FREE_BYTES`."""
MAX_HELD_RATIO = 10_000
"""Bytes of values alive at once, per byte of input, that are allowed on top of `FREE_BYTES`."""

_limit: ContextVar[float] = ContextVar("limit", default=math.inf)


def folding_limit(weight_bytes: int) -> int:
    """Returns the bytes that may be computed from dense weights of `weight_bytes` alone."""
    return FREE_BYTES + MAX_FOLDED_RATIO * weight_bytes


def running_limit(input_bytes: int) -> int:
    """Returns the bytes that the values of one run may need at once for an input of `input_bytes`."""
    return FREE_BYTES + MAX_HELD_RATIO * input_bytes


@contextlib.contextmanager
def memory_limit(nbytes: float) -> Iterator[None]:
    """Limits every array that is claimed within to `nbytes`."""
    # A context variable: threads and tasks that run other graphs keep their own limits.
    token = _limit.set(nbytes)
    try:
        yield
    finally:
        _limit.reset(token)


def claim(shape: Sequence[int], dtype: npt.DTypeLike) -> None:
    """Raises `FormatError` if an array of this shape and type is over the limit or has too many dimensions."""
    # numpy's `take` crashes the process where its result would have more dimensions than numpy supports.
    if len(shape) > MAX_RANK:
        raise FormatError(f"a value would have {len(shape)} dimensions, over the limit of {MAX_RANK}.")
    nbytes, limit = math.prod(shape) * np.dtype(dtype).itemsize, _limit.get()
    if nbytes > limit:
        raise FormatError(f"a value would need {nbytes:.3g} bytes, over this graph's limit of {limit:.3g} bytes.")


def int_list(array: Array) -> list[int]:
    """Returns sizes, axes or pads as a list of Python integers; pads have two for each dimension."""
    if array.size > 2 * MAX_RANK:
        raise FormatError(f"{array.size:,} sizes or axes are given, but a value has at most {MAX_RANK} dimensions.")
    result: list[int] = array.tolist()
    return result
