"""Elementwise operators: each entry of the result is computed from one entry of each input."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable

import numpy as np
from scipy import special

from dsr_tool.errors import UsageError
from dsr_tool.graph.limits import claim
from dsr_tool.runtime.reference import NumpyFunction
from dsr_tool.sparsity.tensor import Array

__all__ = ["FUNCTIONS"]

# Keys are TensorProto.DataType of the ONNX standard; the runtime does not import onnx.
_TYPES = {
    1: np.float32,
    2: np.uint8,
    3: np.int8,
    4: np.uint16,
    5: np.int16,
    6: np.int32,
    7: np.int64,
    9: np.bool_,
    10: np.float16,
    11: np.float64,
    12: np.uint32,
    13: np.uint64,
}


def _broadcasting(function: Callable[[Array, Array], Array]) -> Callable[[Array, Array], Array]:
    """Makes a function of two arrays claim the memory of the shape that they broadcast to."""

    def run(a: Array, b: Array) -> Array:
        # Arrays of one shape, or an array and a number, have a result of a size that is there already.
        if a.size > 1 and b.size > 1 and a.shape != b.shape:
            claim(np.broadcast_shapes(a.shape, b.shape), np.result_type(a, b))
        result: Array = function(a, b)
        return result

    return run


_maximum, _minimum = _broadcasting(np.maximum), _broadcasting(np.minimum)
_add, _multiply = _broadcasting(np.add), _broadcasting(np.multiply)


def _relu(x: Array) -> Array:
    return np.maximum(x, 0)


def _clip(x: Array, low: Array | None = None, high: Array | None = None) -> Array:
    if low is not None:
        x = _maximum(x, low)
    return x if high is None else np.asarray(_minimum(x, high))


def _hard_sigmoid(x: Array, *, alpha: float = 0.2, beta: float = 0.5) -> Array:
    result: Array = x * alpha
    result += beta
    return np.clip(result, 0, 1, out=result)


def _hard_swish(x: Array) -> Array:
    # The standard fixes this slope; 0.2 is the default of HardSigmoid alone.
    return x * _hard_sigmoid(x, alpha=1 / 6)


def _gelu(x: Array, *, approximate: str = "none") -> Array:
    if approximate == "tanh":
        inner = np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x * x * x))
    else:
        inner = special.erf(x * math.sqrt(0.5))
    # In place: the input may be the largest value of a network, and each temporary is as large.
    inner += 1
    inner *= x
    inner *= 0.5
    return np.asarray(inner)


def _div(a: Array, b: Array) -> Array:
    if np.issubdtype(a.dtype, np.integer):
        # The standard rounds quotients of integers towards zero; `//` rounds down.
        return np.asarray(np.sign(a) * np.sign(b) * (np.abs(a) // np.abs(b)), a.dtype)
    return np.asarray(a / b)


def _pow(base: Array, exponent: Array) -> Array:
    # The result has the type of the base, where numpy would choose a common type.
    return np.asarray(np.power(base, exponent), base.dtype)


def _max(*arrays: Array) -> Array:
    return functools.reduce(_maximum, arrays)


def _min(*arrays: Array) -> Array:
    return functools.reduce(_minimum, arrays)


def _cast(x: Array, *, to: int) -> Array:
    if to not in _TYPES:
        raise UsageError(f"Cast to type number {to} is not supported; types {sorted(_TYPES)} are.")
    return x.astype(_TYPES[to])


def _cast_like(x: Array, like: Array) -> Array:
    return x.astype(like.dtype)


def _identity(x: Array) -> Array:
    return x


def _dropout(x: Array, ratio: Array | None = None, training: Array | None = None) -> Array:  # noqa: ARG001
    if training is not None and training.any():
        raise UsageError("Dropout in training mode returns random values; export the model in eval mode.")
    return x


def _where(condition: Array, a: Array, b: Array) -> Array:
    claim(np.broadcast_shapes(condition.shape, a.shape, b.shape), np.result_type(a, b))
    return np.where(condition, a, b)


def _leaky_relu(x: Array, *, alpha: float = 0.01) -> Array:
    return np.where(x < 0, x.dtype.type(alpha) * x, x)


def _prelu(x: Array, slope: Array) -> Array:
    return np.where(x < 0, _multiply(x, slope), x)


def _selu(x: Array, *, alpha: float = 1.67326319217681884765625, gamma: float = 1.05070102214813232421875) -> Array:
    return np.asarray(x.dtype.type(gamma) * _elu(x, alpha=alpha))


def _celu(x: Array, *, alpha: float = 1.0) -> Array:
    scale = x.dtype.type(alpha)
    return np.asarray(np.maximum(x, 0) + np.minimum(0, scale * np.expm1(np.minimum(x, 0) / scale)))


def _thresholded_relu(x: Array, *, alpha: float = 1.0) -> Array:
    return np.where(x > x.dtype.type(alpha), x, x.dtype.type(0))


def _softsign(x: Array) -> Array:
    return np.asarray(x / (1 + np.abs(x)))


def _mish(x: Array) -> Array:
    return np.asarray(x * np.tanh(_softplus(x)))


def _sum(*arrays: Array) -> Array:
    return functools.reduce(_add, arrays)


def _mean(*arrays: Array) -> Array:
    total = _sum(*arrays)
    return np.asarray(total / total.dtype.type(len(arrays)))


def _elu(x: Array, *, alpha: float = 1.0) -> Array:
    # np.where computes both sides, and expm1 of a large x would overflow.
    return np.where(x < 0, x.dtype.type(alpha) * np.expm1(np.minimum(x, 0)), x)


def _softplus(x: Array) -> Array:
    # log(exp(x) + exp(0)), without the overflow of exp above 88 in float32.
    result: Array = np.logaddexp(x, x.dtype.type(0))
    return result


def _swish(x: Array, *, alpha: float = 1.0) -> Array:
    result: Array = x * special.expit(x.dtype.type(alpha) * x)
    return result


FUNCTIONS: dict[str, NumpyFunction] = {
    "Abs": np.abs,
    "Add": _add,
    "And": _broadcasting(np.logical_and),
    "Cast": _cast,
    "CastLike": _cast_like,
    "Ceil": np.ceil,
    "Celu": _celu,
    "Clip": _clip,
    "Cos": np.cos,
    "Div": _broadcasting(_div),
    "Dropout": _dropout,
    "Elu": _elu,
    "Equal": _broadcasting(np.equal),
    "Erf": special.erf,
    "Exp": np.exp,
    "Floor": np.floor,
    "Gelu": _gelu,
    "Greater": _broadcasting(np.greater),
    "GreaterOrEqual": _broadcasting(np.greater_equal),
    "HardSigmoid": _hard_sigmoid,
    "HardSwish": _hard_swish,
    "Identity": _identity,
    "LeakyRelu": _leaky_relu,
    "Less": _broadcasting(np.less),
    "LessOrEqual": _broadcasting(np.less_equal),
    "Log": np.log,
    "Max": _max,
    "Mean": _mean,
    "Min": _min,
    "Mish": _mish,
    "Mul": _multiply,
    "Neg": np.negative,
    "Not": np.logical_not,
    "Or": _broadcasting(np.logical_or),
    "PRelu": _prelu,
    "Pow": _broadcasting(_pow),
    "Reciprocal": np.reciprocal,
    "Relu": _relu,
    "Round": np.rint,
    "Selu": _selu,
    "Sigmoid": special.expit,
    "Sign": np.sign,
    "Sin": np.sin,
    "Softplus": _softplus,
    "Softsign": _softsign,
    "Sqrt": np.sqrt,
    "Sub": _broadcasting(np.subtract),
    "Sum": _sum,
    "Swish": _swish,
    "Tanh": np.tanh,
    "ThresholdedRelu": _thresholded_relu,
    "Where": _where,
}
