"""Kernels for training in the blocked layout other than convolutions, by addresses of arrays.

An address is an integer, of a contiguous float32 array unless said otherwise; None is a null pointer. The C++ sources
`train_layout.cpp`, `train_norm.cpp` and `train_pool.cpp` say what each function does.
"""

from __future__ import annotations

import ctypes
import functools
import math
import os
import threading
from collections import Counter

from dsr_tool.errors import UsageError
from dsr_tool.runtime.kernels.library import library
from dsr_tool.runtime.kernels.ops import Activation

__all__ = ["ACTIVATIONS", "CALLS", "Bend", "Layout", "Shape", "run"]

CALLS: Counter[str] = Counter()
_LOCK = threading.Lock()


class Shape(ctypes.Structure):
    """The shape of a blocked tensor, (blocks, channels, plane / lanes, lanes), and its number of images.

    Attributes:
        plane: floats of one channel in one block.
        images: images without those of padding.
    """

    _fields_ = tuple((name, ctypes.c_int64) for name in ("blocks", "channels", "plane", "lanes", "images"))


class Layout(ctypes.Structure):
    """Images in rows, and the lanes of the blocked tensor that holds the same.

    Attributes:
        image_step: floats from one image to the next.
        channels_last: 1 where the pixels of an image are in rows of channels, else 0.
    """

    _fields_ = (
        *((name, ctypes.c_int64) for name in ("images", "channels", "pixels", "lanes", "image_step")),
        ("channels_last", ctypes.c_int),
    )


class Bend(ctypes.Structure):
    """An activation and its parameters.

    Attributes:
        activation: a member of `Activation`.
        low: lower limit of CLIP; slope below zero of LEAKY_RELU.
        high: upper limit of CLIP.
    """

    _fields_ = (("activation", ctypes.c_int32), ("low", ctypes.c_float), ("high", ctypes.c_float))


ACTIVATIONS: dict[str, tuple[Activation, float, float]] = {
    "none": (Activation.CLIP, -math.inf, math.inf),
    "relu": (Activation.CLIP, 0.0, math.inf),
    "relu6": (Activation.CLIP, 0.0, 6.0),
    "leaky_relu": (Activation.LEAKY_RELU, 0.01, 0.0),
    "sigmoid": (Activation.SIGMOID, 0.0, 0.0),
    "silu": (Activation.SILU, 0.0, 0.0),
    "hardsigmoid": (Activation.HARD_SIGMOID, 0.0, 0.0),
    "hardswish": (Activation.HARD_SWISH, 0.0, 0.0),
}
"""The activations that training kernels know, by torch's names, as fields of a `Bend`."""

_POINTER, _NUMBER, _REAL = ctypes.c_void_p, ctypes.c_int64, ctypes.c_double
_ARGUMENTS: dict[str, tuple[type, ...]] = {
    "dsr_block": (_POINTER,) * 3,
    "dsr_unblock": (_POINTER,) * 3,
    "dsr_norm_forward": (*(_POINTER,) * 7, _REAL, _REAL, ctypes.c_int, *(_POINTER,) * 3),
    "dsr_norm_backward": (*(_POINTER,) * 7, ctypes.c_int, *(_POINTER,) * 5),
    "dsr_add_act_forward": (_NUMBER, *(_POINTER,) * 4),
    "dsr_act_backward": (_NUMBER, *(_POINTER,) * 4),
}
"""The arguments of each function before the pool, which is the last one."""


def run(name: str, threads: int, *arguments: object) -> None:
    """Runs a kernel by its exported name, and counts the call."""
    function = _functions()[name]
    CALLS[name] += 1
    with _LOCK:
        function(*arguments, _pool(threads, os.getpid()))


@functools.cache
def _functions() -> dict[str, ctypes._NamedFuncPointer]:
    loaded = library()
    if loaded is None:
        raise UsageError("training in the blocked layout needs the compiled kernels; run `make kernels` in a checkout.")
    loaded.dsr_pool_new.restype = _POINTER
    functions = {}
    for name, arguments in _ARGUMENTS.items():
        functions[name] = getattr(loaded, name)
        functions[name].argtypes = (*arguments, _POINTER)
        functions[name].restype = None
    return functions


@functools.cache
def _pool(threads: int, process: int) -> int | None:  # noqa: ARG001 - a forked process needs threads of its own
    loaded = library()
    pool: int | None = loaded.dsr_pool_new(threads) if loaded is not None else None
    return pool
