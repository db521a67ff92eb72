"""The structs of `kernels/operation.h`, field by field, and the numbers that they hold."""

from __future__ import annotations

import ctypes
from enum import IntEnum

__all__ = ["Activation", "Block", "Combination", "Entry", "Kind", "Operation", "Part"]


class Kind(IntEnum):
    """What an operation does."""

    PRODUCT = 0
    MAX_POOL = 1
    GATHER = 2
    COMBINE = 3
    CHANNELWISE = 4
    MEAN = 5
    ROWS = 6
    FROM_ROWS = 7
    TO_ROWS = 8
    NORMALIZE = 9
    SOFTMAX = 10
    REGRID = 11


class Activation(IntEnum):
    """What is done to each entry of a result; `CLIP` alone, with infinite limits, does nothing."""

    CLIP = 0
    SIGMOID = 1
    SILU = 2
    HARD_SIGMOID = 3
    HARD_SWISH = 4
    GELU = 5
    GELU_TANH = 6
    TANH = 7
    ELU = 8
    LEAKY_RELU = 9


class Combination(IntEnum):
    """What `COMBINE` does to two values."""

    ADD = 0
    SUBTRACT = 1
    MULTIPLY = 2
    DIVIDE = 3


class Operation(ctypes.Structure):
    """One operation; arrays are addresses that whoever runs it keeps alive."""

    _fields_ = (
        *((name, ctypes.c_int32) for name in ("kind", "activation", "in_space", "other_space", "out_space", "flag")),
        *((name, ctypes.c_int64) for name in ("in_", "other", "out", "channels", "phases", "length")),
        *((name, ctypes.c_int64) for name in ("in_stride", "other_stride", "out_stride", "before", "after")),
        *((name, ctypes.c_int64) for name in ("count", "inner")),
        *((name, ctypes.c_float) for name in ("low", "high", "alpha", "beta")),
        *((name, ctypes.c_void_p) for name in ("values", "offsets", "entries", "blocks", "parts", "bias")),
        *((name, ctypes.c_void_p) for name in ("mask", "index")),
    )


# Rows of the integer arrays that stand for structs.
Entry = ("row", "count")
Block = ("base", "values", "offsets", "entries", "count")
Part = ("first", "last", "phase", "dense")
