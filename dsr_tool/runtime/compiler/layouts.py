"""The layouts of values in memory: entries in order, or planes of pixels in the strip layout.

A grid has rows of `pitch` positions: its columns, and some that stay zero, which a kernel reaches when it steps past
either end of a row. The positions of a grid, row after row, are cut into as many strips as a vector has lanes; vector i
of a plane holds position i of every strip. A step to another pixel is then a step of whole vectors, for all lanes at
once. docs/runtime.md has the picture.

A value whose pixels are `factor` times as dense as the grid has factor x factor phases, one plane each, for every
channel: phase (a, b) holds the pixels (factor * y + a, factor * x + b). A convolution of stride 2 goes from a value of
factor 2, say, to one of factor 1 on the same grid.
"""

from __future__ import annotations

import math
import weakref
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from dsr_tool.runtime.compiler.packing import MAX_OFFSET

__all__ = ["Flat", "Grid", "Planes", "Rows", "Value", "same_layout"]

_Int = npt.NDArray[np.int32]

_MAX_CHANNEL_FLOATS = 1 << 28
"""Largest channel, in floats: the index tables of relayouts count its floats in int32."""

_masks: weakref.WeakValueDictionary[tuple[object, ...], _Int] = weakref.WeakValueDictionary()
"""Pixel masks by layout: all values that lie alike share one array, which lives as long as a plan uses it."""


