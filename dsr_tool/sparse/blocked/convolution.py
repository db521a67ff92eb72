"""Convolutions of blocked activations, with sparse and with dense weights, and their gradients."""

from __future__ import annotations

import functools
from typing import Any, cast

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable
from torch.nn import functional

from dsr_tool.runtime.kernels.training import CALLS, channel_sums
from dsr_tool.sparse.blocked.layout import LANES, block, unblock
from dsr_tool.sparse.blocked.plans import Geometry, Plans

__all__ = ["CALLS", "Geometry", "Plans", "convolve", "convolve_dense"]


def convolve(
    x: Tensor,
    values: Tensor,
    positions: Tensor,
    geometry: Geometry,
    plans: Plans,
    name: str,
    version: int,
    bias: Tensor | None = None,
) -> Tensor:
    """Returns the convolution of a blocked activation with a sparse weight.

    The result has the same bits for any number of threads. Gradients flow to the input, the values and the bias; second
    derivatives are refused.

    Args:
        x: (blocks, in_channels, H, W, lanes) float32, contiguous; lanes is 4, 8 or 16.
        values: (nnz,) float32: the non-zeros.
        positions: (nnz,) int32: their flat indices in the dense weight (out, in / groups, *kernel), ascending.
        geometry: the convolution.
        plans: cache of plans.
        name: name of the layer in the cache.
        version: number that changes whenever `positions` does.
        bias: (out_channels,) float32, or None.

    Returns:
        (blocks, out_channels, H', W', lanes).

    Raises:
        ValueError: if a shape or a dtype is another.
    """
    _check(x, values, positions, geometry, bias)
    return cast(Tensor, _Convolve.apply(x, values, bias, positions, geometry, plans, name, version))


def convolve_dense(x: Tensor, weight: Tensor, geometry: Geometry, bias: Tensor | None = None) -> Tensor:
    """Returns the convolution of a blocked activation with a dense weight.

    Args:
        x: (blocks, in_channels, H, W, lanes) float32, contiguous.
        weight: (out_channels, in_channels / groups, *kernel) float32.
        geometry: the convolution.
        bias: (out_channels,) float32, or None.

    Returns:
        (blocks, out_channels, H', W', lanes).
    """
    blocks, channels, height, width, lanes = x.shape
    if _is_matmul(geometry):
        product = torch.matmul(weight.flatten(1), x.view(blocks, channels, height * width * lanes))
        out = product.view(blocks, geometry.out_channels, height, width, lanes)
        return out if bias is None else out + bias.view(-1, 1, 1, 1)
    if geometry.groups == 1 and geometry.weights > _FEW * geometry.out_channels:
        images = unblock(x, blocks * lanes, channels_last=True)
        return block(_conv2d(images, weight, geometry, bias), lanes)
    values = weight.contiguous().view(-1)
    return convolve(x, values, _every(values.numel()), geometry, _DENSE, "dense", 0, bias)


def _conv2d(x: Tensor, weight: Tensor, geometry: Geometry, bias: Tensor | None) -> Tensor:
    (top, bottom), (left, right) = geometry.pads
    if (top, left) != (bottom, right):
        x = functional.pad(x, (left, right, top, bottom))
        top = left = 0
    return functional.conv2d(x, weight, bias, geometry.stride, (top, left), geometry.dilation, geometry.groups)


def _is_matmul(geometry: Geometry) -> bool:
    unpadded = geometry.pads == ((0, 0), (0, 0))
    return geometry.kernel == (1, 1) and geometry.stride == (1, 1) and geometry.groups == 1 and unpadded


_FEW = 32
"""Most weights of an output channel for which the sparse kernels are faster than torch between two relayouts.

Forward and gradient to the weights on Zen 5: 1.07 times faster without the relayouts for 3 x 3 x 3 weights at 32 pixels
and 0.65 times for 3 x 7 x 7 at 224. Grouped layers have few weights too: depthwise ones were 0.73 to 2.3 times as fast.
"""

_DENSE = Plans()
"""Plans of dense layers, which differ by their geometry alone."""


@functools.lru_cache(64)
def _every(count: int) -> Tensor:
    return torch.arange(count, dtype=torch.int32)


def _check(x: Tensor, values: Tensor, positions: Tensor, geometry: Geometry, bias: Tensor | None) -> None:
    if x.dim() != 5 or x.shape[1] != geometry.in_channels or x.shape[4] not in LANES:
        raise ValueError(
            f"x is {tuple(x.shape)}; it must be (blocks, {geometry.in_channels}, H, W, lanes) with 4, 8 or 16 lanes."
        )
    if values.shape != positions.shape or values.dim() != 1:
        raise ValueError(
            f"values are {tuple(values.shape)} and positions {tuple(positions.shape)}; both must be (nnz,)."
        )
    if bias is not None and bias.shape != (geometry.out_channels,):
        raise ValueError(f"bias is {tuple(bias.shape)}; it must be ({geometry.out_channels},).")
    for tensor in (x, values, *(() if bias is None else (bias,))):
        if tensor.dtype != torch.float32 or tensor.device.type != "cpu":
            raise ValueError(f"kernels take float32 on the CPU, not {tensor.dtype} on {tensor.device}.")


class _Convolve(Function):
    """Forward: sparse weight times activation. Backward: to the activation, the non-zeros and the bias."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        values: Tensor,
        bias: Tensor | None,
        positions: Tensor,
        geometry: Geometry,
        plans: Plans,
        name: str,
        version: int,
    ) -> Tensor:
        x, values = x.contiguous(), values.contiguous()
        plan = plans.get(name, version, positions, geometry, tuple(x.shape))
        blocks, _, height, width, lanes = x.shape
        out = x.new_empty(blocks, geometry.out_channels, *geometry.output_size(height, width), lanes)
        start = None if bias is None else bias.contiguous()
        plan.gather(
            x.data_ptr(), blocks, values.data_ptr(), None if start is None else start.data_ptr(), out.data_ptr(),
            torch.get_num_threads(),
        )  # fmt: skip
        ctx.save_for_backward(x, values, positions)
        ctx.plan, ctx.plans, ctx.layer = plan, plans, (name, version, geometry)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        x, values, positions = ctx.saved_tensors
        name, version, geometry = ctx.layer
        gradient, threads, blocks = gradient.contiguous(), torch.get_num_threads(), x.shape[0]
        to_x = to_values = to_bias = None
        if ctx.needs_input_grad[0]:
            to_x = torch.empty_like(x)
            plan = ctx.plans.get(name, version, positions, geometry, tuple(x.shape), gradient=True)
            plan.gather(gradient.data_ptr(), blocks, values.data_ptr(), None, to_x.data_ptr(), threads)
        if ctx.needs_input_grad[1]:
            to_values = torch.empty_like(values)
            ctx.plan.weights(x.data_ptr(), blocks, gradient.data_ptr(), to_values.data_ptr(), threads)
        if ctx.needs_input_grad[2]:
            to_bias = gradient.new_empty(geometry.out_channels)
            plane = gradient[0, 0].numel()
            channel_sums(gradient.data_ptr(), blocks, geometry.out_channels, plane, to_bias.data_ptr(), threads)
        return to_x, to_values, to_bias, None, None, None, None, None
