"""Lowering rules of operators that move, repeat or select entries by numbers that are known: they pick entries."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import numpy.typing as npt

from dsr_tool.graph.axes import axes_of, axis_of
from dsr_tool.graph.ir import Node
from dsr_tool.graph.limits import claim, int_list
from dsr_tool.runtime.compiler.layouts import Rows
from dsr_tool.runtime.compiler.lowering import Lowered, Lowering
from dsr_tool.runtime.compiler.picked import Picked
from dsr_tool.runtime.reference.resize import check_modes, nearest_entries, resized_axes
from dsr_tool.sparsity.tensor import Array

__all__ = ["expand", "gather", "gather_nd", "pad", "resize", "slices", "split", "transpose", "where"]

_Int = npt.NDArray[np.int64]


def transpose(low: Lowering, node: Node, *, perm: tuple[int, ...] = ()) -> Lowered | None:
    """Lowers a permutation of axes."""
    name = node.inputs[0]
    shape, value = low.shapes.get(name, ()), low.values.get(name)
    perm = perm or tuple(reversed(range(len(shape))))
    if sorted(perm) != list(range(len(shape))) or (low.batch > 1 and perm[0] != 0):
        return None
    wanted = tuple(shape[axis] for axis in perm)
    order = [axis for axis in perm if shape[axis] > 1]
    # Rows stay rows if axes of one entry alone move.
    if order == sorted(order) and isinstance(value, Rows) and wanted[-1] == shape[-1] and low.only_reader(name):
        return Lowered(value, wanted)
    picked = low.picked(name)
    return None if picked is None else Lowered(picked.transposed(perm), wanted)


def slices(low: Lowering, node: Node) -> Lowered | None:
    """Lowers a slice of known bounds."""
    shape, picked = low.shapes.get(node.inputs[0], ()), low.picked(node.inputs[0])
    names = (*node.inputs[1:], "", "")[:4]
    if picked is None or any(name and name not in low.constants for name in names):
        return None
    starts, ends, axes, steps = (_ints(low, name) or [] for name in names)
    axes, steps = axes or list(range(len(starts))), steps or [1] * len(starts)
    wanted = list(shape)
    for axis, start, end, step in zip(axes_of(axes, len(shape)), starts, ends, steps, strict=True):
        # As the reference: a start before the first entry means the first one, also backwards.
        indices = np.arange(shape[axis])[max(start, -shape[axis]) : end : step]
        if len(indices) == shape[axis] and step == 1:
            continue
        taken = _take(low, picked, axis, indices)
        if taken is None:
            return None
        picked, wanted[axis] = taken, len(indices)
    return Lowered(picked, tuple(wanted))


def split(low: Lowering, node: Node, *, axis: int = 0, num_outputs: int = 1) -> Lowered | None:
    """Lowers a split into pieces of known size; it makes all outputs, and returns the first."""
    shape, picked = low.shapes.get(node.inputs[0], ()), low.picked(node.inputs[0])
    if picked is None or not all(node.outputs):
        return None
    axis = axis_of(axis, len(shape))
    sizes = _ints(low, node.inputs[1]) if len(node.inputs) > 1 and node.inputs[1] else None
    if sizes is None:
        if num_outputs != len(node.outputs):
            return None
        piece = -(-shape[axis] // num_outputs)
        sizes = [min(piece, shape[axis] - piece * i) for i in range(num_outputs)]
    if len(sizes) != len(node.outputs) or min(sizes) < 1 or sum(sizes) != shape[axis]:
        return None
    results = []
    for begin, size in zip(np.cumsum([0, *sizes]), sizes, strict=False):
        taken = _take(low, picked, axis, np.arange(begin, begin + size))
        if taken is None:
            return None
        results.append(Lowered(taken, (*shape[:axis], size, *shape[axis + 1 :])))
    for name, result in zip(node.outputs[1:], results[1:], strict=True):
        low.values[name], low.shapes[name] = result
    return results[0]


def gather(low: Lowering, node: Node, *, axis: int = 0) -> Lowered | None:
    """Lowers a selection along one axis by known indices."""
    shape, picked = low.shapes.get(node.inputs[0], ()), low.picked(node.inputs[0])
    indices = _whole_numbers(low, node.inputs[1])
    if picked is None or indices is None or not indices.size:
        return None
    axis = axis_of(axis, len(shape))
    indices = np.where(indices < 0, indices + shape[axis], indices)
    if indices.min() < 0 or indices.max() >= shape[axis]:
        return None
    taken = _take(low, picked, axis, indices)
    return None if taken is None else Lowered(taken, (*shape[:axis], *indices.shape, *shape[axis + 1 :]))


def gather_nd(low: Lowering, node: Node, *, batch_dims: int = 0) -> Lowered | None:
    """Lowers a selection along the first axes together by known indices."""
    shape, picked = low.shapes.get(node.inputs[0], ()), low.picked(node.inputs[0])
    indices = _whole_numbers(low, node.inputs[1])
    if picked is None or indices is None or batch_dims or not indices.size or low.batch > 1:
        return None
    depth = indices.shape[-1]
    sizes = np.array(shape[:depth])
    indices = np.where(indices < 0, indices + sizes, indices)
    if depth > len(shape) or (indices < 0).any() or (indices >= sizes).any():
        return None
    # The first axes become one, of which entries are taken.
    merged = picked.reshaped((math.prod(shape[:depth]), *shape[depth:]))
    if merged is None:
        return None
    places = np.ravel_multi_index(tuple(np.moveaxis(indices, -1, 0)), tuple(shape[:depth]))
    taken = merged.taken(0, np.asarray(places, np.int64))
    return None if taken is None else Lowered(taken, (*places.shape, *shape[depth:]))


def pad(low: Lowering, node: Node, *, mode: str = "constant") -> Lowered | None:
    """Lowers known padding, by one value or by entries."""
    shape, picked = low.shapes.get(node.inputs[0], ()), low.picked(node.inputs[0])
    widths = _ints(low, node.inputs[1])
    value = low.constants.dense(node.inputs[2]).item() if len(node.inputs) > 2 and node.inputs[2] else 0.0
    axes = _ints(low, node.inputs[3]) if len(node.inputs) > 3 and node.inputs[3] else list(range(len(shape)))
    if picked is None or widths is None or axes is None or mode not in ("constant", "edge", "reflect"):
        return None
    wanted = list(shape)
    for axis, begin, end in zip(axes_of(axes, len(shape)), widths[: len(axes)], widths[len(axes) :], strict=True):
        # Negative padding removes entries.
        indices = np.arange(shape[axis])[max(-begin, 0) : shape[axis] - max(-end, 0)]
        width = (max(begin, 0), max(end, 0))
        claim((len(indices) + sum(width),), np.int64)
        if mode == "constant":
            indices = np.pad(indices, width, constant_values=-1)
        else:
            indices = np.pad(indices, width, mode="edge" if mode == "edge" else "reflect")
        if np.array_equal(indices, np.arange(shape[axis])):
            continue
        taken = _take(low, picked, axis, indices, float(value))
        if taken is None:
            return None
        picked, wanted[axis] = taken, len(indices)
    return Lowered(picked, tuple(wanted))


def resize(
    low: Lowering,
    node: Node,
    *,
    mode: str = "nearest",
    coordinate_transformation_mode: str = "half_pixel",
    nearest_mode: str = "round_prefer_floor",
    axes: tuple[int, ...] = (),
    cubic_coeff_a: float = -0.75,
) -> Lowered | None:
    """Lowers a resize by known numbers to the nearest pixels, which repeats or drops entries."""
    del cubic_coeff_a  # concerns another mode
    check_modes(mode, coordinate_transformation_mode, nearest_mode)
    shape, picked = low.shapes.get(node.inputs[0], ()), low.picked(node.inputs[0])
    names = (*node.inputs[2:], "", "")[:2]
    if picked is None or mode != "nearest" or any(name and name not in low.constants for name in names):
        return None
    scales, sizes = (low.constants.dense(name) if name else None for name in names)
    wanted = list(shape)
    for axis, out, scale in resized_axes(shape, scales, sizes, axes):
        claim((out,), np.int64)
        entries = nearest_entries(out, shape[axis], scale, coordinate_transformation_mode, nearest_mode)
        taken = _take(low, picked, axis, entries)
        if taken is None:
            return None
        picked, wanted[axis] = taken, out
    return Lowered(picked, tuple(wanted))


def expand(low: Lowering, node: Node) -> Lowered | None:
    """Lowers a value that is repeated along axes of size one."""
    shape, picked = low.shapes.get(node.inputs[0], ()), low.picked(node.inputs[0])
    sizes = _ints(low, node.inputs[1])
    if picked is None or sizes is None:
        return None
    shape = shape or picked.shape
    wanted = np.broadcast_shapes(shape, tuple(sizes))
    if low.batch > 1 and (len(wanted) != len(shape) or wanted[0] != shape[0]):
        return None
    expanded = picked.expanded(low.piece(wanted))
    return None if expanded is None else Lowered(expanded, wanted)


def where(low: Lowering, node: Node) -> Lowered | None:
    """Lowers a selection, by a known condition, between one number and a computed value."""
    condition, *names = node.inputs
    known = [name for name in names if name in low.constants]
    if condition not in low.constants or len(known) != 1:
        return None
    number = low.constants.dense(known[0])
    if number.size != 1:
        return None
    name = next(name for name in names if name != known[0])
    shape, picked = low.shapes.get(name, ()), low.picked(name)
    mask = low.constants.dense(condition).astype(bool)
    keep = mask if names[0] == name else ~mask
    fill = float(number.item())
    if picked is None or np.broadcast_shapes(keep.shape, number.shape, shape) != shape:
        return None
    # The condition may have sizes of one at axes that it does not depend on.
    keep = keep.reshape((1,) * (len(shape) - keep.ndim) + keep.shape)
    axes = [axis for axis in range(keep.ndim) if keep.shape[axis] > 1]
    if not _may_fill(picked, fill) or (low.batch > 1 and 0 in axes):
        return None
    changed = picked.hidden(axes, keep.reshape([shape[axis] for axis in axes]))
    if changed is not None and not picked.partial:
        changed.fill = fill
    return None if changed is None else Lowered(changed, shape)


def _take(low: Lowering, picked: Picked, axis: int, indices: Array, fill: float = 0.0) -> Picked | None:
    """Returns entries along an axis; None if that is the batch that the segment is divided by, or there are none."""
    indices = np.asarray(indices, np.int64)
    if not indices.size or (low.batch > 1 and axis == 0) or ((indices < 0).any() and not _may_fill(picked, fill)):
        return None
    taken = picked.taken(axis, indices)
    if taken is not None and not picked.partial:
        taken.fill = fill
    return taken


def _may_fill(picked: Picked, fill: float) -> bool:
    """Returns whether entries that have no place may be this number: all of them are the same one."""
    return not picked.partial or picked.fill == fill


def _ints(low: Lowering, name: str) -> list[int] | None:
    """Returns a known array of whole numbers as a list."""
    return int_list(low.constants.dense(name)) if name in low.constants else None


def _whole_numbers(low: Lowering, name: str) -> _Int | None:
    """Returns a known array of whole numbers."""
    array: Any = low.constants.dense(name) if name in low.constants else None
    return None if array is None or array.dtype.kind not in "iu" else array.astype(np.int64)
