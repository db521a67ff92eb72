"""Pools: the largest entry or the mean of each window."""

from __future__ import annotations

import dataclasses
import math

import numpy as np

from dsr_tool.graph.limits import claim
from dsr_tool.graph.windows import Sizes, Window
from dsr_tool.runtime.reference import NumpyFunction
from dsr_tool.runtime.reference.reduce import mean
from dsr_tool.sparsity.tensor import Array

__all__ = ["FUNCTIONS"]


def _max_pool(
    x: Array,
    *,
    kernel_shape: Sizes,
    strides: Sizes = (),
    pads: Sizes = (),
    dilations: Sizes = (),
    ceil_mode: int = 0,
    auto_pad: str = "NOTSET",
) -> Array:
    window = Window.of(kernel_shape, strides, pads, dilations, auto_pad)
    out = window.output_size(x.shape[2:], ceil=bool(ceil_mode))
    lowest = -math.inf if np.issubdtype(x.dtype, np.floating) else np.iinfo(x.dtype).min
    # One pass over the whole image for each tap: k * k passes of numpy instead of a Python loop over windows.
    first, *others = window.taps(window.padded(x, out, lowest), out)
    result: Array = first.copy()
    for tap in others:
        np.maximum(result, tap, out=result)
    return result


def _average_pool(
    x: Array,
    *,
    kernel_shape: Sizes,
    strides: Sizes = (),
    pads: Sizes = (),
    dilations: Sizes = (),
    ceil_mode: int = 0,
    count_include_pad: int = 0,
    auto_pad: str = "NOTSET",
) -> Array:
    window = Window.of(kernel_shape, strides, pads, dilations, auto_pad)
    size = x.shape[2:]
    out = window.output_size(size, ceil=bool(ceil_mode))
    result: Array = _sum_of_taps(window, x, out)
    if count_include_pad:
        # The padding of the attribute counts as entries; what ceil_mode adds behind it does not.
        counted = [n + b + e for n, b, e in zip(size, window.begin, window.end, strict=True)]
        window = dataclasses.replace(window, begin=(0,) * len(size))
    else:
        counted = list(size)
    # Summing ones in the windows gives the number of entries that each window counts.
    claim(counted, x.dtype)
    result /= _sum_of_taps(window, np.ones((1, 1, *counted), x.dtype), out)
    return result


def _sum_of_taps(window: Window, x: Array, out: Sizes) -> Array:
    claim((*x.shape[:2], *out), x.dtype)
    result = np.zeros((*x.shape[:2], *out), x.dtype)
    for tap in window.taps(window.padded(x, out), out):
        result += tap
    return result


def _global_average_pool(x: Array) -> Array:
    return mean(x, tuple(range(2, x.ndim)), keep=True)


def _global_max_pool(x: Array) -> Array:
    return np.asarray(x.max(axis=tuple(range(2, x.ndim)), keepdims=True))


FUNCTIONS: dict[str, NumpyFunction] = {
    "AveragePool": _average_pool,
    "GlobalAveragePool": _global_average_pool,
    "GlobalMaxPool": _global_max_pool,
    "MaxPool": _max_pool,
}
