"""Kernels for training in the blocked layout other than convolutions, by addresses of arrays.

An address is an integer, of a contiguous float32 array unless said otherwise; None is a null pointer. The C++ files
`train_layout`, `train_norm`, `train_sum`, `train_pool_max` and `train_pool_mean` say what each function does.
"""

from __future__ import annotations

import ctypes
import functools
import math

from dsr_tool.runtime.kernels import training
from dsr_tool.runtime.kernels.ops import Activation

__all__ = ["ACTIVATIONS", "Bend", "Layout", "MaxPool", "MeanAxis", "MeanPool", "PoolAxis", "Shape", "run"]


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


class PoolAxis(ctypes.Structure):
    """The windows of a max pool in one direction: output o covers the inputs o * stride - before + k * dilation."""

    _fields_ = tuple((name, ctypes.c_int64) for name in ("inputs", "outputs", "kernel", "stride", "before", "dilation"))


class MaxPool(ctypes.Structure):
    """A max pool of `planes` planes."""

    _fields_ = (("planes", ctypes.c_int64), ("lanes", ctypes.c_int64), ("rows", PoolAxis), ("columns", PoolAxis))


class MeanAxis(ctypes.Structure):
    """The windows of a mean in one direction.

    Attributes:
        first: address of int64 (outputs,): first input of each window.
        last: address of int64 (outputs,): input after the last one.
        size: address of int64 (outputs,): what the window counts as in the divisor.
    """

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("first", "last", "size")),
        *((name, ctypes.c_int64) for name in ("inputs", "outputs")),
    )


class MeanPool(ctypes.Structure):
    """Means over the windows of `planes` planes."""

    _fields_ = (("planes", ctypes.c_int64), ("lanes", ctypes.c_int64), ("rows", MeanAxis), ("columns", MeanAxis))


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
    "dsr_max_pool_forward": (_POINTER,) * 4,
    "dsr_max_pool_backward": (_POINTER,) * 4,
    "dsr_mean_pool_forward": (_POINTER,) * 3,
    "dsr_mean_pool_backward": (_POINTER,) * 3,
}
"""The arguments of each function before the pool, which is the last one."""


def run(name: str, threads: int, *arguments: object) -> None:
    """Runs a kernel and counts the call.

    Args:
        name: exported name of the function.
        threads: number of threads, the caller among them.
        arguments: its arguments but the last one, the pool.

    Raises:
        UsageError: if there are no compiled kernels.
    """
    training.run(_functions(), name, threads, *arguments)


@functools.cache
def _functions() -> training.Functions:
    return training.functions({name: (None, (*arguments, _POINTER)) for name, arguments in _ARGUMENTS.items()})
