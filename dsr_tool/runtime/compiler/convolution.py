"""Lowering rule of convolutions over two axes."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import numpy as np

from dsr_tool.graph.ir import Node
from dsr_tool.graph.operators import operator_of
from dsr_tool.graph.windows import Window
from dsr_tool.runtime.compiler.constants import as_sparse, is_packable, shape_of
from dsr_tool.runtime.compiler.gemv import lower_gemv
from dsr_tool.runtime.compiler.layouts import Planes
from dsr_tool.runtime.compiler.lowering import Lowered, Lowering
from dsr_tool.runtime.compiler.relayout import to_planes
from dsr_tool.runtime.compiler.spmm import Spmm
from dsr_tool.runtime.compiler.taps import POINT, extend_halo, taps_of, window_of
from dsr_tool.sparsity.tensor import Weight, dense

__all__ = ["Windowed", "conv", "convolve", "place_window"]


class Windowed(NamedTuple):
    """A source on a grid that serves a window.

    Attributes:
        source: the pixels.
        window: the window on that grid.
        factor: factor of the output.
    """

    source: Planes
    window: Window
    factor: int


def conv(low: Lowering, node: Node, *, group: int = 1, **_: Any) -> Lowered | None:
    """Lowers a convolution with a known weight and bias."""
    # The other attributes describe the window; `window_of` reads them from the node.
    weight = low.constants.get(node.inputs[1])
    bias_name = node.inputs[2] if len(node.inputs) > 2 else ""
    bias = low.constants.get(bias_name)
    if weight is None or (bias_name and bias is None):
        return None
    return convolve(low, node, weight, bias, group)


def convolve(low: Lowering, node: Node, weight: Weight, bias: Weight | None, groups: int) -> Lowered | None:
    """Lowers a node that slides a weight over pixels.

    Args:
        low: the lowering.
        node: the node; its attributes describe the window, and its first input is the source.
        weight: shape (out channels, channels / groups, height, width).
        bias: shape (out channels,).
        groups: number of groups of channels.
    """
    name = node.inputs[0]
    window, shape = window_of(node, low.constants), low.shapes.get(name, ())
    if window is None or len(shape) != 4 or len(shape_of(weight)) != 4:
        return None
    rows, inner, *kernel = shape_of(weight)
    size = window.output_size(shape[2:])
    # Kernels trust every size and offset, so whatever does not fit together is left to the reference, which checks.
    if (
        min(size) < 1
        or not isinstance(groups, int)
        or groups < 1
        or rows % groups
        or inner * groups != shape[1]
        or tuple(kernel) != window.kernel
        or (bias is not None and shape_of(bias) != (rows,))
        or len(set(window.strides)) != 1
        or not is_packable(weight)
    ):
        return None
    out_shape = (shape[0], rows, *size)
    point = shape[2:] == size == (1, 1) and window.kernel == (1, 1) and not any(window.begin)
    if point and groups == 1 and shape[0] == low.batch:
        # One pixel of each image is one vector: the gates of squeeze-and-excitation.
        return lower_gemv(low, name, weight, bias, out_shape)
    planes = low.planes(name)
    if planes is not None and window == POINT and rows > planes.channels:
        planes = _on_grid_of_stride(low, planes, node)
    windowed = None if planes is None else place_window(low, planes, window, size, node)
    if windowed is None:
        return None
    source, window, factor = windowed
    out = Planes(out_shape, source.grid, factor)
    if not extend_halo(source, taps_of(window, source.factor, out.factor)):
        return None
    op = Spmm(
        source=source,
        out=out,
        weight=as_sparse(weight),
        bias=np.zeros(rows, np.float32) if bias is None else dense(bias),
        window=window,
        groups=groups,
        weight_name=(node.op, node.inputs[1] if len(node.inputs) > 1 else node.outputs[0]),
        target=low.target,
    )
    return Lowered(low.add(op), out.shape)


def _on_grid_of_stride(low: Lowering, source: Planes, node: Node) -> Planes:
    """Returns the source of a 1 x 1 kernel on the grid that a strided window after that kernel needs, or as it is.

    The kernel has more output channels than input channels, so pixels are moved before it rather than after it.
    """
    window = _window_after(low, node.outputs[0])
    if source.factor > 1 or window is None or len(set(window.strides)) != 1 or max(window.kernel) == 1:
        return source
    stride, size = window.strides[0], window.output_size(source.shape[2:])
    if stride == 1 or min(size) < 1:
        return source
    pad, _ = low.grids.survey(node.inputs[0], stride, low.index)
    rows = max(-(-source.shape[2] // stride), size[0])
    columns = max(-(-source.shape[3] // stride), size[1])
    return low.on_grid(source, low.grids.grid(rows, columns, pad), stride)


def _window_after(low: Lowering, name: str) -> Window | None:
    """Returns the window that alone reads a value, perhaps after functions of single entries; None if there is none."""
    for reader in low.nodes[low.index + 1 :]:
        if name in reader.inputs:
            row = operator_of(reader.op)
            if not low.only_reader(name) or not (row.elementwise or row.windowed):
                return None
            if row.windowed:
                return window_of(reader, low.constants) if reader.inputs[0] == name else None
            name = reader.outputs[0]
    return None


def place_window(low: Lowering, source: Planes, window: Window, size: tuple[int, ...], node: Node) -> Windowed | None:
    """Returns a source on a grid that serves the window; the same one if its own grid does.

    Args:
        low: the lowering.
        source: the pixels.
        window: the window, with the same stride in both directions.
        size: height and width of the output.
        node: the node that is being lowered.
    """
    stride = window.strides[0]
    if source.factor % stride == 0:
        # The stride goes from one factor to a smaller one on the same grid, and nothing has to be moved.
        factor = source.factor // stride
        pad = max(abs(dx) for _, dx, _ in taps_of(window, source.factor, factor))
        if source.grid.fits(size[0], size[1], factor) and pad <= source.grid.pad:
            return Windowed(source, window, factor)
    if stride > 1 and math.prod(window.kernel) == 1 and not any((*window.begin, *window.end)):
        # Only every stride-th pixel is read, so the others are not moved.
        pad, _ = low.grids.survey(node.outputs[0], 1, low.index)
        picked = Planes((*source.shape[:2], *size), low.grids.grid(size[0], size[1], pad), 1)
        picked.nonnegative = source.nonnegative
        low.add(to_planes(source, picked, stride))
        return Windowed(picked, POINT, 1)
    # The pixels move to a coarser grid, on which they have `stride` phases in each direction.
    pad, _ = low.grids.survey(node.inputs[0], stride, low.index)
    rows = max(-(-source.shape[2] // stride), size[0])
    columns = max(-(-source.shape[3] // stride), size[1])
    return Windowed(low.on_grid(source, low.grids.grid(rows, columns, pad), stride), window, 1)
