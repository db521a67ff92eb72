"""The geometry that convolutions and pools share: padding, output size, and one view per kernel entry."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from dsr_tool.errors import FormatError, UsageError
from dsr_tool.graph.limits import claim
from dsr_tool.sparsity.tensor import Array

__all__ = ["Window"]

Sizes = tuple[int, ...]

_MOST_TAPS = 1 << 18
"""Entries of a kernel, each of which takes a step in Python: those of a pool over 512 x 512 pixels."""


@dataclass(frozen=True)
class Window:
    """A kernel that slides over the last axes of an array.

    Attributes:
        kernel: entries per axis.
        strides: steps per axis.
        dilations: distance between kernel entries per axis.
        begin: padding before each axis.
        end: padding after each axis.
    """

    kernel: Sizes
    strides: Sizes
    dilations: Sizes
    begin: Sizes
    end: Sizes

    @classmethod
    def of(cls, kernel: Sizes, strides: Sizes, pads: Sizes, dilations: Sizes, auto_pad: str) -> Window:
        """From the attributes of a node, where an empty tuple means the default of the standard."""
        if auto_pad not in ("NOTSET", "VALID"):
            raise UsageError(f"auto_pad {str(auto_pad)[:40]!r} is not supported; export the model with explicit pads.")
        rank, entries = len(kernel), (*kernel, *strides, *dilations)
        lengths = (len(strides) or rank, len(dilations) or rank, len(pads) or 2 * rank)
        if lengths != (rank, rank, 2 * rank) or min(entries, default=1) < 1 or min(pads, default=0) < 0:
            raise FormatError(f"the window has sizes that do not go together (kernel {str(kernel)[:40]}).")
        if math.prod(kernel) > _MOST_TAPS:
            raise FormatError(f"the kernel has {math.prod(kernel):,} entries, more than the {_MOST_TAPS:,} allowed.")
        ones, zeros = (1,) * rank, (0,) * rank
        pads = pads if pads and auto_pad == "NOTSET" else zeros + zeros
        return cls(kernel, strides or ones, dilations or ones, pads[:rank], pads[rank:])

    def output_size(self, size: Sizes, *, ceil: bool = False) -> Sizes:
        """How often the kernel fits per axis into `size` with padding, rounded down or up."""
        out = []
        for n, k, s, d, begin, end in zip(
            size, self.kernel, self.strides, self.dilations, self.begin, self.end, strict=True
        ):
            room = n + begin + end - ((k - 1) * d + 1)
            count = (-(-room // s) if ceil else room // s) + 1
            # Rounded up, a window may start past the input: it would see padding alone.
            out.append(count - 1 if ceil and (count - 1) * s >= n + begin else count)
        return tuple(out)

    def padded(self, x: Array, out: Sizes, value: float = 0.0) -> Array:
        """`x` with exactly the border that `out` positions reach, filled with `value`; a view where it has none."""
        lead, size = x.shape[: -len(out)], x.shape[-len(out) :]
        reach = self._reach(out)
        if not any(self.begin) and all(r <= n for r, n in zip(reach, size, strict=True)):
            return x
        claim((*lead, *reach), x.dtype)
        result = np.full((*lead, *reach), value, x.dtype)
        inner = tuple(slice(b, min(b + n, r)) for b, n, r in zip(self.begin, size, reach, strict=True))
        kept = tuple(slice(0, part.stop - part.start) for part in inner)
        result[_last(inner)] = x[_last(kept)]
        return result

    def taps(self, padded: Array, out: Sizes) -> Iterator[Array]:
        """For each kernel entry in row-major order, the view (..., *out) of what it meets."""
        for offsets in itertools.product(*(range(k) for k in self.kernel)):
            starts = [i * d for i, d in zip(offsets, self.dilations, strict=True)]
            parts = zip(starts, out, self.strides, strict=True)
            yield padded[_last(slice(start, start + (n - 1) * s + 1, s) for start, n, s in parts)]

    def _reach(self, out: Sizes) -> Sizes:
        parts = zip(out, self.kernel, self.strides, self.dilations, strict=True)
        return tuple((n - 1) * s + (k - 1) * d + 1 for n, k, s, d in parts)


def _last(parts: Iterable[slice]) -> tuple[Any, ...]:
    """The index of these parts of the last axes."""
    return (..., *parts)
