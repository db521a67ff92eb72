"""Lowering rules of means, layer normalisation and softmax."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from dsr_tool.graph.ir import Node
from dsr_tool.runtime.compiler.constants import shape_of
from dsr_tool.runtime.compiler.layouts import Flat, Planes, Rows
from dsr_tool.runtime.compiler.lowering import Lowered, Lowering
from dsr_tool.runtime.compiler.op import Op, Parameters
from dsr_tool.runtime.compiler.packing import Packer
from dsr_tool.runtime.kernels.ops import Kind
from dsr_tool.sparsity.tensor import Array, dense

__all__ = ["LayerNorm", "Mean", "Softmax", "global_average_pool", "layer_norm", "reduce_mean", "softmax"]


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


def global_average_pool(low: Lowering, node: Node) -> Lowered | None:
    """Lowers the mean over all pixels."""
    return _mean(low, node.inputs[0], keep_axes=True)


def reduce_mean(low: Lowering, node: Node, *, keepdims: int = 1, noop_with_empty_axes: int = 0) -> Lowered | None:
    """Lowers a mean over the last two of four axes."""
    del noop_with_empty_axes  # concerns means without axes, which are refused below
    axes = low.constants.get(node.inputs[1]) if len(node.inputs) > 1 else None
    if axes is None or sorted(int(axis) % 4 for axis in dense(axes).ravel()) != [2, 3]:
        return None
    return _mean(low, node.inputs[0], keep_axes=bool(keepdims))


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
