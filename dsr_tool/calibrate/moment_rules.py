"""Rules of the derivation of moments: what each operator of a graph makes of the signals that it reads."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import cast

import numpy as np

from dsr_tool.calibrate.signals import POINTS, Signal, Unknown, joined, root_window, scaled, squashed
from dsr_tool.graph.ir import Node
from dsr_tool.graph.operators import operator_of
from dsr_tool.runtime.reference.call import bind
from dsr_tool.sparsity.tensor import Array

__all__ = [
    "Value",
    "computed",
    "elementwise",
    "fractions",
    "moved",
    "normalised",
    "own_statistics",
    "product_shape",
    "shape_of",
    "whole",
]

_EPSILON = 1e-5
"""Value of a norm's attribute epsilon if the node has none; given by the standard."""
_MOST_SAMPLES = 1 << 22
"""Largest number of samples of one value; larger ones keep their mean and variance only."""
Value = Array | Signal | Unknown


def normalised(node: Node, inputs: Sequence[Value | None]) -> Value:
    """Derives the output of a batch norm: from its scale and shift if its statistics were measured."""
    source, *parameters = inputs
    scale, shift, mean, variance = (np.asarray(array, np.float64) for array in parameters)
    shape = shape_of(source)
    place = [1, -1, *[1] * (len(shape) - 2)]
    epsilon = cast("float", node.attributes.get("epsilon", _EPSILON))
    if mean.any() or (variance != 1).any():
        spread = scale**2 * variance / (variance + epsilon)
        return Signal(shape, shift.reshape(place), spread.reshape(place))
    if isinstance(source, Signal):
        factor = scale / np.sqrt(variance + epsilon)
        return scaled(source, factor.reshape(place), (shift - mean * factor).reshape(place))
    return Unknown(shape, "is behind a norm that was never trained (mean 0, variance 1)")


def own_statistics(node: Node, inputs: Sequence[Value | None]) -> Value:
    """Derives the output of a norm that measures its input when it runs."""
    shape = shape_of(inputs[0])
    scale = np.asarray(inputs[1], np.float64)
    shift = np.asarray(inputs[2], np.float64) if len(inputs) > 2 else np.zeros_like(scale)
    if node.op == "InstanceNormalization":
        place = [1, -1, *[1] * (len(shape) - 2)]
        scale, shift = scale.reshape(place), shift.reshape(place)
    else:
        place = [1] * (len(shape) - scale.ndim) + list(scale.shape)
        scale, shift = scale.reshape(place), np.broadcast_to(shift, scale.shape).reshape(place)
    return Signal(shape, shift, scale**2)


def elementwise(node: Node, inputs: Sequence[Value | None]) -> Value:
    """Derives the output of an elementwise operator from samples, or from moments where values are independent."""
    signals = [value for value in inputs if isinstance(value, Signal)]
    shape = np.broadcast_shapes(*(shape_of(value) for value in inputs if value is not None))
    if len({value.source for value in signals}) > 1:
        result = joined(node.op, signals[0], signals[1]) if len(signals) == len(inputs) == 2 else None
        return result or Unknown(shape, f"is behind {node.op} of several computed values")
    arrays = [
        value.mean if isinstance(value, Signal) else value for value in inputs if isinstance(value, Signal | np.ndarray)
    ]
    size = np.broadcast_shapes(*(array.shape for array in arrays))
    if np.prod(size) * len(POINTS) > _MOST_SAMPLES:
        return _linear(node.op, inputs, shape)
    rank = max(array.ndim for array in arrays)
    aligned = [_aligned(value, rank) if isinstance(value, Signal) else value for value in inputs]
    (samples,) = computed(node, cast("list[Array | None]", aligned))
    return Signal.of_samples(shape, samples, signals[0].source)


def _aligned(signal: Signal, rank: int) -> Array:
    """Returns the samples of a signal with the points before as many axes as other inputs have."""
    points = signal.points
    return points.reshape(len(points), *[1] * (rank - signal.mean.ndim), *points.shape[1:])


