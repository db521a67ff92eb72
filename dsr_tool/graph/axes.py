"""Axes as graphs name them: numbers that count from the front, or from the back if they are negative."""

from __future__ import annotations

from collections.abc import Iterable

from dsr_tool.errors import FormatError

__all__ = ["axes_of", "axis_of"]


def axis_of(axis: int, rank: int) -> int:
    """Returns an axis of a value as a number from 0 on.

    Args:
        axis: the axis; -1 is the last one.
        rank: number of axes of the value.

    Raises:
        FormatError: the value has no such axis.
    """
    # Python's remainder would make a valid axis of any number.
    if not -rank <= axis < rank:
        raise FormatError(f"axis {str(axis)[:20]} is not in [-{rank}, {rank}), as its value has {rank} axes.")
    return axis + rank if axis < 0 else axis


def axes_of(axes: Iterable[int], rank: int) -> list[int]:
    """Returns several axes of a value as numbers from 0 on, in the order given.

    Raises:
        FormatError: the value has no such axis, or one is given twice.
    """
    found = [axis_of(axis, rank) for axis in axes]
    if len(set(found)) != len(found):
        raise FormatError(f"axes {str(found)[:80]} name one axis twice.")
    return found
