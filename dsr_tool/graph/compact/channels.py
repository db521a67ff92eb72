"""Channels of the values of a graph: which of them stay or go together, and which never vary."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import numpy.typing as npt

from dsr_tool.graph.ir import Node
from dsr_tool.sparsity.tensor import Array

__all__ = ["BINARY", "Bools", "Channels", "Floats", "Ints", "Units", "binary", "channel_axis", "unary"]

Bools = npt.NDArray[np.bool_]
Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]


class Units:
    """Groups of channels that stay or go as one, such as the operands of an addition: a union-find forest."""

    def __init__(self) -> None:
        self._parent: list[int] = []

    def __len__(self) -> int:
        return len(self._parent)

    def fresh(self, count: int) -> Ints:
        """New units, each of one channel."""
        first = len(self._parent)
        self._parent.extend(range(first, first + count))
        return np.arange(first, first + count, dtype=np.int64)

    def join(self, one: Ints, other: Ints) -> None:
        """Make each unit of `one` the same as that of `other` beside it."""
        for a, b in zip(one.tolist(), other.tolist(), strict=True):
            first, second = self._root(a), self._root(b)
            self._parent[max(first, second)] = min(first, second)

    def roots(self) -> Ints:
        """For each unit the one that stands for it."""
        return np.array([self._root(unit) for unit in range(len(self._parent))], np.int64)

    def _root(self, unit: int) -> int:
        while self._parent[unit] != unit:
            self._parent[unit] = self._parent[self._parent[unit]]
            unit = self._parent[unit]
        return unit


@dataclass(frozen=True, eq=False)
class Channels:
    """The channels of one value.

    Attributes:
        units: shape (channels,), the unit of each.
        constant: shape (channels,), what a channel holds everywhere and for every input; NaN where it varies.
        axis: 1 for (batch, channels, *size), -1 where channels come last.
        rank: number of dimensions, None where unknown; of axis -1 when it is 2.
        batch: whether the first axis is the batch of the graph's input.
    """

    units: Ints
    constant: Floats
    axis: int
    rank: int | None
    batch: bool = False

    @property
    def count(self) -> int:
        """Number of channels."""
        return len(self.units)

    @property
    def position(self) -> int:
        """Axis of the channels, counted from the front where the rank is known."""
        return self.rank - 1 if self.axis == -1 and self.rank is not None else self.axis

    def aligned(self, other: Channels) -> bool:
        """Whether broadcasting puts the channels of both side by side."""
        ranks = self.rank == other.rank if self.axis == 1 else True
        return self.axis == other.axis and self.count == other.count and ranks


def channel_axis(array: Array, value: Channels) -> tuple[bool, int | None]:
    """Whether an array broadcasts to a value without changing its channels, and its own axis of channels if any."""
    if value.rank is not None and array.ndim > value.rank:
        return False, None
    axis = array.ndim - 1 if value.axis == -1 else array.ndim - cast("int", value.rank) + 1
    if axis < 0 or array.shape[axis] == 1:
        return True, None
    return array.shape[axis] == value.count, axis


def _gelu(x: Floats, approximate: str = "none") -> Floats:
    if approximate == "tanh":
        return np.asarray(0.5 * x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))))
    return 0.5 * x * (1 + _erf(x * math.sqrt(0.5)))


def _hard_sigmoid(x: Floats, alpha: float = 0.2, beta: float = 0.5) -> Floats:
    return np.clip(alpha * x + beta, 0, 1)


def _erf(x: Floats) -> Floats:
    return np.array([math.erf(number) for number in x.tolist()])


# Continuous functions alone, since a constant is known to rounding only.
_UNARY: Mapping[str, Callable[..., Floats]] = {
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
    "Sigmoid": lambda x: 1 / (1 + np.exp(-x)),
    "Softplus": lambda x: np.logaddexp(x, 0),
    "Sqrt": np.sqrt,
    "Tanh": np.tanh,
}

BINARY: Mapping[str, Callable[[Any, Any], Any]] = {
    "Add": np.add,
    "Div": np.divide,
    "Max": np.maximum,
    "Min": np.minimum,
    "Mul": np.multiply,
    "Pow": np.power,
    "Sub": np.subtract,
}


def unary(node: Node, x: Floats, limits: tuple[float | None, ...] = ()) -> Floats | None:
    """What an operator of one input makes of constant channels; None for operators that are not such functions.

    Args:
        node: the operator.
        x: what its input holds, NaN where it varies.
        limits: of `Clip`, the lowest and the highest value.
    """
    if node.op == "Clip":
        low, high = (*limits, None, None)[:2]
        return _finite(np.clip(x, -np.inf if low is None else low, np.inf if high is None else high))
    if node.op not in _UNARY:
        return None
    with np.errstate(all="ignore"):
        return _finite(_UNARY[node.op](x, **node.attributes))


def binary(op: str, one: Floats, other: Floats) -> Floats:
    """What an operator of `BINARY` makes of constant channels; NaN where the result varies."""
    with np.errstate(all="ignore"):
        result = np.asarray(BINARY[op](one, other), np.float64)
    if op == "Mul":
        # Zero times anything finite is zero, also where the other operand varies.
        result = np.where((one == 0) | (other == 0), 0.0, result)
    return _finite(result)


def _finite(x: Floats) -> Floats:
    return np.where(np.isfinite(x), x, np.nan)
