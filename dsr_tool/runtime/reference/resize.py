"""Resize, axis by axis: each entry of the result is a weighted sum of the entries near its coordinate."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from dsr_tool.errors import UsageError, unknown_name
from dsr_tool.graph.axes import axes_of
from dsr_tool.graph.limits import claim
from dsr_tool.runtime.reference import NumpyFunction
from dsr_tool.sparsity.tensor import Array

__all__ = ["FUNCTIONS", "cubic_weights"]

_MODES = ("cubic", "linear", "nearest")
_COORDINATES = ("align_corners", "asymmetric", "half_pixel", "pytorch_half_pixel")
_ROUNDINGS: dict[str, Callable[[Array], Array]] = {
    "ceil": np.ceil,
    "floor": np.floor,
    "round_prefer_ceil": lambda x: np.floor(x + 0.5),
    "round_prefer_floor": lambda x: np.ceil(x - 0.5),
}


def _resize(
    x: Array,
    roi: Array | None = None,  # noqa: ARG001 - belongs to a coordinate mode that is not supported
    scales: Array | None = None,
    sizes: Array | None = None,
    *,
    mode: str = "nearest",
    coordinate_transformation_mode: str = "half_pixel",
    nearest_mode: str = "round_prefer_floor",
    cubic_coeff_a: float = -0.75,
    exclude_outside: int = 0,
    antialias: int = 0,
    axes: tuple[int, ...] = (),
    keep_aspect_ratio_policy: str = "stretch",
    extrapolation_value: float = 0.0,  # noqa: ARG001 - as roi
) -> Array:
    """Resizes `x` to `sizes`, or by `scales`, along `axes`; all axes if that is empty."""
    if mode not in _MODES:
        raise unknown_name("mode of Resize", mode, _MODES)
    if coordinate_transformation_mode not in _COORDINATES:
        raise unknown_name("coordinate mode of Resize", coordinate_transformation_mode, _COORDINATES)
    if nearest_mode not in _ROUNDINGS:
        raise unknown_name("nearest mode of Resize", nearest_mode, _ROUNDINGS)
    if antialias or exclude_outside or keep_aspect_ratio_policy != "stretch":
        raise UsageError(
            "Resize with antialias, exclude_outside or keep_aspect_ratio_policy is not supported; replace that layer."
        )
    # All modes are separable: one axis after the other gives the same as all at once, with fewer neighbours.
    for i, axis in enumerate(axes_of(axes or range(x.ndim), x.ndim)):
        n = x.shape[axis]
        if sizes is not None and sizes.size:
            out = int(sizes[i])
            scale = out / n
        else:
            scale = 1.0 if scales is None else float(scales[i])
            # In float32, as ONNX Runtime: the float32 next to 1.3 is smaller, and yet 1.3 times 10 is 13.
            out = int(np.float32(min(n * scale, 2.0**62)))
        if out == n and scale == 1.0:
            continue
        claim((out, max(x.size // max(n, 1), 1)), np.float64)
        at = _coordinates(out, n, scale, coordinate_transformation_mode)
        if mode == "nearest":
            x = np.take(x, np.clip(_ROUNDINGS[nearest_mode](at).astype(np.int64), 0, n - 1), axis)
        else:
            x = _interpolated(x, axis, at, cubic_coeff_a if mode == "cubic" else None)
    return x


def _coordinates(out: int, n: int, scale: float, mode: str) -> Array:
    """Returns the coordinate in an axis of `n` entries for each of the `out` entries of the result."""
    at = np.arange(out, dtype=np.float64)
    if mode == "align_corners":
        # A result of one entry has no corners to align; it is the first entry.
        return at * ((n - 1) / (out - 1)) if out > 1 else at
    if mode == "asymmetric":
        return at / scale
    if mode == "pytorch_half_pixel" and out == 1:
        return at
    return (at + 0.5) / scale - 0.5


def _interpolated(x: Array, axis: int, at: Array, cubic: float | None) -> Array:
    """Returns weighted sums of two neighbours along `axis`, or of four with a `cubic` coefficient.

    Neighbours outside the array are its border entries.
    """
    n = x.shape[axis]
    # Linear: a clipped coordinate repeats the border. Cubic: its polynomial needs the true distance, so only the
    # indices of the neighbours are clipped, below.
    at = at if cubic is not None else np.clip(at, 0, n - 1)
    first = np.floor(at)
    fraction = at - first
    factors = {0: 1 - fraction, 1: fraction} if cubic is None else cubic_weights(fraction, cubic)
    column = (-1, *(1 for _ in range(x.ndim - 1 - axis)))
    result: Array | None = None
    for offset, factor in factors.items():
        index = np.clip(first.astype(np.int64) + offset, 0, n - 1)
        part = np.take(x, index, axis) * factor.astype(x.dtype).reshape(column)
        result = part if result is None else result + part
    return np.asarray(result)


def cubic_weights(t: Array, a: float) -> dict[int, Array]:
    """Returns the weights of the four neighbours by their offset: Keys' cubic convolution (IEEE Trans. ASSP 29, 1981).

    Args:
        t: distance from the neighbour at offset 0, in [0, 1).
        a: coefficient; -0.75 in torch, -0.5 in Keys' paper.
    """

    def near(d: Array) -> Array:
        return np.asarray(((a + 2) * d - (a + 3)) * d * d + 1)

    def far(d: Array) -> Array:
        return np.asarray(((a * d - 5 * a) * d + 8 * a) * d - 4 * a)

    return {-1: far(t + 1), 0: near(t), 1: near(1 - t), 2: far(2 - t)}


FUNCTIONS: dict[str, NumpyFunction] = {"Resize": _resize}
