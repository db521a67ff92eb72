"""Convolution: im2col and a matrix product with the weight; depthwise convolution by shifted multiply-adds."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from dsr_tool.graph.limits import claim
from dsr_tool.graph.windows import Sizes, Window
from dsr_tool.runtime.reference import NumpyFunction
from dsr_tool.runtime.reference.matrices import Multiply, multiplier
from dsr_tool.sparsity.tensor import Array, SparseTensor, Weight, dense

__all__ = ["COLUMN_BYTES", "FUNCTIONS", "prepare_conv"]

COLUMN_BYTES = 4 << 20
"""Bytes of one im2col block. Larger blocks are no faster and no longer fit in the cache."""


def prepare_conv(
    weight: Weight,
    bias: Weight | None = None,
    *,
    kernel_shape: Sizes = (),
    strides: Sizes = (),
    pads: Sizes = (),
    dilations: Sizes = (),
    group: int = 1,
    auto_pad: str = "NOTSET",
) -> Multiply:
    """Returns the convolution with these weights as a function of x, shape (batch, channels, *size).

    Args:
        weight: shape (out channels, channels / group, *kernel).
        bias: shape (out channels,).
        kernel_shape: size of the kernel; the weight's own if empty.
        strides: distance between neighbouring outputs per axis.
        pads: padding before each axis, then padding after each axis.
        dilations: distance between neighbouring taps per axis.
        group: number of groups of channels that are connected only among themselves.
        auto_pad: `NOTSET` or `VALID`.
    """
    shape = weight.mask.shape if isinstance(weight, SparseTensor) else weight.shape
    window = Window.of(kernel_shape or shape[2:], strides, pads, dilations, auto_pad)
    column = None if bias is None else dense(bias)[:, None]
    if group > 1 and shape[1] == 1:
        return _Depthwise(window, dense(weight).reshape(group, -1, math.prod(shape[2:])), column)
    return _Convolution(window, multiplier(weight, group), column)


@dataclass(frozen=True)
class _Convolution:
    window: Window
    multiply: Multiply
    bias: Array | None  # (out channels, 1)

    def __call__(self, x: Array) -> Array:
        # Image by image: the im2col blocks of one image are all that is held besides input and output.
        return _joined([self._image(image) for image in x[:, None]], axis=0)

    def _image(self, x: Array) -> Array:
        """Computes one image: (1, channels, *size) -> (1, out channels, *out)."""
        out = self.window.output_size(x.shape[2:])
        padded = self.window.padded(x[0], out)
        taps = math.prod(self.window.kernel)
        row_bytes = taps * x.shape[1] * math.prod(out[1:]) * x.itemsize
        # A kernel of one tap needs no copy of its input, so it needs no blocks either.
        rows = out[0] if taps == 1 else max(COLUMN_BYTES // max(row_bytes, 1), 1)
        claim((row_bytes * min(rows, out[0]),), np.uint8)
        blocks = [self._rows(padded, out, first, rows) for first in range(0, out[0], rows)]
        return _joined(blocks, axis=1).reshape(1, -1, *out)

    def _rows(self, padded: Array, out: Sizes, first: int, rows: int) -> Array:
        """Computes the output rows from `first` on as a matrix (out channels, positions)."""
        below = padded[:, first * self.window.strides[0] :]
        taps = list(self.window.taps(below, (min(rows, out[0] - first), *out[1:])))
        columns = taps[0] if len(taps) == 1 else np.stack(taps, axis=1)
        product = self.multiply(columns.reshape(len(padded) * len(taps), -1))
        if self.bias is not None:
            product += self.bias
        return product


@dataclass(frozen=True)
class _Depthwise:
    window: Window
    weight: Array  # (groups, out channels per group, kernel entries)
    bias: Array | None

    def __call__(self, x: Array) -> Array:
        return _joined([self._image(image) for image in x[:, None]], axis=0)

    def _image(self, x: Array) -> Array:
        """Computes one image: (1, channels, *size) -> (1, out channels, *out)."""
        out = self.window.output_size(x.shape[2:])
        padded = self.window.padded(x[0], out)[:, None]
        weight = self.weight.reshape(*self.weight.shape, *(1 for _ in out))
        claim((*self.weight.shape[:2], *out), x.dtype)
        result = np.zeros((*self.weight.shape[:2], *out), x.dtype)
        scratch = np.empty_like(result)
        for i, tap in enumerate(self.window.taps(padded, out)):
            np.multiply(tap, weight[:, :, i], out=scratch)
            result += scratch
        flat = result.reshape(-1, math.prod(out))
        if self.bias is not None:
            flat += self.bias
        return flat.reshape(1, -1, *out)


def _joined(parts: list[Array], axis: int) -> Array:
    return parts[0] if len(parts) == 1 else np.concatenate(parts, axis)


def _conv(x: Array, weight: Array, bias: Array | None = None, **attributes: object) -> Array:
    """Computes a convolution whose weight is computed in the graph, as it is not known before."""
    result: Array = prepare_conv(weight, bias, **attributes)(x)  # type: ignore[arg-type]
    return result


FUNCTIONS: dict[str, NumpyFunction] = {"Conv": _conv}
