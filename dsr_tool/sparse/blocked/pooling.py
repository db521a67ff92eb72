"""Max and average pooling in the blocked layout.

Lanes never mix, so the padding of the last block needs no care here: its gradients are zero if those that come are.
"""

from __future__ import annotations

import ctypes
import functools
from typing import Any, NamedTuple, cast

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from dsr_tool.runtime.kernels import train_planes
from dsr_tool.runtime.kernels.train_planes import MaxPool, MeanAxis, MeanPool, PoolAxis
from dsr_tool.sparse.blocked.layout import blocked

__all__ = ["MOST_ENTRIES", "Pair", "adaptive_avg_pool", "avg_pool", "global_mean", "max_pool"]

Pair = int | tuple[int, int]
"""A number for both directions, or one for rows and one for columns."""

MOST_ENTRIES = 256
"""Entries of the largest kernel of `max_pool`: which of them was the largest is kept as one byte per output."""


class Windows(NamedTuple):
    """The windows of a mean in one direction, each int64 (outputs,).

    Attributes:
        first: first input of each window.
        last: input after its last one.
        size: what the window counts as in the divisor.
        inputs: number of inputs.
    """

    first: npt.NDArray[np.int64]
    last: npt.NDArray[np.int64]
    size: npt.NDArray[np.int64]
    inputs: int


def max_pool(
    x: Tensor,
    kernel: Pair,
    stride: Pair | None = None,
    padding: Pair = 0,
    dilation: Pair = 1,
    ceil_mode: bool = False,
) -> Tensor:
    """Returns the largest entries under the windows of a kernel, as `torch.nn.functional.max_pool2d` does.

    Args:
        x: blocked (blocks, C, H, W, lanes).
        kernel: entries of a window; at most `MOST_ENTRIES` in all.
        stride: inputs from one window to the next; None for `kernel`.
        padding: inputs of minus infinity before and after each row and column.
        dilation: inputs from one entry of a window to the next.
        ceil_mode: whether a last window that the input fills only in part counts.

    Raises:
        ValueError: if the kernel is too large, the padding over half of it, or the result empty.
    """
    x = blocked(x)
    kernels = _pair(kernel)
    if kernels[0] * kernels[1] > MOST_ENTRIES:
        raise ValueError(f"kernel {kernels} has more than {MOST_ENTRIES} entries; the kernels take no larger one.")
    sizes = zip(
        x.shape[2:4], kernels, _pair(kernel if stride is None else stride), _pair(padding), _pair(dilation), strict=True
    )
    axes = [PoolAxis(inputs, _outputs(inputs, k, s, p, d, ceil_mode), k, s, p, d) for inputs, k, s, p, d in sizes]
    return cast(Tensor, _MaxPool.apply(x, MaxPool(x.shape[0] * x.shape[1], x.shape[4], *axes)))


def avg_pool(
    x: Tensor,
    kernel: Pair,
    stride: Pair | None = None,
    padding: Pair = 0,
    ceil_mode: bool = False,
    count_include_pad: bool = True,
) -> Tensor:
    """Returns the means over the windows of a kernel, as `torch.nn.functional.avg_pool2d` does.

    Args:
        x: blocked (blocks, C, H, W, lanes).
        kernel: entries of a window.
        stride: inputs from one window to the next; None for `kernel`.
        padding: zeros before and after each row and column.
        ceil_mode: whether a last window that the input fills only in part counts.
        count_include_pad: whether the zeros of the padding count in the divisor.

    Raises:
        ValueError: if the padding is over half of the kernel, or the result empty.
    """
    x = blocked(x)
    sizes = zip(x.shape[2:4], _pair(kernel), _pair(kernel if stride is None else stride), _pair(padding), strict=True)
    axes = [_windows(inputs, k, s, p, ceil_mode, count_include_pad) for inputs, k, s, p in sizes]
    return cast(Tensor, _MeanPool.apply(x, *axes))


def adaptive_avg_pool(x: Tensor, output_size: int | tuple[int | None, int | None] | None) -> Tensor:
    """Returns means over windows that cut the input into `output_size`, as `adaptive_avg_pool2d` of torch does.

    Args:
        x: blocked (blocks, C, H, W, lanes).
        output_size: rows and columns of the result, or one number for both; None for those of the input.
    """
    x = blocked(x)
    wanted = output_size if isinstance(output_size, tuple) else (output_size, output_size)
    sizes = zip(x.shape[2:4], wanted, strict=True)
    return cast(Tensor, _MeanPool.apply(x, *(_cuts(inputs, o or inputs) for inputs, o in sizes)))


