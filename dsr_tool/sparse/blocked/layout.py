"""The blocked layout: images side by side in lanes, so that one weight meets a vector of images.

A blocked tensor is a contiguous float32 tensor of shape (blocks, C, H, W, lanes) with blocks = ceil(images / lanes).
Image i is lane i % lanes of block i // lanes. The last block may have lanes without an image, which are padding: zero
when `block` makes them, and finite later.
"""

from __future__ import annotations

import ctypes
from typing import Any, cast

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from dsr_tool.runtime.kernels import train_planes

__all__ = ["LANES", "block", "lanes_for", "unblock"]

LANES = (16, 8, 4)
"""Numbers of lanes that the kernels take; 16 floats are one cache line."""


def lanes_for(images: int) -> int:
    """Returns the number of lanes for a batch: the largest that leaves at most a ninth of its lanes to padding.

    Where all leave more, it is the one with the least padding.
    """
    padding = {lanes: -images % lanes for lanes in LANES}
    few = [lanes for lanes in LANES if 9 * padding[lanes] <= images + padding[lanes]]
    return few[0] if few else min(LANES, key=lambda lanes: padding[lanes])


def block(x: Tensor, lanes: int) -> Tensor:
    """Returns a tensor in the blocked layout, with zeros for the images that the last block lacks.

    Args:
        x: (N, C, H, W) or (N, F) float32, N > 0; channels_last is read as it lies, other strides are copied first.
        lanes: 4, 8 or 16.

    Returns:
        (ceil(N / lanes), C, H, W, lanes); H and W are 1 for (N, F).

    Raises:
        ValueError: if the number of dimensions, the dtype or `lanes` is another, or there is no image.
    """
    if x.dim() not in (2, 4) or x.dtype != torch.float32 or x.device.type != "cpu" or not x.shape[0]:
        raise ValueError(
            f"block() takes a float32 CPU tensor (N, C, H, W) or (N, F) with N > 0, but got {tuple(x.shape)} of "
            f"{x.dtype} on {x.device}."
        )
    if lanes not in LANES:
        raise ValueError(f"lanes {lanes} is not 4, 8 or 16.")
    return cast(Tensor, _Block.apply(x, lanes))


def unblock(x: Tensor, images: int, *, channels_last: bool = False) -> Tensor:
    """Returns the images of a blocked tensor.

    Args:
        x: (blocks, C, H, W, lanes).
        images: number of images without those of padding, at most blocks * lanes.
        channels_last: memory format of the result.

    Returns:
        (images, C, H, W).

    Raises:
        ValueError: if `x` is not a blocked tensor of so many images.
    """
    x = blocked(x)
    shape_of(x, images)
    return cast(Tensor, _Unblock.apply(x, images, channels_last))


def blocked(x: Tensor) -> Tensor:
    """Returns a blocked tensor itself, or a contiguous copy if its strides are others.

    Raises:
        ValueError: if `x` is no float32 CPU tensor (blocks, C, H, W, lanes) with 4, 8 or 16 lanes.
    """
    if x.dim() != 5 or x.shape[-1] not in LANES or x.dtype != torch.float32 or x.device.type != "cpu":
        raise ValueError(
            f"expected a float32 CPU tensor (blocks, C, H, W, lanes) with 4, 8 or 16 lanes, but got {tuple(x.shape)} "
            f"of {x.dtype} on {x.device}."
        )
    return x.contiguous()


def shape_of(x: Tensor, images: int) -> train_planes.Shape:
    """Returns the shape of a blocked tensor for the kernels.

    Raises:
        ValueError: if `x` has other blocks than so many images fill.
    """
    blocks, channels, height, width, lanes = x.shape
    if not images or -(-images // lanes) != blocks:
        raise ValueError(f"{images} images do not fill {blocks} blocks of {lanes} lanes.")
    return train_planes.Shape(blocks, channels, height * width * lanes, lanes, images)


def _run(name: str, rows: Tensor, lanes: int, source: Tensor, target: Tensor) -> None:
    images, channels = rows.shape[:2]
    pixels = rows[0, 0].numel()
    # Both formats are the same run of floats where there is one pixel or one channel.
    last = pixels > 1 and channels > 1 and not rows[0].is_contiguous()
    layout = train_planes.Layout(images, channels, pixels, lanes, rows.stride(0), last)
    train_planes.run(name, torch.get_num_threads(), ctypes.addressof(layout), source.data_ptr(), target.data_ptr())


def _to_blocked(x: Tensor, lanes: int) -> Tensor:
    image = x[0]
    if not image.is_contiguous() and not (x.dim() == 4 and image.permute(1, 2, 0).is_contiguous()):
        x = x.contiguous()
    height, width = x.shape[2:] if x.dim() == 4 else (1, 1)
    result = x.new_empty(-(-x.shape[0] // lanes), x.shape[1], height, width, lanes)
    _run("dsr_block", x, lanes, x, result)
    return result


def _to_images(x: Tensor, images: int, channels_last: bool) -> Tensor:
    memory = torch.channels_last if channels_last else torch.contiguous_format
    rows = torch.empty((images, *x.shape[1:4]), memory_format=memory)
    _run("dsr_unblock", rows, x.shape[-1], x, rows)
    return rows


class _Block(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, lanes: int) -> Tensor:
        ctx.shape = x.shape
        ctx.channels_last = x.dim() == 4 and not x.is_contiguous()
        return _to_blocked(x, lanes)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        images = _to_images(gradient.contiguous(), ctx.shape[0], ctx.channels_last)
        return images.view(ctx.shape) if len(ctx.shape) == 2 else images, None


class _Unblock(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, images: int, channels_last: bool) -> Tensor:
        ctx.lanes = x.shape[-1]
        return _to_images(x, images, channels_last)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        return _to_blocked(gradient, ctx.lanes), None, None