@dataclass(frozen=True)
class Grid:
    """Rows and columns of positions.

    Attributes:
        rows: number of rows.
        columns: positions of a row that hold pixels.
        pad: positions at the end of each row that stay zero.
        lanes: floats in a vector of the kernels.
    """

    rows: int
    columns: int
    pad: int
    lanes: int

    @property
    def pitch(self) -> int:
        """Positions from one row to the next."""
        return self.columns + self.pad

    @property
    def length(self) -> int:
        """Vectors of a plane."""
        return -(-self.rows * self.pitch // self.lanes)

    def fits(self, height: int, width: int, factor: int) -> bool:
        """Returns whether height x width pixels fit at `factor` pixels per position in each direction."""
        return -(-height // factor) <= self.rows and -(-width // factor) <= self.columns


@dataclass(eq=False)
class Value:
    """A value of the graph, as one run of a segment sees it; where it lies is decided after all ops are known.

    Attributes:
        shape: shape of the whole value, the batch first.
    """

    shape: tuple[int, ...]

    @property
    def lead(self) -> int:
        """Floats between the start of its part of the arena and its first entry: the first halo."""
        return 0

    @property
    def size(self) -> int:
        """Floats that it needs in the arena."""
        raise NotImplementedError


@dataclass(eq=False)
class Flat(Value):
    """Entries in row-major order, as numpy has them.

    Attributes:
        lanes: floats in a vector of the kernels.
        batch: equal pieces that the value is computed in, one per run of the segment.
    """

    lanes: int
    batch: int

    @property
    def entries(self) -> int:
        """Floats of one piece."""
        return math.prod(self.shape) // self.batch

    @property
    def size(self) -> int:
        """Floats that it needs in the arena: whole vectors."""
        return -(-self.entries // self.lanes) * self.lanes


@dataclass(eq=False)
class Planes(Value):
    """Channels of pixels on a grid; shape (batch, channels, height, width).

    Halos grow while later nodes are lowered, so strides are final only when the segment ends. A value may become a part
    of another one, as the inputs of a concatenation do: neighbouring channels of it, in the same memory.

    Attributes:
        grid: the grid of its pixels.
        factor: pixels per position in each direction.
        nonnegative: no entry is negative.
        whole: the planes that it is a part of, which are part of no others; None where it has memory of its own.
        first_channel: its first channel among those.
    """

    grid: Grid
    factor: int
    nonnegative: bool = field(default=False, init=False)
    whole: Planes | None = field(default=None, init=False)
    first_channel: int = field(default=0, init=False)
    _before: int = field(default=0, init=False)
    _after: int = field(default=0, init=False)
    _zero_padded: bool = field(default=False, init=False)

    @property
    def root(self) -> Planes:
        """The planes that have the memory in which it lies."""
        return self if self.whole is None else self.whole

    @property
    def halo_before(self) -> int:
        """Vectors before each plane that kernels read."""
        return self.root._before

    @property
    def halo_after(self) -> int:
        """Vectors after each plane that kernels read."""
        return self.root._after

    @property
    def zero_padded(self) -> bool:
        """True if some op relies on zeros at positions without a pixel."""
        return self.root._zero_padded

    @zero_padded.setter
    def zero_padded(self, value: bool) -> None:
        self.root._zero_padded = value

    @property
    def phases(self) -> int:
        """Planes of one channel."""
        return self.factor * self.factor

    @property
    def channels(self) -> int:
        """Number of channels."""
        return self.shape[1]

    @property
    def stride(self) -> int:
        """Vectors from one plane to the next."""
        return self.grid.length + self.halo_before + self.halo_after

    @property
    def channel_step(self) -> int:
        """Floats from one channel to the next."""
        return self.phases * self.stride * self.grid.lanes

    @property
    def lead(self) -> int:
        """Floats before the first vector of the first plane."""
        return self.halo_before * self.grid.lanes

    @property
    def size(self) -> int:
        """Floats that it needs in the arena."""
        return self.channels * self.channel_step

    def extend_halo(self, before: int, after: int) -> bool:
        """Makes the halo at least this many vectors wide. Returns False if offsets would be out of range."""
        before, after = max(self.halo_before, before), max(self.halo_after, after)
        stride = self.grid.length + before + after
        # Offsets are 16 bits. The longest goes from the halo before the first plane to the one after the last.
        if (
            self.phases * stride - self.grid.length > MAX_OFFSET
            or self.phases * stride * self.grid.lanes > _MAX_CHANNEL_FLOATS
        ):
            return False
        self.root._before, self.root._after = before, after
        return True

    def become_part(self, whole: Planes, first_channel: int) -> None:
        """Makes it the channels from one on of other planes, whose grid is the same and whose halo is as wide."""
        whole.zero_padded = whole.zero_padded or self.zero_padded
        self.whole, self.first_channel = whole, first_channel

    def pixel_of_position(self) -> _Int:
        """Returns the number of the pixel at each position, (phases, length, lanes); -1 where there is none."""
        grid, f = self.grid, self.factor
        # Lane l of vector i is position l * length + i: strips lie side by side in the lanes.
        position = np.arange(grid.lanes * grid.length).reshape(grid.lanes, grid.length).T
        row, column = np.divmod(position, grid.pitch)
        a, b = np.divmod(np.arange(self.phases), f)
        y = row * f + a[:, None, None]
        x = column * f + b[:, None, None]
        inside = (y < self.shape[2]) & (x < self.shape[3]) & (column < grid.columns)
        return np.ascontiguousarray(np.where(inside, y * self.shape[3] + x, -1), np.int32)

    def offset_of_pixel(self) -> _Int:
        """Returns the floats from the channel's first vector to each pixel, (height, width)."""
        y, x = np.ogrid[: self.shape[2], : self.shape[3]]
        f = self.factor
        # The inverse of `pixel_of_position`, in floats of memory, halos included.
        position = (y // f) * self.grid.pitch + x // f
        plane = (y % f) * f + x % f
        lane, vector = np.divmod(position, self.grid.length)
        return np.asarray((plane * self.stride + vector) * self.grid.lanes + lane, np.int32)

    def mask(self) -> _Int:
        """Returns -1 at positions with a pixel and 0 elsewhere, (phases, length, lanes); shared by equal layouts."""
        key = (self.grid, self.factor, *self.shape[2:])
        mask = _masks.get(key)
        if mask is None:
            # As integers of all bits, since kernels apply it with one `and` for each vector.
            _masks[key] = mask = -(self.pixel_of_position() >= 0).astype(np.int32)
        return mask


class Rows(Planes):
    """Rows of features, such as the tokens of a transformer: features are the channels, rows the pixels.

    Its shape is (1, features, 1, rows), whatever axes the rows have in the graph.
    """


def same_layout(a: Value, b: Value) -> bool:
    """Returns whether the entries of two values of one shape lie in the same order."""
    if isinstance(a, Planes) and isinstance(b, Planes):
        return (a.grid, a.factor) == (b.grid, b.factor)
    return isinstance(a, Flat) and isinstance(b, Flat)
