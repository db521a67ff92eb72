"""Operators that add overlapping windows up: transposed convolution, and Col2Im, the adjoint of im2col."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from dsr_tool.errors import FormatError, unknown_name
from dsr_tool.graph.limits import claim, int_list
from dsr_tool.graph.windows import Sizes, Window
from dsr_tool.runtime.reference import NumpyFunction
from dsr_tool.runtime.reference.matrices import Multiply, multiplier
from dsr_tool.sparsity.tensor import Array, Weight, dense

__all__ = ["FUNCTIONS", "prepare_conv_transpose"]

_SAME = ("SAME_UPPER", "SAME_LOWER")
_PADDINGS = ("NOTSET", "VALID", *_SAME)


def prepare_conv_transpose(
    weight: Weight,
    bias: Weight | None = None,
    *,
    kernel_shape: Sizes = (),
    strides: Sizes = (),
    pads: Sizes = (),
    dilations: Sizes = (),
    output_padding: Sizes = (),
    output_shape: Sizes = (),
    group: int = 1,
    auto_pad: str = "NOTSET",
) -> Multiply:
    """Returns the transposed convolution with these weights as a function of x, shape (batch, channels, *size).

    Args:
        weight: shape (channels, out channels / group, *kernel).
        bias: shape (out channels,).
        kernel_shape: size of the kernel; the weight's own if empty.
        strides: distance between the outputs of neighbouring inputs per axis.
        pads: entries cut off before each axis, then after each axis.
        dilations: distance between neighbouring taps per axis.
        output_padding: entries added after each axis.
        output_shape: size of the output, from which the pads follow; as the pads and strides say if empty.
        group: number of groups of channels that are connected only among themselves.
        auto_pad: `NOTSET`; `VALID` for no pads; `SAME_UPPER` or `SAME_LOWER` for an output of size * strides.

    Raises:
        UsageError: another `auto_pad`.
    """
    if auto_pad not in _PADDINGS:
        raise unknown_name("auto_pad of ConvTranspose", auto_pad, _PADDINGS)
    array = dense(weight)
    # The window checks sizes and number of taps; pads are cut at the end, since they may follow from the input.
    window = Window.of(kernel_shape or array.shape[2:], strides, pads, dilations, "NOTSET")
    if window.kernel != array.shape[2:]:
        raise FormatError(f"kernel_shape {window.kernel} differs from the weight's {array.shape[2:]}.")
    extra = output_padding or (0,) * len(window.kernel)
    if len(extra) != len(window.kernel) or min(extra, default=0) < 0:
        raise FormatError(f"output_padding {str(extra)[:40]} does not fit a kernel of {len(window.kernel)} axes.")
    # The full shape may be given too; its last sizes are those of pixels.
    wanted = output_shape[-len(window.kernel) :] if output_shape else ()
    channels, out_channels = array.shape[:2]
    taps = array.reshape(group, channels // group, out_channels, -1).transpose(3, 0, 2, 1)
    # One product for each tap: its rows are the output channels, group after group.
    products = tuple(multiplier(np.ascontiguousarray(tap.reshape(group * out_channels, -1)), group) for tap in taps)
    column = None if bias is None else dense(bias)[:, None]
    return _ConvTranspose(window, products, column, group * out_channels, extra, wanted, auto_pad)


@dataclass(frozen=True)
class _ConvTranspose:
    window: Window
    products: tuple[Multiply, ...]  # (out channels, channels) for each tap
    bias: Array | None  # (out channels, 1)
    channels: int
    extra: Sizes
    wanted: Sizes
    auto_pad: str

    def __call__(self, x: Array) -> Array:
        begin, out = self._place(x.shape[2:])
        claim((len(x), self.channels, *out), x.dtype)
        return (
            np.stack([self._image(image, begin, out) for image in x])
            if len(x)
            else np.zeros((0, self.channels, *out), x.dtype)
        )

    def _image(self, x: Array, begin: Sizes, out: Sizes) -> Array:
        """Computes one image: (channels, *size) -> (out channels, *out)."""
        flat = x.reshape(len(x), -1)
        columns = (product(flat).reshape(-1, *x.shape[1:]) for product in self.products)
        result = _added(self.window, columns, self.channels, x.shape[1:], begin, out, x.dtype)
        if self.bias is not None:
            result.reshape(self.channels, -1)[...] += self.bias
        return result

    def _place(self, size: Sizes) -> tuple[Sizes, Sizes]:
        """Returns the entries that are cut off before each axis, and the size of the output."""
        window = self.window
        full = [
            (n - 1) * s + e + (k - 1) * d + 1
            for n, s, e, k, d in zip(size, window.strides, self.extra, window.kernel, window.dilations, strict=True)
        ]
        if self.auto_pad == "VALID":
            return (0,) * len(full), tuple(full)
        if not self.wanted and self.auto_pad not in _SAME:
            cut = zip(full, window.begin, window.end, strict=True)
            return window.begin, _positive([n - b - e for n, b, e in cut])
        out = self.wanted or tuple(n * s for n, s in zip(size, window.strides, strict=True))
        pads = [max(n - o, 0) for n, o in zip(full, out, strict=True)]
        # The odd entry goes to the side that the standard names for each mode.
        upper = self.auto_pad == "SAME_UPPER"
        return tuple(pad // 2 if upper else pad - pad // 2 for pad in pads), _positive(out)


def _added(
    window: Window,
    columns: Iterable[Array],
    channels: int,
    places: Sizes,
    begin: Sizes,
    out: Sizes,
    dtype: npt.DTypeLike,
) -> Array:
    """Adds the entries of each tap up where its windows lie.

    Args:
        window: kernel, strides and dilations.
        columns: for each tap the array (channels, *places) to add.
        channels: channels of the result.
        places: number of windows per axis.
        begin: entries that are cut off before each axis.
        out: size of the result.
        dtype: type of the result.
    """
    axes = zip(places, window.kernel, window.strides, window.dilations, begin, out, strict=True)
    full = [max((n - 1) * s + (k - 1) * d + 1, b + o) for n, k, s, d, b, o in axes]
    claim((channels, *full), dtype)
    result = np.zeros((channels, *full), dtype)
    # Views of the result, one for each tap: no two windows write one entry through the same view.
    for view, part in zip(window.taps(result, places), columns, strict=True):
        np.add(view, part, out=view)
    inner = (slice(None), *(slice(b, b + o) for b, o in zip(begin, out, strict=True)))
    return np.ascontiguousarray(result[inner])


def _positive(size: Iterable[int]) -> Sizes:
    sizes = tuple(size)
    if min(sizes, default=1) < 0:
        raise FormatError(f"the pads cut more off than there is: the output would have the size {sizes}.")
    return sizes


def _conv_transpose(x: Array, weight: Array, bias: Array | None = None, **attributes: object) -> Array:
    """Computes a transposed convolution whose weight is computed in the graph, as it is not known before."""
    result: Array = prepare_conv_transpose(weight, bias, **attributes)(x)  # type: ignore[arg-type]
    return result


def _col2im(
    x: Array,
    image_shape: Array,
    block_shape: Array,
    *,
    dilations: Sizes = (),
    pads: Sizes = (),
    strides: Sizes = (),
) -> Array:
    """Adds columns of shape (batch, channels * taps, places) up to images (batch, channels, *image_shape)."""
    image, block = tuple(int_list(image_shape)), tuple(int_list(block_shape))
    window = Window.of(block, strides, pads, dilations, "NOTSET")
    places = window.output_size(image)
    taps, count = math.prod(block), math.prod(places)
    if min((*image, *places), default=1) < 1 or x.ndim != 3 or x.shape[1] % taps or x.shape[2] != count:
        raise FormatError(f"columns of shape {x.shape} are not those of {count} blocks {block} of an image {image}.")
    channels = x.shape[1] // taps
    claim((len(x), channels, *image), x.dtype)
    result = np.zeros((len(x), channels, *image), x.dtype)
    for one, columns in zip(result, x.reshape(len(x), channels, taps, *places), strict=True):
        one[...] = _added(window, np.moveaxis(columns, 1, 0), channels, places, window.begin, image, x.dtype)
    return result


FUNCTIONS: dict[str, NumpyFunction] = {"Col2Im": _col2im, "ConvTranspose": _conv_transpose}