def global_mean(x: Tensor) -> Tensor:
    """Returns the mean over the pixels of each channel: (blocks, C, 1, 1, lanes)."""
    return adaptive_avg_pool(x, 1)


def _pair(value: Pair) -> tuple[int, int]:
    return value if isinstance(value, tuple) else (value, value)


def _outputs(inputs: int, kernel: int, stride: int, padding: int, dilation: int, ceil_mode: bool) -> int:
    """Returns the number of windows in one direction."""
    reach = dilation * (kernel - 1) + 1
    if 2 * padding > reach:
        raise ValueError(f"padding {padding} is more than half of a kernel that reaches over {reach} inputs.")
    over = inputs + 2 * padding - reach
    outputs = (over + (stride - 1 if ceil_mode else 0)) // stride + 1
    # As in torch, a window that starts in the padding after the input does not count.
    if ceil_mode and (outputs - 1) * stride >= inputs + padding:
        outputs -= 1
    if outputs < 1:
        raise ValueError(f"a kernel that reaches over {reach} inputs does not fit in {inputs} with padding {padding}.")
    return outputs


@functools.lru_cache(maxsize=256)
def _windows(inputs: int, kernel: int, stride: int, padding: int, ceil_mode: bool, count_padding: bool) -> Windows:
    first = np.arange(_outputs(inputs, kernel, stride, padding, 1, ceil_mode), dtype=np.int64) * stride - padding
    last = np.minimum(first + kernel, inputs + padding)
    inside = np.maximum(first, 0), np.minimum(last, inputs)
    return Windows(*inside, last - first if count_padding else inside[1] - inside[0], inputs)


@functools.lru_cache(maxsize=256)
def _cuts(inputs: int, outputs: int) -> Windows:
    first = np.arange(outputs, dtype=np.int64) * inputs // outputs
    last = -(-np.arange(1, outputs + 1, dtype=np.int64) * inputs // outputs)
    return Windows(first, last, last - first, inputs)


def _mean_axis(windows: Windows) -> MeanAxis:
    tables = (windows.first, windows.last, windows.size)
    return MeanAxis(*(table.ctypes.data for table in tables), windows.inputs, windows.first.size)


class _MaxPool(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, pool: MaxPool) -> Tensor:
        y = x.new_empty(*x.shape[:2], pool.rows.outputs, pool.columns.outputs, x.shape[4])
        taken = torch.empty_like(y, dtype=torch.uint8)
        pointers = (x.data_ptr(), y.data_ptr(), taken.data_ptr())
        train_planes.run("dsr_max_pool_forward", torch.get_num_threads(), ctypes.addressof(pool), *pointers)
        ctx.save_for_backward(taken)
        ctx.pool, ctx.shape = pool, x.shape
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        (taken,) = ctx.saved_tensors
        gradient = gradient.contiguous()
        of_x = gradient.new_empty(ctx.shape)
        pointers = (gradient.data_ptr(), taken.data_ptr(), of_x.data_ptr())
        train_planes.run("dsr_max_pool_backward", torch.get_num_threads(), ctypes.addressof(ctx.pool), *pointers)
        return of_x, None


class _MeanPool(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, rows: Windows, columns: Windows) -> Tensor:
        y = x.new_empty(*x.shape[:2], rows.first.size, columns.first.size, x.shape[4])
        pool = MeanPool(x.shape[0] * x.shape[1], x.shape[4], _mean_axis(rows), _mean_axis(columns))
        pointers = (ctypes.addressof(pool), x.data_ptr(), y.data_ptr())
        train_planes.run("dsr_mean_pool_forward", torch.get_num_threads(), *pointers)
        # The windows own the tables whose addresses the pool holds.
        ctx.pool, ctx.windows, ctx.shape = pool, (rows, columns), x.shape
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        gradient = gradient.contiguous()
        of_x = gradient.new_empty(ctx.shape)
        pointers = (ctypes.addressof(ctx.pool), gradient.data_ptr(), of_x.data_ptr())
        train_planes.run("dsr_mean_pool_backward", torch.get_num_threads(), *pointers)
        return of_x, None, None
