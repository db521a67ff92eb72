"""Signals: what the derivation of moments knows of a value of a graph, from the network's weights alone.

A value is described for each channel as a function of one normal variable, sampled at fixed points. Elementwise
operators are applied to the samples, so ReLU6, SiLU or GELU need no formula of their own, also where the exporter wrote
them as several operators. Sums and products of different values take these as independent, convolutions the pixels
and channels that they add up. A normalisation starts anew: its own parameters say how its output is distributed, so
errors of these assumptions reach from one normalisation to the next only (Nagel et al., ICCV 2019, section 4.2).
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
from scipy import special

from dsr_tool.sparsity.tensor import Array

__all__ = ["POINTS", "Float", "Signal", "Unknown", "joined", "root_window", "scaled", "squashed"]

Float = npt.NDArray[np.float64]

POINTS: Float = np.linspace(-5, 5, 81)
"""Values of the normal variable at which functions are sampled. The moments of ReLU6 are exact to three digits."""
_DENSITY = np.exp(-(POINTS**2) / 2) / np.exp(-(POINTS**2) / 2).sum()
"""Probability of each of the points; they sum to 1."""
_TAKEN = 4
"""Number of independent values that has the expected maximum of a 3x3 window, whose neighbours are alike."""
_numbers = itertools.count()


@dataclass(frozen=True, eq=False)
class Signal:
    """The knowledge of a value: its shape for one input, and the moments of its entries.

    Attributes:
        shape: dimensions of the value; the batch has 1.
        mean: expected value, broadcastable to `shape`: size 1 along axes on which it does not depend.
        variance: variance, in the same shape as `mean`.
        source: number of the normal variable that the value is a function of; only values of one source depend on
            each other.
        samples: the value at each of `POINTS`, shape (points, *mean.shape); None for the normal variable itself.
    """

    shape: tuple[int, ...]
    mean: Float
    variance: Float
    source: int = field(default_factory=lambda: next(_numbers))
    samples: Float | None = None

    @property
    def points(self) -> Float:
        """The value at each of `POINTS`, shape (points, *mean.shape)."""
        if self.samples is not None:
            return self.samples
        return self.mean + np.sqrt(self.variance) * POINTS.reshape(-1, *[1] * self.mean.ndim)

    @classmethod
    def of_samples(cls, shape: tuple[int, ...], samples: Float, source: int) -> Signal:
        """Returns the signal of a function that was sampled at `POINTS`."""
        mean = np.tensordot(_DENSITY, samples, 1)
        variance = np.tensordot(_DENSITY, (samples - mean) ** 2, 1)
        return cls(shape, mean, variance, source, samples)

    def along(self, axis: int) -> tuple[Float, Float]:
        """Returns mean and variance for each index of one axis, over all positions of the others."""
        axis %= len(self.shape)
        others = tuple(i for i in range(len(self.shape)) if i != axis)
        mean = self.mean.mean(others, keepdims=True)
        # The variance of the means between positions, such as borders, is seen by whoever reads all of them.
        variance = (self.variance + (self.mean - mean) ** 2).mean(others)
        size = (self.shape[axis],)
        return np.broadcast_to(mean.reshape(-1), size), np.broadcast_to(variance, size)

    def largest_of(self, shape: tuple[int, ...], window: int) -> Signal:
        """Returns the signal of the largest value in windows of a pool.

        Args:
            shape: dimensions of the result.
            window: number of values in a window.
        """
        # The quantile p of the largest of n independent values is the quantile p^(1/n) of one of them.
        independent = 1 + (_TAKEN - 1) * (min(window, 9) - 1) / 8
        at = special.ndtri(special.ndtr(POINTS) ** (1 / independent))
        ordered = np.sort(self.points, 0)
        place = np.clip((at - POINTS[0]) / (POINTS[1] - POINTS[0]), 0, len(POINTS) - 1)
        low = np.minimum(place.astype(int), len(POINTS) - 2)
        rest = (place - low).reshape(-1, *[1] * self.mean.ndim)
        samples = ordered[low] * (1 - rest) + ordered[low + 1] * rest
        return Signal.of_samples(shape, samples, next(_numbers))


@dataclass(frozen=True)
class Unknown:
    """A value whose moments cannot be derived.

    Attributes:
        shape: its dimensions; the batch has 1.
        reason: why, as the end of a sentence that begins with "its input".
    """

    shape: tuple[int, ...]
    reason: str


def _reduced(array: Array) -> Float:
    """Returns an array with size 1 along every axis on which its entries do not depend."""
    for axis in range(array.ndim):
        first = array.take([0], axis)
        if array.shape[axis] > 1 and (array == first).all():
            array = first
    return np.asarray(array, np.float64)


def squashed(mean: Array, variance: Array) -> Signal:
    """Returns the signal of full mean and variance, both of the value's shape."""
    short = _reduced(mean), _reduced(variance)
    mean_, variance_ = np.broadcast_arrays(*short)
    return Signal(mean.shape, mean_, variance_)


def joined(op: str, a: Signal, b: Signal) -> Signal | None:
    """Returns the sum, difference or product of two signals of different sources, taken as independent.

    Args:
        op: name of the operator.
        a: first input.
        b: second input.

    Returns:
        The result; None for other operators.
    """
    shape = np.broadcast_shapes(a.shape, b.shape)
    sign = {"Add": 1, "Sub": -1}.get(op)
    if sign is not None:
        return Signal(shape, a.mean + sign * b.mean, a.variance + b.variance)
    if op == "Mul":
        variance = a.variance * b.variance + a.variance * b.mean**2 + b.variance * a.mean**2
        return Signal(shape, a.mean * b.mean, variance)
    return None


def scaled(signal: Signal, factor: Float, shift: Float) -> Signal:
    """Returns a signal times a factor plus a shift, both arrays that broadcast to the signal."""
    shape = np.broadcast_shapes(signal.shape, factor.shape, shift.shape)
    return Signal(shape, signal.mean * factor + shift, signal.variance * factor**2 + 0 * shift)


def root_window(count: int) -> float:
    """Returns by what an average over so many pixels or tokens divides the variance.

    Pixels are alike near each other, so the mean of n varies more than a n-th; the root of n is between the extremes.
    """
    return math.sqrt(max(count, 1))
