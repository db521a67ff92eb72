"""Lowering rules of reductions, layer normalisation and softmax."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from dsr_tool.graph.axes import axes_of
from dsr_tool.graph.ir import Node
from dsr_tool.runtime.compiler.constants import shape_of
from dsr_tool.runtime.compiler.layouts import Flat, Planes, Rows
from dsr_tool.runtime.compiler.lowering import Lowered, Lowering, Rule
from dsr_tool.runtime.compiler.op import Op, Parameters
from dsr_tool.runtime.compiler.packing import Packer
from dsr_tool.runtime.kernels.ops import Kind
from dsr_tool.sparsity.tensor import Array, dense

__all__ = ["LayerNorm", "Mean", "Reduce", "Softmax", "global_average_pool", "layer_norm", "reduction", "softmax"]


@dataclass(frozen=True, eq=False, kw_only=True)
class Mean(Op):
    """The mean over the pixels of each channel."""

    source: Planes
    out: Flat

    kind: ClassVar[Kind] = Kind.MEAN
    exact: ClassVar[bool] = True

    def parameters(self, packer: Packer) -> Parameters:
        """Returns the sizes of the source."""
        del packer
        source = self.source
        return Parameters(
            {
                "channels": source.channels,
                "source_phases": source.phases,
                "source_length": source.grid.length,
                "factor": 1 / math.prod(source.shape[2:]),
            }
        )


@dataclass(frozen=True, eq=False, kw_only=True)
class LayerNorm(Op):
    """Each row minus its mean, over its standard deviation.

    Attributes:
        scale: factor of each feature.
        shift: added to each feature.
        epsilon: added to the variance.
    """

    source: Rows
    out: Rows
    scale: Array
    shift: Array
    epsilon: float

    kind: ClassVar[Kind] = Kind.LAYER_NORM

    def parameters(self, packer: Packer) -> Parameters:
        """Returns scale, shift and epsilon."""
        del packer
        scale, shift = (np.ascontiguousarray(array, np.float32) for array in (self.scale, self.shift))
        return Parameters({"scale": scale, "shift": shift, "epsilon": self.epsilon})


@dataclass(frozen=True, eq=False, kw_only=True)
class Softmax(Op):
    """Softmax of each row.

    Attributes:
        columns: entries of a row.
    """

    source: Flat
    out: Flat
    columns: int

    kind: ClassVar[Kind] = Kind.SOFTMAX
    exact: ClassVar[bool] = True

    def parameters(self, packer: Packer) -> Parameters:
        """Returns the number of rows and columns."""
        del packer
        return Parameters({"rows": self.out.entries // self.columns, "columns": self.columns})


@dataclass(frozen=True, eq=False, kw_only=True)
class Reduce(Op):
    """The sum of each row of entries in order, or the root of the sum of squares, times a factor.

    Attributes:
        columns: entries of a row.
        squares: squares are summed.
        factor: factor of the sum.
    """

    out: Flat
    columns: int
    squares: bool
    factor: float

    kind: ClassVar[Kind] = Kind.REDUCE
    exact: ClassVar[bool] = True

    def parameters(self, packer: Packer) -> Parameters:
        """Returns the sizes, the function and the factor."""
        del packer
        fields = {"rows": self.out.entries, "columns": self.columns, "squares": int(self.squares)}
        return Parameters({**fields, "factor": self.factor})


def global_average_pool(low: Lowering, node: Node) -> Lowered | None:
    """Lowers the mean over all pixels."""
    return _mean(low, node.inputs[0], keep_axes=True)


def reduction(*, mean: bool = False, squares: bool = False) -> Rule:
    """Returns the rule of the sum over known axes, of the mean, or of the root of the sum of squares."""

    def rule(low: Lowering, node: Node, *, keepdims: int = 1, noop_with_empty_axes: int = 0) -> Lowered | None:
        del noop_with_empty_axes  # concerns reductions without axes, which are refused below
        name, *others = node.inputs
        known = low.constants.get(others[0]) if others else None
        shape = low.shapes.get(name, ())
        axes = [] if known is None else sorted(axes_of(dense(known).ravel().tolist(), len(shape)))
        if not axes or not shape:
            return None
        lowered = None
        if mean and axes == [2, 3]:
            lowered = _mean(low, name, keep_axes=bool(keepdims))
        return lowered or _reduce(low, name, axes, keep_axes=bool(keepdims), mean=mean, squares=squares)

    return rule


def _reduce(low: Lowering, name: str, axes: list[int], *, keep_axes: bool, mean: bool, squares: bool) -> Lowered | None:
    """Lowers a reduction over any axes, which become the last ones first."""
    shape, picked = low.shapes[name], low.picked(name)
    if picked is None or (low.batch > 1 and 0 in axes):
        return None
    kept = [axis for axis in range(len(shape)) if axis not in axes]
    moved = picked.transposed([*kept, *axes])
    source = moved.base if moved.is_in_order() else low.gathered(moved).base
    out_shape = tuple(1 if axis in axes else size for axis, size in enumerate(shape) if axis in kept or keep_axes)
    columns = math.prod(shape[axis] for axis in axes)
    op = Reduce(
        source=source,
        out=low.new_flat(out_shape or (1,)),
        columns=columns,
        squares=squares,
        factor=1 / columns if mean else 1.0,
    )
    return Lowered(low.add(op), out_shape)


def _mean(low: Lowering, name: str, *, keep_axes: bool) -> Lowered | None:
    shape = low.shapes.get(name, ())
    source = low.planes(name) if len(shape) == 4 else None
    if source is None:
        return None
    # The sum runs over all positions, so those without a pixel must be zero.
    source.zero_padded = True
    # Both shapes are the same entries in memory: one float for each channel.
    out_shape = (*shape[:2], 1, 1) if keep_axes else shape[:2]
    return Lowered(low.add(Mean(source=source, out=low.new_flat(out_shape))), out_shape)


def layer_norm(
    low: Lowering,
    node: Node,
    *,
    axis: int = -1,
    epsilon: float = 1e-5,
    stash_type: int = 1,
) -> Lowered | None:
    """Lowers a layer normalisation over the last axis."""
    del stash_type  # the type of intermediate results; ours is always float32
    name, *vectors = node.inputs
    shape = low.shapes.get(name, ())
    weights = [low.constants.get(vector) for vector in vectors if vector]
    if not shape or not weights or axis not in (-1, len(shape) - 1):
        return None
    if any(weight is None or shape_of(weight) != shape[-1:] for weight in weights):
        return None
    source = low.rows(name)
    if source is None:
        return None
    arrays = [dense(weight) for weight in weights if weight is not None]
    scale, shift = [*arrays, np.zeros(shape[-1], np.float32)][:2]
    op = LayerNorm(
        source=source, out=Rows(source.shape, source.grid, 1), scale=scale, shift=shift, epsilon=float(epsilon)
    )
    return Lowered(low.add(op), shape)


def softmax(low: Lowering, node: Node, *, axis: int = -1) -> Lowered | None:
    """Lowers softmax over the last axis."""
    shape = low.shapes.get(node.inputs[0], ())
    # If the last axis is the batch, each run of the segment would see one entry of a row.
    if not shape or axis not in (-1, len(shape) - 1) or (len(shape) == 1 and low.batch > 1):
        return None
    source = low.flat(node.inputs[0])
    if source is None:
        return None
    return Lowered(low.add(Softmax(source=source, out=low.new_flat(shape), columns=shape[-1])), shape)
