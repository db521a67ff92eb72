"""Operators that move, select or create entries without arithmetic."""

from __future__ import annotations

import math

import numpy as np

from dsr_tool.errors import FormatError, unknown_name
from dsr_tool.graph.axes import axes_of, axis_of
from dsr_tool.graph.limits import claim, int_list
from dsr_tool.runtime.reference import NumpyFunction
from dsr_tool.sparsity.tensor import Array

__all__ = ["FUNCTIONS"]

_BLOCKS = ("CRD", "DCR")
_REDUCTIONS = {"add": np.add, "mul": np.multiply, "max": np.maximum, "min": np.minimum}


def _constant(
    *,
    value_int: int | None = None,
    value_float: float | None = None,
    value_ints: tuple[int, ...] | None = None,
    value_floats: tuple[float, ...] | None = None,
) -> Array:
    integers = value_int if value_int is not None else value_ints
    if integers is not None:
        return np.array(integers, np.int64)
    return np.array(value_float if value_float is not None else value_floats, np.float32)


def _constant_of_shape(shape: Array, *, value: float | tuple[float, ...] = 0.0) -> Array:
    filler = np.ravel(value)[0]
    dtype = np.int64 if isinstance(filler, np.integer) else np.float32
    sizes = int_list(shape)
    claim(sizes, dtype)
    return np.full(sizes, filler, dtype)


def _range(start: Array, limit: Array, delta: Array) -> Array:
    first, end, step = start.item(), limit.item(), delta.item()
    claim((math.ceil((end - first) / step),), start.dtype)
    return np.arange(first, end, step, dtype=start.dtype)


def _shape(x: Array, *, start: int = 0, end: int | None = None) -> Array:
    return np.array(x.shape[start:end], np.int64)


def _reshape(x: Array, shape: Array, *, allowzero: int = 0) -> Array:
    sizes = [x.shape[i] if n == 0 and not allowzero else n for i, n in enumerate(int_list(shape))]
    claim(sizes, x.dtype)
    return x.reshape(sizes)


def _flatten(x: Array, *, axis: int = 1) -> Array:
    # The axis may be the rank itself: all axes become the first one.
    axis = axis if axis == x.ndim else axis_of(axis, x.ndim)
    return x.reshape(math.prod(x.shape[:axis]), math.prod(x.shape[axis:]))


def _squeeze(x: Array, axes: Array | None = None) -> Array:
    return x.squeeze(None if axes is None else tuple(axes_of(int_list(axes), x.ndim)))


def _unsqueeze(x: Array, axes: Array) -> Array:
    wanted = int_list(axes)
    return np.expand_dims(x, tuple(axes_of(wanted, x.ndim + len(wanted))))


def _transpose(x: Array, *, perm: tuple[int, ...] | None = None) -> Array:
    # numpy takes negative axes, which the standard does not allow here.
    if perm is not None and sorted(perm) != list(range(x.ndim)):
        raise FormatError(f"perm {str(list(perm))[:80]} is no order of the axes 0 to {x.ndim - 1}.")
    return np.transpose(x, perm)


def _concat(*arrays: Array, axis: int) -> Array:
    claim((sum(array.size for array in arrays),), np.result_type(*arrays))
    return np.concatenate(arrays, axis_of(axis, arrays[0].ndim))


