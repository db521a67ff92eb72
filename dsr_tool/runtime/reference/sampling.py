"""GridSample: entries of an image at any coordinates, between its pixels."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable

import numpy as np

from dsr_tool.errors import FormatError, UsageError, unknown_name
from dsr_tool.graph.limits import claim
from dsr_tool.runtime.reference import NumpyFunction
from dsr_tool.runtime.reference.resize import cubic_weights
from dsr_tool.sparsity.tensor import Array

__all__ = ["FUNCTIONS"]

_MODES = {"linear": "linear", "bilinear": "linear", "nearest": "nearest", "cubic": "cubic", "bicubic": "cubic"}
"""Modes by their names since operator set 20 and before."""
_PADDINGS = ("zeros", "border", "reflection")
_CUBIC = -0.75
"""Coefficient of the cubic, which the standard fixes."""


def _grid_sample(
    x: Array, grid: Array, *, mode: str = "linear", padding_mode: str = "zeros", align_corners: int = 0
) -> Array:
    """Samples images.

    Args:
        x: images (batch, channels, *size).
        grid: coordinates (batch, *out, axes) in [-1, 1], those of the last axis of the image first.
        mode: `linear`, `nearest` or `cubic`, which takes images of two axes.
        padding_mode: entries outside an image: `zeros`, its `border`, or its `reflection`.
        align_corners: whether -1 and 1 are the centres of the first and last pixel, and not their outer edges.

    Returns:
        Images (batch, channels, *out).
    """
    if mode not in _MODES:
        raise unknown_name("mode of GridSample", mode, _MODES)
    if padding_mode not in _PADDINGS:
        raise unknown_name("padding mode of GridSample", padding_mode, _PADDINGS)
    axes = x.ndim - 2
    if axes < 1 or grid.ndim != x.ndim or grid.shape[-1] != axes or len(grid) != len(x) or 0 in x.shape[2:]:
        raise FormatError(f"a grid of shape {grid.shape} does not fit images of shape {x.shape}.")
    if _MODES[mode] == "cubic" and axes != 2:
        raise UsageError(f"GridSample in mode cubic is supported for images of 2 axes, not {axes}; use linear there.")
    claim((*x.shape[:2], *grid.shape[1:-1]), x.dtype)
    # A neighbour has an index for each axis, and each index is as large as the output.
    claim((axes, *grid.shape[1:-1]), np.float64)
    pad = functools.partial(_padded, padding=padding_mode, aligned=bool(align_corners))
    result = [_image(one, at, _MODES[mode], pad, bool(align_corners)) for one, at in zip(x, grid, strict=True)]
    return np.stack(result) if result else np.zeros((0, x.shape[1], *grid.shape[1:-1]), x.dtype)


def _image(x: Array, grid: Array, mode: str, pad: Callable[[Array, int], Array], aligned: bool) -> Array:
    """Samples one image of shape (channels, *size)."""
    size = x.shape[1:]
    at = []
    for n, coordinate in zip(size, np.moveaxis(grid, -1, 0)[::-1], strict=True):
        place = coordinate.astype(np.float64)
        place = (place + 1) / 2 * (n - 1) if aligned else ((place + 1) * n - 1) / 2
        # Beyond this range a float64 is no index any more; whatever is that far outside has the value of its side.
        at.append(np.clip(np.nan_to_num(place, nan=-1.0), -1e9, 1e9))
    neighbours = []
    for n, place in zip(size, at, strict=True):
        if mode == "nearest":
            # Halves go to the even pixel, as in torch.
            neighbours.append([(np.rint(pad(place, n)), np.ones(1))])
            continue
        # Linear weights are those of the padded coordinate; cubic ones of the true one, whose neighbours are padded.
        true = place if mode == "cubic" else pad(place, n)
        first = np.floor(true)
        part = true - first
        weights = cubic_weights(part, _CUBIC) if mode == "cubic" else {0: 1 - part, 1: part}
        neighbours.append([(first + offset, weight) for offset, weight in weights.items()])
    result = np.zeros((len(x), *grid.shape[:-1]), x.dtype)
    for chosen in itertools.product(*neighbours):
        indices = [pad(index, n) if mode == "cubic" else index for (index, _), n in zip(chosen, size, strict=True)]
        weight = functools.reduce(np.multiply, (weight for _, weight in chosen))
        result += _entries(x, indices) * weight.astype(x.dtype)
    return result


def _entries(x: Array, indices: list[Array]) -> Array:
    """Returns the entries (channels, *out) at whole-numbered coordinates; zeros outside the image."""
    inside = functools.reduce(
        np.logical_and, [(index >= 0) & (index < n) for index, n in zip(indices, x.shape[1:], strict=True)]
    )
    places = [np.where(inside, index, 0).astype(np.int64) for index in indices]
    index: tuple[slice | Array, ...] = (slice(None), *places)
    return np.asarray(x[index] * inside.astype(x.dtype))


def _padded(place: Array, n: int, *, padding: str, aligned: bool) -> Array:
    """Returns coordinates along an axis of `n` pixels, moved into the image unless zeros are around it."""
    if padding == "zeros":
        return place
    if padding == "reflection":
        low, high = (0.0, n - 1.0) if aligned else (-0.5, n - 0.5)
        span = high - low
        if span == 0:
            return np.zeros_like(place)
        # A mirror at both ends: the distance from the lower end has a period of twice the span.
        distance = np.abs(place - low) % (2 * span)
        place = low + np.minimum(distance, 2 * span - distance)
    return np.clip(place, 0, n - 1)


FUNCTIONS: dict[str, NumpyFunction] = {"GridSample": _grid_sample}
