"""Where the pixels of a value lie: planes on a grid, cut into strips, one strip a lane.

A grid has rows of `pitch` places: its columns, and some that stay zero, which a kernel reaches past either end of a
row. The places of a grid, row after row, are cut into as many strips as a vector has lanes; vector i of a plane holds
place i of every strip. A step to another pixel is then a step of whole vectors for all lanes at once.

A value whose pixels are `factor` times as dense as the grid has factor x factor planes for each channel: plane (a, b)
holds the pixels (factor * y + a, factor * x + b). A convolution with strides goes from a value of factor 2, say, to
one of factor 1 on the same grid.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from dsr_tool.runtime.compiler.packing import FARTHEST

__all__ = ["Flat", "Grid", "Planes", "Rows", "Value"]

_Int = npt.NDArray[np.int32]

_MOST_FLOATS = 1 << 28
"""Of one channel, whose places are counted in 32 bits."""


@dataclass(frozen=True)
class Grid:
    """Rows and columns of places.

    Attributes:
        rows: of places.
        columns: of places that hold pixels.
        pad: places that stay zero at the end of each row.
        lanes: floats in a vector of the kernels.
    """

    rows: int
    columns: int
    pad: int
    lanes: int

    @property
    def pitch(self) -> int:
        """Places from one row to the next."""
        return self.columns + self.pad

    @property
    def length(self) -> int:
        """Vectors in a plane."""
        return -(-self.rows * self.pitch // self.lanes)

    def fits(self, height: int, width: int, factor: int) -> bool:
        """Whether so many pixels have a place."""
        return -(-height // factor) <= self.rows and -(-width // factor) <= self.columns


@dataclass(eq=False)
class Value:
    """What one image has of a value, in the arena or in an array of the caller.

    Attributes:
        shape: of the whole value, the batch first.
        space: 0 for the arena, else the number of an array.
        offset: floats from the start of the space.
        first: index of the operation that makes it.
        last: index of the last one that reads it.
    """

    shape: tuple[int, ...]
    space: int = field(default=0, init=False)
    offset: int = field(default=0, init=False)
    first: int = field(default=-1, init=False)
    last: int = field(default=-1, init=False)

    @property
    def lead(self) -> int:
        """Floats before what `offset` points to."""
        return 0

    @property
    def size(self) -> int:
        """Floats in the arena."""
        raise NotImplementedError


@dataclass(eq=False)
class Flat(Value):
    """Entries in row-major order, as numpy has them.

    Attributes:
        lanes: floats in a vector of the kernels.
        batch: equal pieces that the value is computed in, one after the other.
    """

    lanes: int
    batch: int

    @property
    def entries(self) -> int:
        """Floats of one piece."""
        return math.prod(self.shape) // self.batch

    @property
    def size(self) -> int:
        """Floats in the arena: whole vectors."""
        return -(-self.entries // self.lanes) * self.lanes


@dataclass(eq=False)
class Planes(Value):
    """Channels of pixels on a grid; shape (batch, channels, height, width).

    Attributes:
        grid: where its pixels lie.
        factor: pixels per place in each direction.
        before: vectors before each plane that kernels read.
        after: vectors after each plane that kernels read.
        positive: no entry is negative.
        padded: places without a pixel have to be zero.
    """

    grid: Grid
    factor: int
    before: int = field(default=0, init=False)
    after: int = field(default=0, init=False)
    positive: bool = field(default=False, init=False)
    padded: bool = field(default=False, init=False)

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
        return self.grid.length + self.before + self.after

    @property
    def lead(self) -> int:
        """Floats before the first vector of the first plane."""
        return self.before * self.grid.lanes

    @property
    def size(self) -> int:
        """Floats in the arena."""
        return self.channels * self.phases * self.stride * self.grid.lanes

    def reach(self, before: int, after: int) -> bool:
        """Have at least so many vectors before and after each plane; False where that is farther than kernels reach."""
        before, after = max(self.before, before), max(self.after, after)
        stride = self.grid.length + before + after
        # From the halo before the first plane to the one after the last.
        if self.phases * stride - self.grid.length > FARTHEST or self.phases * stride * self.grid.lanes > _MOST_FLOATS:
            return False
        self.before, self.after = before, after
        return True

    def pixels(self) -> _Int:
        """Which pixel is in each place, counted row by row, shape (phases, length, lanes); -1 where none is."""
        grid, f = self.grid, self.factor
        place = np.arange(grid.lanes * grid.length).reshape(grid.lanes, grid.length).T
        row, column = np.divmod(place, grid.pitch)
        a, b = np.divmod(np.arange(self.phases), f)
        y = row * f + a[:, None, None]
        x = column * f + b[:, None, None]
        inside = (y < self.shape[2]) & (x < self.shape[3]) & (column < grid.columns)
        return np.ascontiguousarray(np.where(inside, y * self.shape[3] + x, -1), np.int32)

    def places(self) -> _Int:
        """Where each pixel is, in floats from the channel's first vector, shape (height, width)."""
        y, x = np.ogrid[: self.shape[2], : self.shape[3]]
        f = self.factor
        place = (y // f) * self.grid.pitch + x // f
        plane = (y % f) * f + x % f
        lane, vector = np.divmod(place, self.grid.length)
        return np.asarray((plane * self.stride + vector) * self.grid.lanes + lane, np.int32)


class Rows(Planes):
    """Rows of features, such as the tokens of a transformer: features are the channels, rows the pixels.

    Its shape is (1, features, 1, rows), whatever axes the rows have in the graph.
    """
