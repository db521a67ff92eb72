"""Convolutions for training by addresses of arrays, and calls of the library for all kernels for training.

An address is an integer, of a contiguous float32 array unless said otherwise. Nothing here imports torch; callers keep
the arrays alive and make sure of their sizes.
"""

from __future__ import annotations

import ctypes
import functools
from collections import Counter
from collections.abc import Mapping
from dataclasses import astuple, dataclass
from typing import TypeAlias

from dsr_tool.errors import UsageError
from dsr_tool.runtime.kernels.library import library
from dsr_tool.runtime.kernels.pool import Pool

__all__ = ["CALLS", "ConvPlan", "Functions", "Layer", "Signature", "available", "functions", "run"]

Signature: TypeAlias = tuple[type | None, tuple[type, ...]]
"""The result and the arguments of a function of the library."""

Functions: TypeAlias = "Mapping[str, ctypes._NamedFuncPointer]"
"""Functions of the library by exported name."""

CALLS: Counter[str] = Counter()
"""Number of calls of each kernel in this process; tests read it to assert that a kernel ran."""

_POINTER, _NUMBER = ctypes.c_void_p, ctypes.c_int64
_SIGNATURES: dict[str, Signature] = {
    "dsr_conv_plan_new": (_POINTER, (_POINTER, _POINTER, _NUMBER)),
    "dsr_conv_plan_free": (None, (_POINTER,)),
    "dsr_conv_plan_bytes": (_NUMBER, (_POINTER,)),
    "dsr_conv": (ctypes.c_int, (_POINTER, _POINTER, _NUMBER, *(_POINTER,) * 4)),
    "dsr_conv_weights": (ctypes.c_int, (_POINTER, _POINTER, _NUMBER, *(_POINTER,) * 3)),
    "dsr_channel_sums": (None, (_POINTER, *(_NUMBER,) * 3, *(_POINTER,) * 2)),
}


def available() -> bool:
    """Returns whether this process has compiled kernels."""
    return library() is not None


def functions(signatures: Mapping[str, Signature]) -> Functions:
    """Returns functions of the library, which know their results and arguments from then on.

    Args:
        signatures: the signature of each one by its exported name.

    Raises:
        UsageError: if there are no compiled kernels.
    """
    loaded, found = _library(), {}
    for name, (result, arguments) in signatures.items():
        found[name] = function = getattr(loaded, name)
        function.restype, function.argtypes = result, arguments
    return found


def run(known: Functions, name: str, threads: int, *arguments: object) -> object:
    """Runs a kernel and counts the call. Returns the kernel's own result.

    Args:
        known: functions, among them the kernel.
        name: exported name of the kernel.
        threads: number of threads, the caller among them.
        arguments: its arguments but the last one, the pool.
    """
    CALLS[name] += 1
    shared = _pool()
    with shared.lock:
        return known[name](*arguments, shared.address(threads))


@functools.cache
def _pool() -> Pool:
    return Pool(_library())


def _library() -> ctypes.CDLL:
    loaded = library()
    if loaded is None:
        raise UsageError("training on kernels needs the compiled library; run `make kernels` in a checkout.")
    return loaded


@dataclass(frozen=True)
class Layer:
    """A convolution of blocked activations; the fields are those of `Layer` in train_conv_plan.cpp, in order.

    Attributes:
        blocks: expected number of blocks of images; plans serve any number.
        gradient: whether the plan is for the gradient to the input.
        tile_y: rows of a tile, and `tile_x` its pixels in a row; 0 for those that seem fastest.
        panel_bytes: largest size of a panel; 0 for seven eighths of the first-level cache.
    """

    out_channels: int
    in_channels: int
    kernel_y: int
    kernel_x: int
    stride_y: int
    stride_x: int
    top: int
    left: int
    bottom: int
    right: int
    dilation_y: int
    dilation_x: int
    groups: int
    height: int
    width: int
    lanes: int
    blocks: int
    gradient: bool = False
    tile_y: int = 0
    tile_x: int = 0
    panel_bytes: int = 0


class ConvPlan:
    """A plan of one convolution: its tiles, and its non-zeros in the order in which they are used."""

    def __init__(self, layer: Layer, positions: int, nnz: int) -> None:
        """Makes the plan.

        Args:
            layer: the convolution.
            positions: address of (nnz,) int32: flat indices of the non-zeros in the dense weight, ascending.
            nnz: number of non-zeros.
        """
        fields = (ctypes.c_int64 * len(astuple(layer)))(*map(int, astuple(layer)))
        self._address = _functions()["dsr_conv_plan_new"](fields, positions, nnz)
        if not self._address:
            raise MemoryError(f"no memory for the plan of a layer with {nnz} weights.")
        self.bytes: int = _functions()["dsr_conv_plan_bytes"](self._address)

    def __del__(self) -> None:
        """Frees the memory of the plan."""
        if address := getattr(self, "_address", None):
            _functions()["dsr_conv_plan_free"](address)

    def gather(self, source: int, blocks: int, values: int, bias: int | None, out: int, threads: int) -> None:
        """Computes the convolution, or the gradient to its input, whichever the plan is for.

        Args:
            source: address of the input, or of the gradient to the output; blocked.
            blocks: number of blocks of images.
            values: address of the non-zeros in the order of the positions.
            bias: address of the bias (out_channels,), or None.
            out: address of the result; blocked.
            threads: number of threads.
        """
        self._run("dsr_conv", threads, source, blocks, values, bias, out)

    def weights(self, source: int, blocks: int, gradient: int, out: int, threads: int) -> None:
        """Computes the gradient to the non-zeros, by the plan of the forward pass.

        Args:
            source: address of the input; blocked.
            blocks: number of blocks of images.
            gradient: address of the gradient to the output; blocked.
            out: address of the result, in the order of the positions.
            threads: number of threads.
        """
        self._run("dsr_conv_weights", threads, source, blocks, gradient, out)

    def _run(self, name: str, threads: int, *arguments: int | None) -> None:
        if run(_functions(), name, threads, self._address, *arguments):
            raise MemoryError(f"no memory for the buffers of {name}.")


def channel_sums(x: int, blocks: int, channels: int, plane: int, out: int, threads: int) -> None:
    """Computes the sum of each channel of a blocked activation.

    Args:
        x: address of (blocks, channels, plane).
        blocks: number of blocks of images.
        channels: number of channels.
        plane: floats of one channel of a block.
        out: address of (channels,).
        threads: number of threads.
    """
    run(_functions(), "dsr_channel_sums", threads, x, blocks, channels, plane, out)


@functools.cache
def _functions() -> Functions:
    return functions(_SIGNATURES)