def _linear(op: str, inputs: Sequence[Value | None], shape: tuple[int, ...]) -> Value:
    """Derives the sum or product of a signal and a large constant, such as a position embedding."""
    first, second = inputs[0], inputs[1] if len(inputs) == 2 else None
    if isinstance(first, np.ndarray) and isinstance(second, Signal) and operator_of(op).commutative:
        first, second = second, first
    if not isinstance(first, Signal) or not isinstance(second, np.ndarray) or not operator_of(op).arithmetic:
        return Unknown(shape, f"is behind {op} of values that differ at every position")
    one, zero = np.ones(1), np.zeros(1)
    factor = {"Mul": second, "Div": 1 / second}.get(op, one)
    return scaled(first, factor, {"Add": second, "Sub": -second}.get(op, zero))


def moved(node: Node, inputs: Sequence[Value | None]) -> Sequence[Value]:
    """Derives the outputs of an operator that moves, selects, averages or compares entries."""
    if node.op == "Softmax":
        return [Unknown(shape_of(inputs[0]), "is behind Softmax")]
    row = operator_of(node.op)
    if row.pools == "max":
        (out,) = computed(node, [whole(value) for value in inputs])
        first = cast("Signal", inputs[0])
        kernel = cast("tuple[int, ...]", node.attributes.get("kernel_shape", first.shape[2:]))
        return [first.largest_of(out.shape, math.prod(kernel))]
    if not (row.pools or row.selects or row.keeps_entries):
        raise ValueError("no rule for it")
    means = computed(node, [_spread_out(value, "mean") for value in inputs])
    variances = computed(node, [_spread_out(value, "variance") for value in inputs])
    divisor = 1.0
    if row.pools == "mean":
        taps = cast("tuple[int, ...]", node.attributes.get("kernel_shape", ()))
        divisor = root_window(math.prod(taps) if taps else math.prod(shape_of(inputs[0])) // means[0].size)
    return [squashed(mean, variance / divisor) for mean, variance in zip(means, variances, strict=True)]


def fractions(op: str, inputs: Sequence[Value | None]) -> list[float]:
    """Returns the fraction of the variance of a sum, product or join that each input contributes."""
    if any(isinstance(value, Unknown) for value in inputs):
        parts = [float(isinstance(value, Signal | Unknown)) for value in inputs]
    else:
        # Inputs of a sum are equally large; those of a join count by their size.
        sizes = [math.prod(shape_of(value)) if op == "Concat" else 1 for value in inputs]
        parts = [
            float(value.variance.mean()) * size if isinstance(value, Signal) else 0.0
            for value, size in zip(inputs, sizes, strict=True)
        ]
    return [part / (sum(parts) or 1.0) for part in parts]


def computed(node: Node, arrays: Sequence[Array | None]) -> list[Array]:
    """Computes a node with the function of the reference."""
    return list(bind(node, {}).compute(arrays).values())


def shape_of(value: Value | None) -> tuple[int, ...]:
    """Returns the dimensions of a value; none for an absent one."""
    return () if value is None else value.shape


def whole(value: Value | None) -> Array | None:
    """Returns an array of zeros in place of a computed value, which takes no memory."""
    if isinstance(value, Signal | Unknown):
        return np.broadcast_to(np.zeros((), np.float32), value.shape)
    return value


def _spread_out(value: Value | None, name: str) -> Array | None:
    """Returns one of the moments of a value at every position, or a constant as it is."""
    if isinstance(value, Signal):
        return np.broadcast_to(getattr(value, name), value.shape)
    return None if isinstance(value, Unknown) else value


def product_shape(a: tuple[int, ...], b: tuple[int, ...]) -> tuple[int, ...]:
    """Returns the dimensions of a matrix product."""
    return (*np.broadcast_shapes(a[:-2], b[:-2]), a[-2], b[-1])
