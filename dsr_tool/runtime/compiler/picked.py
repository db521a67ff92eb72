"""Values that are entries of another value, picked by tables: what operators that only move entries make.

A transpose, a slice or a roll says where each entry of its result comes from. No op is needed for that until something
reads the result in a layout of its own, and a series of such operators needs one op in the end, or none: a product
reads the heads of attention from where they are.

The place of an entry is the sum of the entries of some tables, each over some axes of the value. Of a base in order, a
table holds distances in entries. Of planes, it holds numbers of channels or of pixels.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from dsr_tool.graph.limits import claim
from dsr_tool.runtime.compiler.layouts import Planes, Rows, Value

__all__ = ["Group", "Picked"]

_Int = npt.NDArray[np.int64]

_MAX_TABLE = 1 << 22
"""Most entries of a table that joins others; a value that needs a larger one is moved first."""

_CHANNEL, _PIXEL, _ENTRY = "channel", "pixel", "entry"


class Group(NamedTuple):
    """A table of places.

    Attributes:
        axes: the axes of the value that it depends on, in order, none of size one.
        kind: what it counts: channels or pixels of planes, or entries in order.
        table: by position on these axes, never negative, or -1 where the value has no entry of its base.
    """

    axes: tuple[int, ...]
    kind: str
    table: _Int


@dataclass(eq=False)
class Picked(Value):
    """Entries of a base; its shape is that of one piece of the batch.

    Attributes:
        base: the value that lies in memory.
        groups: the tables, which share no axis.
        first: by kind, the number that is added to all places.
        factor: factor of the entries.
        fill: the entries for which a table holds -1.
    """

    base: Value
    groups: tuple[Group, ...]
    first: dict[str, int] = dataclasses.field(default_factory=dict)
    factor: float = 1.0
    fill: float = 0.0

    @classmethod
    def of(cls, base: Value, shape: tuple[int, ...]) -> Picked:
        """Returns all entries of a value, which has this shape in the graph."""
        steps = [math.prod(shape[i + 1 :]) for i in range(len(shape))]
        kinds = [_ENTRY] * len(shape)
        if isinstance(base, Rows):
            kinds = [_PIXEL] * (len(shape) - 1) + [_CHANNEL]
            steps = [step // shape[-1] for step in steps[:-1]] + [1]
        elif isinstance(base, Planes):
            kinds, steps = [_PIXEL, _CHANNEL, _PIXEL, _PIXEL], [0, 1, shape[3], 1]
        axes = [axis for axis, size in enumerate(shape) if size > 1]
        groups = (Group((axis,), kinds[axis], np.arange(shape[axis]) * steps[axis]) for axis in axes)
        return cls(shape, base, tuple(groups))

    @property
    def size(self) -> int:
        """It needs no memory."""
        return 0

    @property
    def partial(self) -> bool:
        """True if some entries are not those of the base."""
        return any((group.table < 0).any() for group in self.groups)

    def numbers(self, axes: Sequence[int], kind: str) -> _Int:
        """Returns the sum of the tables of a kind over these axes, without `first`; -1 where one has no entry.

        The groups that touch these axes must touch no others.
        """
        total: _Int = np.zeros([self.shape[axis] for axis in axes], np.int64)
        outside = np.zeros(total.shape, bool)
        for group in self.groups:
            if not set(group.axes) & set(axes):
                continue
            # Each group at its own axes, and one entry for all positions on the others.
            own = [axis for axis in axes if axis in group.axes]
            table = group.table.transpose([group.axes.index(axis) for axis in own])
            shape = [self.shape[axis] if axis in own else 1 for axis in axes]
            outside |= table.reshape(shape) < 0
            if group.kind == kind:
                total = total + table.reshape(shape)
        return np.where(outside, -1, total)

    def floats(self, axes: Sequence[int], *, first: bool) -> _Int:
        """Returns the distance in floats that these axes add, -1 where there is no entry; halos must be final.

        Args:
            axes: some axes; the groups that touch them touch no others, and of pixels these are all groups or none.
            first: add what belongs to all places.
        """
        start = self.first if first else {}
        if not isinstance(self.base, Planes):
            entries = self.numbers(axes, _ENTRY)
            return np.where(entries < 0, -1, entries + start.get(_ENTRY, 0))
        channels, pixels = self.numbers(axes, _CHANNEL), self.numbers(axes, _PIXEL)
        result = (channels + start.get(_CHANNEL, 0)) * self.base.channel_step
        have = any(group.kind == _PIXEL and set(group.axes) & set(axes) for group in self.groups)
        if have or (first and not any(group.kind == _PIXEL for group in self.groups)):
            offsets = self.base.offset_of_pixel().reshape(-1).astype(np.int64)
            result = result + offsets[np.maximum(pixels, 0) + self.first.get(_PIXEL, 0)]
        return np.where(channels < 0, -1, result)

    def divides(self, axes: Sequence[int]) -> bool:
        """Returns whether places are sums of a part that these axes decide and a part that the others decide."""
        inner = set(axes)
        sides = [(set(group.axes) <= inner, not set(group.axes) & inner, group.kind) for group in self.groups]
        # The place of a pixel depends on its whole number.
        pixels = {within for within, _, kind in sides if kind == _PIXEL}
        return all(within or without for within, without, _ in sides) and len(pixels) < 2

    def is_whole(self, channel_axis: int) -> bool:
        """Returns whether it has every entry of its planes in their order, with channels on this axis."""
        base = self.base
        others = [axis for axis in range(len(self.shape)) if axis != channel_axis]
        if not isinstance(base, Planes) or self.factor != 1 or any(self.first.values()):
            return False
        if self.shape[channel_axis] != base.channels or not self.divides((channel_axis,)):
            return False
        channels = self.numbers((channel_axis,), _CHANNEL)
        return np.array_equal(channels, np.arange(base.channels)) and self.has_pixels(others)

    def has_pixels(self, axes: Sequence[int]) -> bool:
        """Returns whether these axes hold every pixel of the planes in order."""
        base = self.base
        if not isinstance(base, Planes) or self.first.get(_PIXEL, 0):
            return False
        pixels = self.numbers(axes, _PIXEL).reshape(-1)
        return np.array_equal(pixels, np.arange(base.shape[2] * base.shape[3]))

    def is_in_order(self) -> bool:
        """Returns whether its entries are the first ones of a base in order, all of them or some, in that order."""
        if isinstance(self.base, Planes) or self.factor != 1 or any(self.first.values()):
            return False
        expected = Picked.of(self.base, self.shape)
        return len(expected.groups) == len(self.groups) and all(
            ours.axes == theirs.axes and np.array_equal(ours.table, theirs.table)
            for ours, theirs in zip(sorted(self.groups), expected.groups, strict=True)
        )

    # --- what operators do ---------------------------------------------------------------------------------------

    def transposed(self, order: Sequence[int]) -> Picked:
        """Returns it with its axes in another order."""
        return self._renamed(tuple(self.shape[axis] for axis in order), lambda axis: tuple(order).index(axis))

    def taken(self, axis: int, indices: _Int) -> Picked | None:
        """Returns the entries at these positions of an axis, -1 for none; the indices may have any number of axes."""
        shape = (*self.shape[:axis], *indices.shape, *self.shape[axis + 1 :])
        # No table has more entries than the value.
        claim(shape, np.float32)
        own = next((group for group in self.groups if axis in group.axes), None)
        if own is None:
            own = Group((axis,), self._default, np.zeros(1, np.int64))
        at = own.axes.index(axis)
        table = np.take(own.table, np.maximum(indices, 0), at)
        missing = (indices < 0).reshape((*(1,) * at, *indices.shape, *(1,) * (own.table.ndim - at - 1)))
        table = np.where(missing, -1, table)
        shift = indices.ndim - 1
        new_axes = tuple(range(axis, axis + indices.ndim))

        def moved(axes: tuple[int, ...]) -> tuple[int, ...]:
            return tuple(a + shift if a > axis else a for a in axes)

        others = [Group(moved(group.axes), group.kind, group.table) for group in self.groups if axis not in group.axes]
        axes = (*moved(own.axes[:at]), *new_axes, *moved(own.axes[at + 1 :]))
        return self._with(shape, [*others, Group(axes, own.kind, table)])

    def reshaped(self, shape: tuple[int, ...]) -> Picked | None:
        """Returns it in another shape of as many entries; None if no tables of a reasonable size describe that."""
        if self.is_in_order():
            return Picked.of(self.base, shape)
        groups, renamed = list(self.groups), dict[int, tuple[int, ...]]()
        for old, new in _blocks(self.shape, shape):
            if [self.shape[axis] for axis in old] == [shape[axis] for axis in new]:
                renamed |= {a: (b,) for a, b in zip(old, new, strict=True)}
                continue
            joined = self._joined(groups, old)
            if joined is None:
                return None
            groups = [joined, *(group for group in groups if not set(group.axes) & set(joined.axes))]
            renamed |= {old[0]: tuple(new)} | dict.fromkeys(old[1:], ())
        moved = []
        for group in groups:
            axes = tuple(itertools.chain.from_iterable(renamed[axis] for axis in group.axes))
            moved.append(Group(axes, group.kind, group.table.reshape([shape[axis] for axis in axes])))
        return self._with(shape, moved)

    def expanded(self, shape: tuple[int, ...]) -> Picked | None:
        """Returns it repeated along axes of size one, and along new ones in front; the shape is the result's."""
        claim(shape, np.float32)
        lead = len(shape) - len(self.shape)
        result = self._renamed((*(1,) * lead, *self.shape), lambda axis: axis + lead)
        for axis, size in enumerate(shape):
            if result.shape[axis] == 1 and size > 1:
                taken = result.taken(axis, np.zeros(size, np.int64))
                if taken is None:
                    return None
                result = taken
        return result if result.shape == shape else None

    def hidden(self, axes: Sequence[int], keep: npt.NDArray[np.bool_]) -> Picked | None:
        """Returns it without the entries for which `keep` is false, an array over some axes of more than one entry."""
        joined = self._joined(self.groups, axes)
        if joined is None:
            return None
        shape = [self.shape[axis] if axis in axes else 1 for axis in joined.axes]
        table = np.where(keep.reshape(shape), joined.table, -1)
        others = [group for group in self.groups if not set(group.axes) & set(joined.axes)]
        return self._with(self.shape, [*others, joined._replace(table=table)])

    def without_group(self, axis: int) -> tuple[Group | None, tuple[Group, ...]]:
        """Returns the group of an axis, if that has no other axis, and all other groups."""
        own = next((group for group in self.groups if group.axes == (axis,)), None)
        return own, tuple(group for group in self.groups if axis not in group.axes)

    def times(self, factor: float) -> Picked:
        """Returns it with all entries multiplied by a number."""
        product = float(np.float32(self.factor) * np.float32(factor))
        return dataclasses.replace(self, factor=product, fill=float(np.float32(self.fill) * np.float32(factor)))

    @property
    def _default(self) -> str:
        """The kind of a table of zeros."""
        return _CHANNEL if isinstance(self.base, Planes) else _ENTRY

    def _joined(self, groups: Sequence[Group], axes: Sequence[int]) -> Group | None:
        """Returns one group for all groups that touch some axes; None if they differ or are too large."""
        touched = [group for group in groups if set(group.axes) & set(axes)]
        kinds = {group.kind for group in touched}
        together = sorted(set(axes).union(*(group.axes for group in touched)))
        if len(kinds) > 1 or math.prod(self.shape[axis] for axis in together) > _MAX_TABLE:
            return None
        kind = kinds.pop() if kinds else self._default
        part = dataclasses.replace(self, groups=tuple(touched))
        return Group(tuple(together), kind, part.numbers(together, kind))

    def _renamed(self, shape: tuple[int, ...], name: Callable[[int], int]) -> Picked:
        groups = []
        for group in self.groups:
            axes = [name(axis) for axis in group.axes]
            order = sorted(range(len(axes)), key=axes.__getitem__)
            groups.append(Group(tuple(sorted(axes)), group.kind, group.table.transpose(order)))
        return dataclasses.replace(self, shape=shape, groups=tuple(groups))

    def _with(self, shape: tuple[int, ...], groups: Sequence[Group]) -> Picked | None:
        """Returns it with other groups: without axes of one entry, and divided into groups of one axis if possible."""
        kept, first = list[Group](), dict(self.first)
        for group in groups:
            wide = tuple(axis for axis in group.axes if shape[axis] > 1)
            table = group.table.reshape([shape[axis] for axis in wide])
            if wide:
                kept += _divided(Group(wide, group.kind, table))
            elif table < 0:
                return None  # no entry at all
            else:
                first[group.kind] = first.get(group.kind, 0) + int(table)
        return dataclasses.replace(self, shape=shape, groups=tuple(sorted(kept, key=lambda g: g.axes)), first=first)