def _split(x: Array, split: Array | None = None, *, axis: int = 0, num_outputs: int = 1) -> tuple[Array, ...]:
    axis = axis_of(axis, x.ndim)
    if split is None:
        claim((num_outputs,), np.int64)
        # Pieces of equal size; if the axis does not divide evenly, the last one is smaller.
        piece = -(-x.shape[axis] // num_outputs)
        bounds = [min(piece * i, x.shape[axis]) for i in range(1, num_outputs)]
    else:
        bounds = np.cumsum(split)[:-1].tolist()
    return tuple(np.split(x, bounds, axis))


def _slice(x: Array, starts: Array, ends: Array, axes: Array | None = None, steps: Array | None = None) -> Array:
    dimensions = axes_of(range(len(starts)) if axes is None else int_list(axes), x.ndim)
    strides = [1] * len(starts) if steps is None else int_list(steps)
    parts = [slice(None)] * x.ndim
    for axis, start, end, step in zip(dimensions, int_list(starts), int_list(ends), strides, strict=True):
        # A start before the first entry means the first entry, also backwards, where Python would select nothing.
        parts[axis] = slice(max(start, -x.shape[axis]), end, step)
    return x[tuple(parts)]


def _gather(x: Array, indices: Array, *, axis: int = 0) -> Array:
    axis = axis_of(axis, x.ndim)
    claim((*x.shape[:axis], *indices.shape, *x.shape[axis + 1 :]), x.dtype)
    if indices.ndim == 0 and indices.dtype.kind in "iu":
        # One entry: a view is enough, while `take` would copy.
        return np.asarray(x[(slice(None),) * axis + (int(indices),)])
    return np.take(x, indices, axis)


def _gather_nd(x: Array, indices: Array, *, batch_dims: int = 0) -> Array:
    if not 0 <= batch_dims < min(x.ndim, indices.ndim):
        raise FormatError(f"batch_dims {batch_dims} is not in [0, {min(x.ndim, indices.ndim)}).")
    batch = np.ogrid[tuple(slice(n) for n in x.shape[:batch_dims])]
    rest = indices.ndim - 1 - batch_dims
    claim((*indices.shape[:-1], *x.shape[batch_dims + indices.shape[-1] :]), x.dtype)
    leading = tuple(axis.reshape(axis.shape + (1,) * rest) for axis in batch)
    return np.asarray(x[leading + tuple(np.moveaxis(indices, -1, 0))])


def _scatter_nd(x: Array, indices: Array, updates: Array, *, reduction: str = "none") -> Array:
    result: Array = x.copy()
    where = tuple(np.moveaxis(indices, -1, 0))
    if reduction == "none":
        result[where] = updates
    elif reduction in _REDUCTIONS:
        _REDUCTIONS[reduction].at(result, where, updates)
    else:
        raise unknown_name("reduction of ScatterND", reduction, ("none", *_REDUCTIONS))
    return result


def _pad(
    x: Array, pads: Array, value: Array | None = None, axes: Array | None = None, *, mode: str = "constant"
) -> Array:
    dimensions = axes_of(range(x.ndim) if axes is None else int_list(axes), x.ndim)
    width = [(0, 0)] * x.ndim
    parts = [slice(None)] * x.ndim
    for axis, begin, end in zip(dimensions, *(int_list(part) for part in pads.reshape(2, -1)), strict=True):
        width[axis] = (max(begin, 0), max(end, 0))
        # Negative padding removes entries.
        parts[axis] = slice(max(-begin, 0), x.shape[axis] - max(-end, 0))
    x = x[tuple(parts)]
    claim([begin + n + end for n, (begin, end) in zip(x.shape, width, strict=True)], x.dtype)
    if mode == "constant":
        return np.pad(x, width, constant_values=0 if value is None else value.item())
    if mode in ("reflect", "edge"):
        return np.pad(x, width, mode=mode)  # type: ignore[call-overload,no-any-return]
    if mode == "wrap":
        # Entry by entry: numpy's own mode goes round after round where a pad is longer than the axis.
        for axis, (begin, end) in enumerate(width):
            if begin or end:
                x = np.take(x, np.arange(-begin, x.shape[axis] + end) % x.shape[axis], axis)
        return x
    raise unknown_name("mode of Pad", mode, ("constant", "edge", "reflect", "wrap"))


def _tile(x: Array, repeats: Array) -> Array:
    counts = int_list(repeats)
    if len(counts) != x.ndim or min(counts, default=0) < 0:
        raise FormatError(f"repeats {str(counts)[:80]} do not fit a value of {x.ndim} dimensions.")
    claim([n * count for n, count in zip(x.shape, counts, strict=True)], x.dtype)
    return np.tile(x, counts)


def _depth_to_space(x: Array, *, blocksize: int, mode: str = "DCR") -> Array:
    """Moves channels to pixels: (batch, channels * blocksize², height, width) to a larger image of fewer channels."""
    if mode not in _BLOCKS:
        raise unknown_name("mode of DepthToSpace", mode, _BLOCKS)
    batch, channels, height, width = x.shape
    inner = channels // _squared(blocksize)
    if mode == "DCR":  # the block's rows and columns are the outer part of a channel's number, in CRD the inner one
        blocks = x.reshape(batch, blocksize, blocksize, inner, height, width).transpose(0, 3, 4, 1, 5, 2)
    else:
        blocks = x.reshape(batch, inner, blocksize, blocksize, height, width).transpose(0, 1, 4, 2, 5, 3)
    return np.asarray(blocks.reshape(batch, inner, height * blocksize, width * blocksize))


def _space_to_depth(x: Array, *, blocksize: int) -> Array:
    """Moves pixels to channels, the inverse of DepthToSpace in mode DCR."""
    batch, channels, height, width = x.shape
    depth = channels * _squared(blocksize)
    blocks = x.reshape(batch, channels, height // blocksize, blocksize, width // blocksize, blocksize)
    moved = blocks.transpose(0, 3, 5, 1, 2, 4)
    return np.asarray(moved.reshape(batch, depth, height // blocksize, width // blocksize))


def _squared(blocksize: int) -> int:
    if blocksize < 1:
        raise FormatError(f"blocksize {blocksize} is not positive.")
    return blocksize * blocksize


def _expand(x: Array, shape: Array) -> Array:
    sizes = int_list(shape)
    claim(sizes, x.dtype)  # numpy's error for too many dimensions would not name the node
    out = np.broadcast_shapes(x.shape, tuple(sizes))
    claim(out, x.dtype)  # the result is a view, but its readers may copy it
    return np.broadcast_to(x, out)


FUNCTIONS: dict[str, NumpyFunction] = {
    "Concat": _concat,
    "Constant": _constant,
    "ConstantOfShape": _constant_of_shape,
    "DepthToSpace": _depth_to_space,
    "Expand": _expand,
    "Flatten": _flatten,
    "Gather": _gather,
    "GatherND": _gather_nd,
    "Pad": _pad,
    "Range": _range,
    "Reshape": _reshape,
    "ScatterND": _scatter_nd,
    "Shape": _shape,
    "Slice": _slice,
    "SpaceToDepth": _space_to_depth,
    "Split": _split,
    "Squeeze": _squeeze,
    "Tile": _tile,
    "Transpose": _transpose,
    "Unsqueeze": _unsqueeze,
}
