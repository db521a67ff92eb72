"""Constant channels through elementwise operators: the value that each operator makes of them, in float64.

The functions repeat those of the reference, which is on a floor above this one; a test compares the two.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import numpy as np

from dsr_tool.graph.compact.channels import Floats
from dsr_tool.graph.ir import Node

__all__ = ["BINARY", "UNARY", "binary_constant", "unary_constant"]


def _gelu(x: Floats, approximate: str = "none") -> Floats:
    if approximate == "tanh":
        return np.asarray(0.5 * x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))))
    return 0.5 * x * (1 + _erf(x * math.sqrt(0.5)))


def _hard_sigmoid(x: Floats, alpha: float = 0.2, beta: float = 0.5) -> Floats:
    return np.clip(alpha * x + beta, 0, 1)


def _erf(x: Floats) -> Floats:
    return np.array([math.erf(number) for number in x.tolist()])


def _sigmoid(x: Floats) -> Floats:
    return 1 / (1 + np.exp(-x))


# Only continuous functions: a constant is known up to rounding, and Floor or Sign would turn that into a step.
UNARY: Mapping[str, Callable[..., Floats]] = {
    "Abs": np.abs,
    "Elu": lambda x, alpha=1.0: np.where(x < 0, alpha * np.expm1(np.minimum(x, 0)), x),
    "Erf": _erf,
    "Exp": np.exp,
    "Gelu": _gelu,
    "HardSigmoid": _hard_sigmoid,
    "HardSwish": lambda x: x * _hard_sigmoid(x, 1 / 6),
    "Identity": lambda x: x,
    "LeakyRelu": lambda x, alpha=0.01: np.where(x < 0, alpha * x, x),
    "Neg": np.negative,
    "Relu": lambda x: np.maximum(x, 0),
    "Sigmoid": _sigmoid,
    "Softplus": lambda x: np.logaddexp(x, 0),
    "Sqrt": np.sqrt,
    "Swish": lambda x, alpha=1.0: x * _sigmoid(alpha * x),
    "Tanh": np.tanh,
}
"""Elementwise operators of one input, as functions of constant channels and the node's attributes."""

BINARY: Mapping[str, Callable[[Floats, Floats], Floats]] = {
    "Add": np.add,
    "Div": np.divide,
    "Max": np.maximum,
    "Min": np.minimum,
    "Mul": np.multiply,
    "Pow": np.power,
    "Sub": np.subtract,
}
"""Elementwise operators of two inputs, as functions of the constant channels of both."""


def unary_constant(node: Node, x: Floats, limits: tuple[float | None, ...] = ()) -> Floats | None:
    """Returns the constant channels of the result, NaN where it varies; None if the operator is not in `UNARY`.

    Args:
        node: an operator of one input.
        x: constant channels of its input, NaN where it varies.
        limits: lowest and highest value of `Clip`, None for no limit.
    """
    if node.op == "Clip":
        low, high = (*limits, None, None)[:2]
        return _nan_unless_finite(np.clip(x, -np.inf if low is None else low, np.inf if high is None else high))
    if node.op not in UNARY:
        return None
    with np.errstate(all="ignore"):
        return _nan_unless_finite(UNARY[node.op](x, **node.attributes))


def binary_constant(op: str, one: Floats, other: Floats) -> Floats:
    """Returns the constant channels of an operator of `BINARY`; NaN where its result varies."""
    with np.errstate(all="ignore"):
        result = np.asarray(BINARY[op](one, other), np.float64)
    if op == "Mul":
        # Zero times anything finite is zero, even if the other operand varies.
        result = np.where((one == 0) | (other == 0), 0.0, result)
    return _nan_unless_finite(result)


def _nan_unless_finite(x: Floats) -> Floats:
    return np.where(np.isfinite(x), x, np.nan)
