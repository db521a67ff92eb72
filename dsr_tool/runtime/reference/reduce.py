"""Reductions, and the normalisations that use them."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from dsr_tool.errors import FormatError, UsageError
from dsr_tool.graph.axes import axes_of, axis_of
from dsr_tool.graph.limits import int_list
from dsr_tool.runtime.reference import NumpyFunction
from dsr_tool.sparsity.tensor import Array

__all__ = ["FUNCTIONS", "mean"]


def _reduction(function: Callable[[Array, tuple[int, ...] | None, bool], Array]) -> NumpyFunction:
    """Makes an ONNX reduction of a function of an array, its axes (None for all) and whether to keep them."""

    def run(x: Array, axes: Array | None = None, *, keepdims: int = 1, noop_with_empty_axes: int = 0) -> Array:
        if axes is None or not axes.size:
            # Without axes nothing is reduced, but ReduceL2 still returns absolute values.
            return function(x, () if noop_with_empty_axes else None, bool(keepdims))
        return function(x, tuple(axes_of(int_list(axes), x.ndim)), bool(keepdims))

    return run


def mean(x: Array, axes: tuple[int, ...] | None, keep: bool) -> Array:
    """Returns the mean over some axes, None for all.

    Raises:
        FormatError: the array is empty.
    """
    if not x.size:
        raise FormatError("cannot take the mean of an empty array.")
    # numpy would return float64 for integers; the standard keeps the type.
    return np.asarray(x.mean(axis=axes, keepdims=keep, dtype=x.dtype))


def _sum(x: Array, axes: tuple[int, ...] | None, keep: bool) -> Array:
    return np.asarray(x.sum(axis=axes, keepdims=keep, dtype=x.dtype))


def _l2(x: Array, axes: tuple[int, ...] | None, keep: bool) -> Array:
    return np.sqrt(_sum(np.square(x), axes, keep))


def _l1(x: Array, axes: tuple[int, ...] | None, keep: bool) -> Array:
    return _sum(np.abs(x), axes, keep)


def _sum_of_squares(x: Array, axes: tuple[int, ...] | None, keep: bool) -> Array:
    return _sum(np.square(x), axes, keep)


def _product(x: Array, axes: tuple[int, ...] | None, keep: bool) -> Array:
    return np.asarray(x.prod(axis=axes, keepdims=keep, dtype=x.dtype))


def _largest(x: Array, axes: tuple[int, ...] | None, keep: bool) -> Array:
    return np.asarray(x.max(axis=axes, keepdims=keep))


def _smallest(x: Array, axes: tuple[int, ...] | None, keep: bool) -> Array:
    return np.asarray(x.min(axis=axes, keepdims=keep))


def _log_sum(x: Array, axes: tuple[int, ...] | None, keep: bool) -> Array:
    return np.log(_sum(x, axes, keep))


def _log_sum_exp(x: Array, axes: tuple[int, ...] | None, keep: bool) -> Array:
    # Less its maximum, as exp overflows float32 above 88.
    top = _largest(x, axes, True)
    result = np.log(_sum(np.exp(x - top), axes, True)) + top
    return result if keep else result.reshape(_largest(x, axes, False).shape)


def _place_of(find: Callable[..., Array]) -> NumpyFunction:
    """Makes ArgMax or ArgMin of numpy's function, which returns the first of equal entries."""

    def run(x: Array, *, axis: int = 0, keepdims: int = 1, select_last_index: int = 0) -> Array:
        axis = axis_of(axis, x.ndim)
        # Backwards, the last of equal entries is the first one.
        place = find(np.flip(x, axis) if select_last_index else x, axis=axis, keepdims=bool(keepdims))
        return np.asarray(x.shape[axis] - 1 - place if select_last_index else place, np.int64)

    return run


def _log_softmax(x: Array, *, axis: int = -1) -> Array:
    return np.asarray(x - _log_sum_exp(x, (axis_of(axis, x.ndim),), keep=True))


def _softmax(x: Array, *, axis: int = -1) -> Array:
    axis = axis_of(axis, x.ndim)
    # Less its maximum, as exp overflows float32 above 88.
    result: Array = np.exp(x - x.max(axis=axis, keepdims=True))
    result /= result.sum(axis=axis, keepdims=True)
    return result


def _layer_norm(x: Array, scale: Array, bias: Array | None = None, *, axis: int = -1, epsilon: float = 1e-5) -> Array:
    axes = tuple(range(axis_of(axis, x.ndim), x.ndim))
    result: Array = x - mean(x, axes, keep=True)
    variance = mean(np.square(result), axes, keep=True)
    result *= scale / np.sqrt(variance + np.asarray(epsilon, x.dtype))
    if bias is not None:
        result += bias
    return result


def _batch_norm(
    x: Array,
    scale: Array,
    bias: Array,
    mean: Array,
    variance: Array,
    *,
    epsilon: float = 1e-5,
    training_mode: int = 0,
) -> Array:
    if training_mode:
        raise UsageError("BatchNormalization in training mode cannot run; export the model in eval mode.")
    if not scale.shape == bias.shape == mean.shape == variance.shape == x.shape[1:2]:
        raise FormatError(f"scale, bias, mean and variance must have shape {x.shape[1:2]}, one entry for each channel.")
    # Scale and shift are combined per channel first, so that the image is passed over twice and not four times.
    factor = scale / np.sqrt(variance + np.asarray(epsilon, variance.dtype))
    per_channel = (-1, *(1 for _ in x.shape[2:]))
    result: Array = x * factor.reshape(per_channel)
    result += (bias - mean * factor).reshape(per_channel)
    return result


def _instance_norm(x: Array, scale: Array, bias: Array, *, epsilon: float = 1e-5) -> Array:
    if not scale.shape == bias.shape == x.shape[1:2]:
        raise FormatError(f"scale and bias must have shape {x.shape[1:2]}, one entry for each channel.")
    axes, per_channel = tuple(range(2, x.ndim)), (-1, *(1 for _ in x.shape[2:]))
    result: Array = x - mean(x, axes, keep=True)
    variance = mean(np.square(result), axes, keep=True)
    result *= scale.reshape(per_channel) / np.sqrt(variance + np.asarray(epsilon, x.dtype))
    result += bias.reshape(per_channel)
    return result


FUNCTIONS: dict[str, NumpyFunction] = {
    "ArgMax": _place_of(np.argmax),
    "ArgMin": _place_of(np.argmin),
    "BatchNormalization": _batch_norm,
    "InstanceNormalization": _instance_norm,
    "LayerNormalization": _layer_norm,
    "LogSoftmax": _log_softmax,
    "ReduceL1": _reduction(_l1),
    "ReduceL2": _reduction(_l2),
    "ReduceLogSum": _reduction(_log_sum),
    "ReduceLogSumExp": _reduction(_log_sum_exp),
    "ReduceMax": _reduction(_largest),
    "ReduceMean": _reduction(mean),
    "ReduceMin": _reduction(_smallest),
    "ReduceProd": _reduction(_product),
    "ReduceSum": _reduction(_sum),
    "ReduceSumSquare": _reduction(_sum_of_squares),
    "Softmax": _softmax,
}
