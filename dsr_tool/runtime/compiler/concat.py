"""Lowering rule of Concat: channels of planes lie in one value from the start, other entries are picked."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

import numpy as np

from dsr_tool.graph.axes import axis_of
from dsr_tool.graph.ir import Node
from dsr_tool.graph.limits import claim
from dsr_tool.runtime.compiler.elementwise import Combine
from dsr_tool.runtime.compiler.layouts import Flat, Planes, Rows, same_layout
from dsr_tool.runtime.compiler.lowering import Lowered, Lowering
from dsr_tool.runtime.compiler.picked import Picked
from dsr_tool.runtime.compiler.picking import Pick, can_be_planes, pick_to_planes
from dsr_tool.runtime.kernels.ops import Combination

__all__ = ["concat"]


def concat(low: Lowering, node: Node, *, axis: int) -> Lowered | None:
    """Lowers a concatenation of computed values and known arrays."""
    shapes = [_shape(low, name) for name in node.inputs]
    if not all(shapes):
        return None
    axis = axis_of(axis, len(shapes[0]))
    sizes = [shape[axis] for shape in shapes]
    wanted = (*shapes[0][:axis], sum(sizes), *shapes[0][axis + 1 :])
    if any((*shape[:axis], *shape[axis + 1 :]) != (*wanted[:axis], *wanted[axis + 1 :]) for shape in shapes):
        return None
    claim(wanted, np.float32)
    # A known array has the entries of all images.
    if low.batch > 1 and (axis == 0 or any(name in low.constants for name in node.inputs)):
        return None
    if axis == 1 and len(wanted) == 4 and (planes := _channels(low, node.inputs, wanted)) is not None:
        return Lowered(planes, wanted)
    pieces = [low.picked(name) for name in node.inputs]
    if any(piece is None for piece in pieces):
        return None
    picked = [piece for piece in pieces if piece is not None]
    value = _of_one_base(picked, axis) or _features(low, picked, axis, wanted) or _in_order(low, picked, axis, wanted)
    return Lowered(value, wanted)


def _shape(low: Lowering, name: str) -> tuple[int, ...]:
    return low.constants.dense(name).shape if name in low.constants else low.shapes.get(name, ())


def _channels(low: Lowering, names: Sequence[str], wanted: tuple[int, ...]) -> Planes | None:
    """Returns the channels of all inputs as planes; no pixel moves if all of them lie on one grid."""
    # Values picked from flat ones stay so: a roll of rows of pixels moves no channels.
    values = [low.values.get(name) for name in names]
    if not any(isinstance(v.base if isinstance(v, Picked) else v, Planes) for v in values if v is not None):
        return None
    if any(isinstance(v, Rows) or (isinstance(v, Picked) and isinstance(v.base, Rows)) for v in values):
        return None
    planes = [low.planes(name) for name in names]
    if any(one is None for one in planes):
        return None
    found = [one for one in planes if one is not None]
    # Most of them decide the grid.
    home = max(found, key=lambda one: sum(same_layout(one, other) for other in found))
    found = [one if same_layout(one, home) else low.on_grid(one, home.grid, home.factor) for one in found]
    whole, begin, rest = _grown(found)
    if not whole.extend_halo(max(one.halo_before for one in found), max(one.halo_after for one in found)):
        return None
    seen: set[int] = set()
    for one in rest:
        if one.whole is None and id(one) not in seen and not any(one is value for value in low.segment.wholes):
            one.become_part(whole, begin)
        else:
            # It is a part of another concatenation already, or here twice.
            copy = Planes(one.shape, one.grid, one.factor)
            copy.become_part(whole, begin)
            low.add(Combine(source=one, out=copy, how=Combination.FIRST))
        seen.add(id(one))
        begin += one.channels
    whole.shape = (wanted[0], max(begin, whole.channels), *wanted[2:])
    low.segment.wholes.append(whole)
    result = Planes(wanted, whole.grid, whole.factor)
    result.become_part(whole, 0)
    result.nonnegative = all(one.nonnegative for one in found)
    return result


def _grown(values: Sequence[Planes]) -> tuple[Planes, int, Sequence[Planes]]:
    """Returns the planes to append to, their channels so far, and the values that are not among these yet."""
    whole, begin = values[0].whole, 0
    for i, one in enumerate(values):
        if whole is None or one.whole is not whole or one.first_channel != begin:
            break
        begin += one.channels
        if begin == whole.channels:
            # As in a DenseNet, where each layer appends to what all layers before have made.
            return whole, begin, values[i + 1 :]
    first = values[0]
    return Planes((first.shape[0], 0, *first.shape[2:]), first.grid, first.factor), 0, values


def _of_one_base(pieces: Sequence[Picked], axis: int) -> Picked | None:
    """Returns entries of one value, in another order along one axis, as a roll makes them; None if they are not."""
    first = pieces[0]
    own, others = first.without_group(axis)
    if own is None:
        return None
    tables = []
    for piece in pieces:
        group, rest = piece.without_group(axis)
        alike = len(rest) == len(others) and all(
            a[:2] == b[:2] and np.array_equal(a.table, b.table) for a, b in zip(rest, others, strict=True)
        )
        same = (piece.base is first.base, piece.first == first.first, piece.factor == first.factor)
        if group is None or group.kind != own.kind or not alike or not all(same) or piece.fill != first.fill:
            return None
        tables.append(group.table)
    table = np.concatenate(tables)
    shape = (*first.shape[:axis], len(table), *first.shape[axis + 1 :])
    return dataclasses.replace(first, shape=shape, groups=(own._replace(table=table), *others))


def _features(low: Lowering, pieces: Sequence[Picked], axis: int, wanted: tuple[int, ...]) -> Rows | None:
    """Returns features of the same rows side by side, where some lie in rows; None if they do not."""
    if axis != len(wanted) - 1 or low.batch != 1 or not any(isinstance(piece.base, Planes) for piece in pieces):
        return None
    if not all(can_be_planes(piece, axis) for piece in pieces):
        return None
    count = math.prod(wanted[:-1])
    whole = Rows((1, wanted[-1], 1, count), low.grids.grid(1, count, 0), 1)
    begin = 0
    for piece in pieces:
        part = Rows((1, piece.shape[-1], 1, count), whole.grid, 1)
        part.become_part(whole, begin)
        begin += part.channels
        low.add(pick_to_planes(piece, part))
    result = Rows(whole.shape, whole.grid, 1)
    result.become_part(whole, 0)
    return result


def _in_order(low: Lowering, pieces: Sequence[Picked], axis: int, wanted: tuple[int, ...]) -> Flat:
    """Returns entries in order, each piece written to its own ones."""
    out = low.new_flat(wanted)
    shape = low.piece(wanted)
    step, begin = math.prod(shape[axis:]), 0
    for piece in pieces:
        source = piece if piece.divides(range(len(shape))[axis:]) else low.gathered(piece)
        low.add(Pick(source=source.base, out=out, picked=source, split=axis, first=begin, step=step))
        begin += math.prod(piece.shape[axis:])
    return out
