"""Lowering rules of pools."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from dsr_tool.graph.ir import Node
from dsr_tool.graph.limits import claim
from dsr_tool.graph.windows import Window
from dsr_tool.runtime.compiler.convolution import convolve, place_window
from dsr_tool.runtime.compiler.layouts import Planes
from dsr_tool.runtime.compiler.lowering import Lowered, Lowering
from dsr_tool.runtime.compiler.op import Op, Parameters
from dsr_tool.runtime.compiler.packing import Packer
from dsr_tool.runtime.compiler.picked import Picked
from dsr_tool.runtime.compiler.picking import pick_to_planes
from dsr_tool.runtime.compiler.taps import extend_halo, offsets_of, taps_of, window_of
from dsr_tool.runtime.kernels.ops import Kind
from dsr_tool.sparsity.mask import Mask
from dsr_tool.sparsity.tensor import SparseTensor

__all__ = ["MaxPool", "average_pool", "max_pool"]


@dataclass(frozen=True, eq=False, kw_only=True)
class MaxPool(Op):
    """The largest entry under a window.

    Attributes:
        window: the window that slides over the source.
    """

    source: Planes
    out: Planes
    window: Window

    kind: ClassVar[Kind] = Kind.MAX_POOL

    def parameters(self, packer: Packer) -> Parameters:
        """Returns the offsets of the window's taps."""
        del packer
        taps = np.array(offsets_of(self.window, self.source, self.out), np.int32)
        fields = {"taps": taps, "taps_per_phase": taps.shape[1], "source_phases": self.source.phases}
        return Parameters(fields)


def max_pool(low: Lowering, node: Node, *, ceil_mode: int = 0, **_: Any) -> Lowered | None:
    """Lowers a max pool over two axes."""
    name = node.inputs[0]
    window, shape = window_of(node, low.constants), low.shapes.get(name, ())
    if window is None or len(shape) != 4 or len(set(window.strides)) != 1:
        return None
    size = window.output_size(shape[2:], ceil=bool(ceil_mode))
    planes = low.planes(name)
    if planes is None or min(size) < 1:
        return None
    # The halo is zero where the standard pads with minus infinity, which is the same after a ReLU alone.
    if _reads_padding(window, size, shape[2:]) and not planes.nonnegative:
        planes = _padded(low, planes, window, size)
        window = dataclasses.replace(window, begin=(0, 0), end=(0, 0))
        if planes is None:
            return None
    windowed = place_window(low, planes, window, size, node)
    if windowed is None:
        return None
    source, window, factor = windowed
    out = Planes((*shape[:2], *size), source.grid, factor)
    # Kept for the pool or the convolution that follows: the largest of nonnegative entries is one.
    out.nonnegative = source.nonnegative
    if not extend_halo(source, taps_of(window, source.factor, factor)):
        return None
    return Lowered(low.add(MaxPool(source=source, out=out, window=window)), out.shape)


def _padded(low: Lowering, source: Planes, window: Window, size: tuple[int, ...]) -> Planes | None:
    """Returns pixels with as much minus infinity around them as windows reach; None if kernels cannot address them."""
    picked, shape = Picked.of(source, (1, *source.shape[1:])), list(source.shape)
    for axis in (2, 3):
        n, begin, stride = shape[axis], window.begin[axis - 2], window.strides[axis - 2]
        reach = (size[axis - 2] - 1) * stride + (window.kernel[axis - 2] - 1) * window.dilations[axis - 2] + 1
        claim((reach,), np.int64)
        indices = np.arange(reach) - begin
        taken = picked.taken(axis, np.where(indices < n, indices, -1))
        if taken is None:
            return None
        picked, shape[axis] = taken, reach
    picked.fill = -math.inf
    stride = window.strides[0]
    rows, columns = -(-shape[2] // stride), -(-shape[3] // stride)
    out = Planes(tuple(shape), low.grids.grid(rows, columns, max(window.kernel) * max(window.dilations)), stride)
    if not picked.divides((1,)) or not out.extend_halo(0, 0):
        return None
    low.add(pick_to_planes(picked, out))
    return out


def _reads_padding(window: Window, out: tuple[int, ...], size: tuple[int, ...]) -> bool:
    """Returns whether some window reaches past the pixels: by its padding, or because the output was rounded up."""
    reaches = zip(out, window.strides, window.kernel, window.dilations, size, strict=True)
    return any(window.begin) or any((n - 1) * s + (k - 1) * d + 1 > pixels for n, s, k, d, pixels in reaches)


def average_pool(
    low: Lowering, node: Node, *, ceil_mode: int = 0, count_include_pad: int = 0, **_: Any
) -> Lowered | None:
    """Lowers an average pool as a depthwise convolution, where every window has the same number of pixels."""
    window, shape = window_of(node, low.constants), low.shapes.get(node.inputs[0], ())
    if window is None or len(shape) != 4:
        return None
    padded = any((*window.begin, *window.end))
    if padded and (not count_include_pad or ceil_mode):
        return None
    # A window that reaches past the pixels counts fewer of them, while a depthwise weight is the same everywhere.
    if ceil_mode and window.output_size(shape[2:], ceil=True) != window.output_size(shape[2:]):
        return None
    weight_shape = (shape[1], 1, *window.kernel)
    values = np.full(math.prod(weight_shape), 1 / math.prod(window.kernel), np.float32)
    return convolve(low, node, SparseTensor(Mask.full(weight_shape), values), None, shape[1])
