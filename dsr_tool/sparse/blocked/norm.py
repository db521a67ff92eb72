"""Batch norm with a residual and an activation, and sums with an activation, in the blocked layout.

Statistics are those of the real images: lanes of padding take no part, and gradients that leave a norm are zero there.
"""

from __future__ import annotations

import ctypes
from typing import Any, cast

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable
from torch.autograd.graph import increment_version

from dsr_tool.runtime.kernels import train_planes
from dsr_tool.runtime.kernels.train_planes import ACTIVATIONS, Bend
from dsr_tool.sparse.blocked.layout import blocked, shape_of

__all__ = ["act", "add_act", "norm_act"]

FROM_VALUE = ("none", "relu", "relu6", "leaky_relu")
"""Activations whose derivative follows from their value, so that their argument need not be kept."""


def norm_act(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    *,
    training: bool,
    momentum: float | None,
    eps: float,
    images: int,
    residual: Tensor | None = None,
    activation: str = "none",
    slope: float = 0.01,
) -> Tensor:
    """Returns activation(batch_norm(x) + residual).

    Args:
        x: blocked (blocks, C, H, W, lanes).
        weight: (C,) factors, or None for ones.
        bias: (C,) summands, or None for zeros.
        running_mean: (C,) running mean; in training it moves in place towards that of the batch. None for none.
        running_var: (C,) running variance; it moves to the unbiased variance of the batch.
        training: whether statistics are those of the batch. Without running statistics they always are.
        momentum: share of the batch in the new running statistics; for a cumulative average the caller gives
            1 / number of batches so far. May be None where nothing is updated.
        eps: summand of the variance.
        images: number of images without those of padding.
        residual: blocked, of the shape of `x`.
        activation: a key of `ACTIVATIONS`.
        slope: slope of leaky_relu below zero, not negative.

    Raises:
        ValueError: if a shape does not fit, a channel has a single value in training, or `momentum` is missing.
    """
    x = blocked(x)
    shape = shape_of(x, images)
    bend = _bend(activation, slope)
    training = training or running_mean is None
    _check_parameters(x, weight, bias, running_mean, running_var)
    if training and images * (shape.plane // shape.lanes) < 2:
        raise ValueError(
            f"batch norm needs more than one value per channel in training, but got {images} image of "
            f"{x.shape[2]} x {x.shape[3]} pixels; use a larger batch."
        )
    if training and running_mean is not None and momentum is None:
        raise ValueError("momentum None has no count of batches; pass 1 / number of batches so far.")
    fused = activation
    if residual is not None:
        if residual.shape != x.shape:
            raise ValueError(f"residual has shape {tuple(residual.shape)}, and x {tuple(x.shape)}.")
        residual = residual.contiguous()
        # What other activations need is not kept beside a residual: they get a pass of their own.
        if activation not in FROM_VALUE:
            fused, bend = "none", _bend("none", slope)
    options = (running_mean, running_var, training, momentum or 0.0, eps, images, bend, fused)
    y = cast(Tensor, _NormAct.apply(x, weight, bias, residual, *options))
    return y if fused == activation else act(y, activation, slope)


def add_act(x: Tensor, y: Tensor, activation: str = "none", slope: float = 0.01) -> Tensor:
    """Returns activation(x + y) of two tensors of one shape.

    Raises:
        ValueError: if the shapes differ or the activation is unknown.
    """
    if x.shape != y.shape:
        raise ValueError(f"add_act() needs one shape, but got {tuple(x.shape)} and {tuple(y.shape)}.")
    bend = _bend(activation, slope)
    if activation == "none":
        return x + y
    if activation not in FROM_VALUE:
        return act(x + y, activation, slope)
    return cast(Tensor, _AddAct.apply(x, y, bend, activation))


def act(x: Tensor, activation: str, slope: float = 0.01) -> Tensor:
    """Returns an activation of each entry of a tensor.

    Args:
        x: float32 of any shape.
        activation: a key of `ACTIVATIONS`.
        slope: slope of leaky_relu below zero, not negative.

    Raises:
        ValueError: if the activation is unknown.
    """
    bend = _bend(activation, slope)
    return x if activation == "none" else cast(Tensor, _AddAct.apply(x, None, bend, activation))


def _bend(activation: str, slope: float) -> Bend:
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation {activation!r} is unknown; the kernels have {', '.join(ACTIVATIONS)}.")
    if activation == "leaky_relu" and not slope >= 0:
        raise ValueError(f"slope {slope} is negative; the value would not tell the sign of its argument.")
    kind, low, high = ACTIVATIONS[activation]
    return Bend(kind, slope if activation == "leaky_relu" else low, high)


def _check_parameters(x: Tensor, *parameters: Tensor | None) -> None:
    for parameter in parameters:
        if parameter is None:
            continue
        if parameter.shape != x.shape[1:2] or parameter.dtype != torch.float32 or not parameter.is_contiguous():
            raise ValueError(
                f"weight, bias and running statistics must be contiguous float32 of shape ({x.shape[1]},), but one is "
                f"{tuple(parameter.shape)} of {parameter.dtype}."
            )


def _address(x: Tensor | None) -> int | None:
    return None if x is None else x.data_ptr()


class _NormAct(Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        residual: Tensor | None,
        running_mean: Tensor | None,
        running_var: Tensor | None,
        training: bool,
        momentum: float,
        eps: float,
        images: int,
        bend: Bend,
        activation: str,
    ) -> Tensor:
        shape, y = shape_of(x, images), torch.empty_like(x)
        statistics = torch.empty((2, shape.channels), dtype=torch.float64)
        train_planes.run(
            "dsr_norm_forward",
            torch.get_num_threads(),
            ctypes.addressof(shape),
            *map(_address, (x, residual, weight, bias, running_mean, running_var)),
            momentum,
            eps,
            training,
            ctypes.addressof(bend),
            *map(_address, (statistics, y)),
        )
        if training and running_mean is not None and running_var is not None:
            increment_version((running_mean, running_var))
        # The convolution behind the norm keeps y too, so y beside x costs no memory of its own.
        ctx.from_value = residual is not None and activation != "none"
        ctx.save_for_backward(x, weight, bias, statistics, y if ctx.from_value else None)
        ctx.shape, ctx.training, ctx.bend = shape, training, bend
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, bias, statistics, y = ctx.saved_tensors
        gradient, needed = gradient.contiguous(), ctx.needs_input_grad
        # Without an activation and padding, the gradient of the residual is the one that came.
        same = not ctx.from_value and not ctx.shape.images % ctx.shape.lanes
        results = [
            torch.empty_like(x) if needed[0] else None,
            torch.empty_like(x) if ctx.from_value or (needed[3] and not same) else None,
            torch.empty_like(weight) if needed[1] else None,
            torch.empty_like(bias) if needed[2] else None,
        ]
        train_planes.run(
            "dsr_norm_backward",
            torch.get_num_threads(),
            ctypes.addressof(ctx.shape),
            *map(_address, (x, y, gradient, weight, bias, statistics)),
            ctx.training,
            ctypes.addressof(ctx.bend),
            *map(_address, results),
        )
        of_x, of_residual, of_weight, of_bias = results
        if same:
            of_residual = gradient
        return of_x, of_weight, of_bias, of_residual if needed[3] else None, *(None,) * 8


class _AddAct(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, other: Tensor | None, bend: Bend, activation: str) -> Tensor:
        x, other = x.contiguous(), None if other is None else other.contiguous()
        y = torch.empty_like(x)
        train_planes.run(
            "dsr_add_act_forward",
            torch.get_num_threads(),
            x.numel(),
            *map(_address, (x, other)),
            ctypes.addressof(bend),
            y.data_ptr(),
        )
        ctx.save_for_backward(y if activation in FROM_VALUE else x)
        ctx.bend = bend
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        (saved,) = ctx.saved_tensors
        gradient, of_x = gradient.contiguous(), torch.empty_like(saved)
        train_planes.run(
            "dsr_act_backward",
            torch.get_num_threads(),
            saved.numel(),
            *map(_address, (saved, gradient)),
            ctypes.addressof(ctx.bend),
            of_x.data_ptr(),
        )
        return (of_x if ctx.needs_input_grad[0] else None), (of_x if ctx.needs_input_grad[1] else None), None, None
