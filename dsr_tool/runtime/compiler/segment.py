"""Operations as they are put down, and how they become structs once all sizes are known."""

from __future__ import annotations

import ctypes
import math
import weakref
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np

from dsr_tool.runtime.compiler.layouts import Flat, Planes, Value
from dsr_tool.runtime.kernels.ops import Activation, Kind, Operation
from dsr_tool.sparsity.tensor import Array

__all__ = ["Op", "Segment", "address"]

_SLACK = 64
"""Floats before and after all values, which kernels may read for nothing."""

_masks: weakref.WeakValueDictionary[tuple[object, ...], Array] = weakref.WeakValueDictionary()
"""Which places of a plane hold pixels: one array for all values that lie alike, as long as a plan keeps it."""

Finish = Callable[[Operation, list[object]], None]


@dataclass(eq=False)
class Op:
    """One operation before sizes and places are known.

    Attributes:
        kind: what it does.
        source: the value that it reads.
        out: the value that it makes.
        other: a second value that it reads: what is added to a product, say.
        activation: what is done to each entry at the end.
        low, high: limits of `Activation.CLIP`.
        alpha, beta: parameters of other activations.
        flag: parameter of the kind.
        bias: what each channel of a product starts from.
        finish: fills in what depends on the places of values; keeps the arrays that it points to in the list.
    """

    kind: Kind
    source: Value
    out: Value
    other: Value | None = None
    activation: Activation = Activation.CLIP
    low: float = -math.inf
    high: float = math.inf
    alpha: float = 0.0
    beta: float = 0.0
    flag: int = 0
    bias: Array | None = None
    finish: Finish | None = None

    @property
    def plain(self) -> bool:
        """Whether nothing is done to its result yet."""
        return self.activation is Activation.CLIP and self.low == -math.inf and self.high == math.inf


@dataclass(eq=False)
class Segment:
    """Operations that run in one call.

    Attributes:
        lanes: of the kernels.
        batch: how often they run, each time on the next piece of every array.
        ops: in order.
        inputs: arrays of the caller that it reads, by name.
        outputs: arrays that it fills, by name.
    """

    lanes: int
    batch: int
    ops: list[Op] = field(default_factory=list)
    inputs: dict[str, Flat] = field(default_factory=dict)
    outputs: dict[str, Flat] = field(default_factory=dict)

    def add(self, op: Op) -> Value:
        """Put down an operation; returns what it makes."""
        self.ops.append(op)
        return op.out

    def maker(self, value: Value) -> Op | None:
        """The operation that makes a value here."""
        return next((op for op in reversed(self.ops) if op.out is value), None)

    def finished(self) -> tuple[ctypes.Array[Operation], list[object]]:
        """The operations as structs, once all values have a place, and the arrays that they point to."""
        structs, kept = (Operation * len(self.ops))(), list[object]()
        for op, struct in zip(self.ops, structs, strict=True):
            _fill(op, struct, kept)
        return structs, kept

    def place(self) -> int:
        """Give each value its place; returns how many floats the arena needs.

        The largest come first, each as low as those that are alive with it allow.
        """
        for number, array in enumerate((*self.inputs.values(), *self.outputs.values()), start=1):
            array.space = number
        values: dict[Value, None] = {}
        for i, op in enumerate(self.ops):
            op.out.first = i if op.out.first < 0 else op.out.first
            for value in (op.source, op.other, op.out):
                if value is not None:
                    value.last = i
                    values[value] = None
        placed: list[tuple[int, int, Value]] = []
        for value in sorted((v for v in values if v.space == 0), key=lambda v: -v.size):
            start = _SLACK
            for low, high, other in sorted(placed, key=lambda item: item[0]):
                if (
                    other.last >= value.first
                    and value.last >= other.first
                    and low < start + value.size
                    and start < high
                ):
                    start = high
            placed.append((start, start + value.size, value))
            value.offset = start + value.lead
        return max((high for _, high, _ in placed), default=0) + _SLACK


def _fill(op: Op, struct: Operation, kept: list[object]) -> None:
    struct.kind, struct.activation, struct.flag = op.kind, op.activation, op.flag
    struct.low, struct.high, struct.alpha, struct.beta = op.low, op.high, op.alpha, op.beta
    struct.in_space, struct.in_ = op.source.space, op.source.offset
    struct.out_space, struct.out = op.out.space, op.out.offset
    struct.other_space, struct.other = (-1, 0) if op.other is None else (op.other.space, op.other.offset)
    for value, name in ((op.source, "in_stride"), (op.other, "other_stride"), (op.out, "out_stride")):
        if isinstance(value, Planes):
            setattr(struct, name, value.stride)
    if isinstance(op.out, Planes):
        struct.channels, struct.phases, struct.length = op.out.channels, op.out.phases, op.out.grid.length
        struct.before, struct.after = op.out.before, op.out.after
        if op.kind is not Kind.REGRID and (op.out.padded or op.out.before or op.out.after):
            struct.mask = address(_mask(op.out), kept)
    elif isinstance(op.out, Flat):
        # All entries as one plane.
        struct.channels, struct.phases, struct.length = 1, 1, op.out.size // op.out.lanes
    if op.bias is not None:
        struct.bias = address(np.ascontiguousarray(op.bias, np.float32), kept)
    if op.finish:
        op.finish(struct, kept)


def _mask(value: Planes) -> Array:
    """0 and -1: -1 where there is a pixel."""
    key = (value.grid, value.factor, *value.shape[2:])
    mask = _masks.get(key)
    if mask is None:
        _masks[key] = mask = -(value.pixels() >= 0).astype(np.int32)
    return mask


def address(array: Array, kept: list[object]) -> int:
    """Where an array lies, which is kept from now on."""
    kept.append(array)
    return int(array.ctypes.data)
