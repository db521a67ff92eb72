"""Resize, axis by axis: each entry of the result is a weighted sum of the entries near its coordinate."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import numpy as np

from dsr_tool.errors import UsageError, unknown_name
from dsr_tool.graph.axes import axes_of
from dsr_tool.graph.limits import claim
from dsr_tool.runtime.reference import NumpyFunction
from dsr_tool.sparsity.tensor import Array

__all__ = ["FUNCTIONS", "check_modes", "cubic_weights", "nearest_entries", "resized_axes"]

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
    check_modes(mode, coordinate_transformation_mode, nearest_mode)
    if antialias or exclude_outside or keep_aspect_ratio_policy != "stretch":
        raise UsageError(
            "Resize with antialias, exclude_outside or keep_aspect_ratio_policy is not supported; replace that layer."
        )
    # All modes are separable: one axis after the other gives the same as all at once, with fewer neighbours.
    for axis, out, scale in resized_axes(x.shape, scales, sizes, axes):
        n = x.shape[axis]
        claim((out, max(x.size // max(n, 1), 1)), np.float64)
        if mode == "nearest":
            x = np.take(x, nearest_entries(out, n, scale, coordinate_transformation_mode, nearest_mode), axis)
        else:
            at = _coordinates(out, n, scale, coordinate_transformation_mode)
            x = _interpolated(x, axis, at, cubic_coeff_a if mode == "cubic" else None)
    return x


def check_modes(mode: str, coordinates: str, rounding: str) -> None:
    """Raises `UsageError` unless the three modes of a Resize are known."""
    for what, value, known in (
        ("mode", mode, _MODES),
        ("coordinate mode", coordinates, _COORDINATES),
        ("nearest mode", rounding, tuple(_ROUNDINGS)),
    ):
        if value not in known:
            raise unknown_name(f"{what} of Resize", value, known)


def resized_axes(
    shape: Sequence[int], scales: Array | None, sizes: Array | None, axes: Sequence[int]
) -> Iterator[tuple[int, int, float]]:
    """Yields each axis that a Resize changes, its new size, and the new size as a multiple of the old one.

    Args:
        shape: shape of the value.
        scales: multiples, by axis.
        sizes: new sizes, by axis; they count if they are given.
        axes: the axes that scales or sizes are of; all if it is empty.

    Raises:
        FormatError: the value has no such axis.
    """
    for i, axis in enumerate(axes_of(axes or range(len(shape)), len(shape))):
        n = shape[axis]
        if sizes is not None and sizes.size:
            out = int(sizes[i])
            scale = out / n
        else:
            scale = 1.0 if scales is None else float(scales[i])
            # In float32, as ONNX Runtime: the float32 next to 1.3 is smaller, and yet 1.3 times 10 is 13.
            out = int(np.float32(min(n * scale, 2.0**62)))
        if out != n or scale != 1.0:
            yield axis, out, scale


def nearest_entries(out: int, n: int, scale: float, coordinates: str, rounding: str) -> Array:
    """Returns which of the `n` entries of an axis is the nearest to each of the `out` entries of the result."""
    return np.clip(_ROUNDINGS[rounding](_coordinates(out, n, scale, coordinates)).astype(np.int64), 0, n - 1)


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
