"""Windows: the geometry that convolutions and pools share (padding, output size, one view per tap)."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from types import EllipsisType

import numpy as np

from dsr_tool.errors import FormatError, UsageError
from dsr_tool.graph.limits import claim
from dsr_tool.sparsity.tensor import Array

__all__ = ["Window"]

Sizes = tuple[int, ...]

_MAX_TAPS = 1 << 18
"""Most taps of a kernel, as each costs a step in Python; enough for a pool over 512 x 512 pixels."""


@dataclass(frozen=True)
class Window:
    """A kernel that slides over the last axes of an array. A tap is one entry of the kernel.

    Attributes:
        kernel: taps per axis.
        strides: distance between neighbouring positions of the kernel, per axis.
        dilations: distance between neighbouring taps, per axis.
        begin: padding before the first entry of each axis.
        end: padding after the last entry of each axis.
    """

    kernel: Sizes
    strides: Sizes
    dilations: Sizes
    begin: Sizes
    end: Sizes

    @classmethod
    def of(cls, kernel: Sizes, strides: Sizes, pads: Sizes, dilations: Sizes, auto_pad: str) -> Window:
        """Creates a window from the attributes of a node; an empty tuple stands for the default of the standard.

        Raises:
            UsageError: `auto_pad` asks for padding that depends on the input's size.
            FormatError: the sizes have different ranks, are out of range, or the kernel has too many taps.
        """
        if auto_pad not in ("NOTSET", "VALID"):
            raise UsageError(f"auto_pad {str(auto_pad)[:40]!r} is not supported; export the model with explicit pads.")
        rank, entries = len(kernel), (*kernel, *strides, *dilations)
        lengths = (len(strides) or rank, len(dilations) or rank, len(pads) or 2 * rank)
        if lengths != (rank, rank, 2 * rank) or min(entries, default=1) < 1 or min(pads, default=0) < 0:
            raise FormatError(
                f"the window of kernel {str(kernel)[:40]} has sizes that are too small or of another rank."
            )
        if math.prod(kernel) > _MAX_TAPS:
            raise FormatError(f"the kernel has {math.prod(kernel):,} entries, over the limit of {_MAX_TAPS:,}.")
        ones, zeros = (1,) * rank, (0,) * rank
        # VALID means no padding, whatever pads says.
        pads = pads if pads and auto_pad == "NOTSET" else zeros + zeros
        return cls(kernel, strides or ones, dilations or ones, pads[:rank], pads[rank:])

    def output_size(self, size: Sizes, *, ceil: bool = False) -> Sizes:
        """Returns the number of positions per axis in an input of `size` with padding, rounded down or up."""
        out = []
        for n, k, s, d, begin, end in zip(
            size, self.kernel, self.strides, self.dilations, self.begin, self.end, strict=True
        ):
            slack = n + begin + end - ((k - 1) * d + 1)
            count = (-(-slack // s) if ceil else slack // s) + 1
            # Rounded up, the last window may start behind the input, where it would see padding only.
            out.append(count - 1 if ceil and (count - 1) * s >= n + begin else count)
        return tuple(out)

    def padded(self, x: Array, out: Sizes, value: float = 0.0) -> Array:
        """Returns `x` with as much border as `out` positions reach, filled with `value`; a view if that is none."""
        lead, size = x.shape[: -len(out)], x.shape[-len(out) :]
        reach = self._reach(out)
        if not any(self.begin) and all(r <= n for r, n in zip(reach, size, strict=True)):
            return x
        claim((*lead, *reach), x.dtype)
        result = np.full((*lead, *reach), value, x.dtype)
        inner = tuple(slice(b, min(b + n, r)) for b, n, r in zip(self.begin, size, reach, strict=True))
        # Positions that the strides skip at the end are cut off.
        source = tuple(slice(0, part.stop - part.start) for part in inner)
        result[_last(inner)] = x[_last(source)]
        return result

    def taps(self, padded: Array, out: Sizes) -> Iterator[Array]:
        """Yields for each tap, in row-major order, the view (..., *out) of the entries that it is multiplied by."""
        for offsets in itertools.product(*(range(k) for k in self.kernel)):
            starts = [i * d for i, d in zip(offsets, self.dilations, strict=True)]
            parts = zip(starts, out, self.strides, strict=True)
            yield padded[_last(slice(start, start + (n - 1) * s + 1, s) for start, n, s in parts)]

    def _reach(self, out: Sizes) -> Sizes:
        """Returns the entries per axis, padding included, that `out` positions cover."""
        parts = zip(out, self.kernel, self.strides, self.dilations, strict=True)
        return tuple((n - 1) * s + (k - 1) * d + 1 for n, k, s, d in parts)


def _last(parts: Iterable[slice]) -> tuple[EllipsisType | slice, ...]:
    """Returns an index that selects these parts of the last axes."""
    return (..., *parts)
