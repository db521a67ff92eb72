"""Channels of the values of a graph: which of them are kept or removed together, and which are constant."""

from __future__ import annotations

from dataclasses import dataclass
from typing import cast

import numpy as np
import numpy.typing as npt

from dsr_tool.sparsity.tensor import Array

__all__ = ["Bools", "Channels", "Floats", "Ints", "Units", "channel_axis"]

Bools = npt.NDArray[np.bool_]
Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]


class Units:
    """Units: sets of channels that are kept or removed together, such as the operands of an addition.

    A union-find forest: each unit points to a parent of the same set, and the root stands for the set.
    """

    def __init__(self) -> None:
        self._parent: list[int] = []

    def __len__(self) -> int:
        return len(self._parent)

    def fresh(self, count: int) -> Ints:
        """Adds `count` units of one channel each and returns their numbers."""
        first = len(self._parent)
        self._parent.extend(range(first, first + count))
        return np.arange(first, first + count, dtype=np.int64)

    def join(self, one: Ints, other: Ints) -> None:
        """Joins each unit of `one` with the unit of `other` at the same position."""
        for a, b in zip(one.tolist(), other.tolist(), strict=True):
            first, second = self._root(a), self._root(b)
            # The smaller number becomes the root, so that the result does not depend on the order of joins.
            self._parent[max(first, second)] = min(first, second)

    def roots(self) -> Ints:
        """Returns the root of each unit; units of one set have the same."""
        return np.array([self._root(unit) for unit in range(len(self._parent))], np.int64)

    def _root(self, unit: int) -> int:
        while self._parent[unit] != unit:
            # Pointing to the grandparent halves the path, so that later look-ups are short.
            self._parent[unit] = self._parent[self._parent[unit]]
            unit = self._parent[unit]
        return unit


@dataclass(frozen=True, eq=False)
class Channels:
    """The channels of one value.

    Attributes:
        units: shape (channels,), the unit of each channel.
        constant: shape (channels,), the value of a channel that is the same everywhere and for every input; NaN for
            one that varies.
        axis: 1 for values (batch, channels, *size), -1 for values with channels last.
        rank: number of dimensions, None if unknown; a value of rank 2 has axis -1.
        batch: True if the first axis is the batch of the graph's input.
    """

    units: Ints
    constant: Floats
    axis: int
    rank: int | None
    batch: bool = False

    @property
    def count(self) -> int:
        """Number of channels."""
        return len(self.units)

    @property
    def position(self) -> int:
        """Axis of the channels, counted from the front if the rank is known."""
        return self.rank - 1 if self.axis == -1 and self.rank is not None else self.axis

    def aligned(self, other: Channels) -> bool:
        """Returns whether broadcasting pairs channel i of one value with channel i of the other."""
        # Channels last pair up whatever the ranks, as broadcasting counts axes from the back.
        ranks = self.rank == other.rank if self.axis == 1 else True
        return self.axis == other.axis and self.count == other.count and ranks


def channel_axis(array: Array, value: Channels) -> tuple[bool, int | None]:
    """Finds the channels of an operand that broadcasts to a value.

    Returns:
        Whether the array broadcasts without changing the number of channels, and its own axis of channels; None if it
        holds the same for all channels.
    """
    if value.rank is not None and array.ndim > value.rank:
        return False, None
    axis = array.ndim - 1 if value.axis == -1 else array.ndim - cast("int", value.rank) + 1
    if axis < 0 or array.shape[axis] == 1:
        return True, None
    return array.shape[axis] == value.count, axis