def _divided(group: Group) -> list[Group]:
    """Returns groups of one axis each whose sums are a table; what cannot be divided stays together."""
    parts, rest = list[Group](), group
    for axis in group.axes:
        at = rest.axes.index(axis)
        if len(rest.axes) == 1 or (rest.table < 0).any():
            break
        line = rest.table[tuple(slice(None) if i == at else 0 for i in range(rest.table.ndim))]
        low = int(line.argmin())
        others: _Int = np.asarray(rest.table.take(low, at), np.int64)
        steps = line - line[low]
        if np.array_equal(
            np.expand_dims(others, at) + np.expand_dims(steps, _all_but(at, rest.table.ndim)), rest.table
        ):
            parts.append(Group((axis,), group.kind, steps))
            rest = Group(tuple(a for a in rest.axes if a != axis), group.kind, others)
    return [*parts, rest]


def _all_but(axis: int, rank: int) -> tuple[int, ...]:
    return tuple(i for i in range(rank) if i != axis)


def _blocks(old: tuple[int, ...], new: tuple[int, ...]) -> list[tuple[list[int], list[int]]]:
    """Returns the smallest blocks of neighbouring axes of two shapes with as many entries, without sizes of one."""
    blocks = []
    left = [axis for axis, size in enumerate(old) if size > 1]
    right = [axis for axis, size in enumerate(new) if size > 1]
    while left or right:
        a, b = [left.pop(0)], [right.pop(0)]
        while (x := math.prod(old[i] for i in a)) != (y := math.prod(new[i] for i in b)):
            if x < y:
                a.append(left.pop(0))
            else:
                b.append(right.pop(0))
        blocks.append((a, b))
    return blocks
