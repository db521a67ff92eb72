"""Operators of graphs as functions of torch, for networks that come from a file of a graph.

A function takes the node's attributes and its inputs: tensors, arrays of numpy for what is known beforehand, or None
for an input that is absent. It covers the operators of the usual networks of pictures; others are refused by name.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeAlias

import numpy as np
import torch
from torch.nn import functional

from dsr_tool.errors import UsageError
from dsr_tool.graph.axes import axes_of, axis_of

__all__ = ["FUNCTIONS", "Attributes", "Known", "padded", "sizes"]

Attributes: TypeAlias = Mapping[str, Any]
Known: TypeAlias = "Sequence[int | torch.SymInt]"
"""A vector of whole numbers that is known before the network runs, up to the size of the batch."""
_Function: TypeAlias = Callable[..., "torch.Tensor | Sequence[torch.Tensor]"]

_TYPES = {
    1: torch.float32,
    2: torch.uint8,
    3: torch.int8,
    5: torch.int16,
    6: torch.int32,
    7: torch.int64,
    9: torch.bool,
    10: torch.float16,
    11: torch.float64,
}
"""Types of torch by their numbers in the ONNX standard."""


def sizes(value: Any) -> list[Any]:
    """Returns a known vector as a list.

    Raises:
        UsageError: it is computed from the values of tensors.
    """
    if isinstance(value, torch.Tensor):
        raise UsageError("a size that depends on the values of tensors is not supported.")
    return value.tolist() if isinstance(value, np.ndarray) else list(value)


def padded(x: torch.Tensor, pads: Sequence[int], value: float = 0.0, mode: str = "constant") -> torch.Tensor:
    """Returns pixels with a border: `pads` before each of the last axes, then after each."""
    rank = len(pads) // 2
    pairs = [pad for i in reversed(range(rank)) for pad in (pads[i], pads[rank + i])]
    if not any(pairs):
        return x
    return functional.pad(x, pairs, mode, value) if mode == "constant" else functional.pad(x, pairs, mode)


def _simple(function: Callable[..., torch.Tensor]) -> _Function:
    """Makes a function of tensors alone."""
    return lambda _, *inputs: function(*inputs)


def _many(function: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]) -> _Function:
    def run(_: Attributes, first: torch.Tensor, *others: torch.Tensor) -> torch.Tensor:
        for other in others:
            first = function(first, other)
        return first

    return run


def _div(_: Attributes, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    return a / b if a.is_floating_point() else torch.div(a, b, rounding_mode="trunc")


def _clip(_: Attributes, x: torch.Tensor, low: Any = None, high: Any = None) -> torch.Tensor:
    # A limit of another type would change that of the result.
    number = float if x.is_floating_point() else int
    limits = [None if limit is None else number(limit) for limit in (low, high)]
    return x if limits == [None, None] else torch.clamp(x, *limits)


def _prelu(_: Attributes, x: torch.Tensor, slope: torch.Tensor) -> torch.Tensor:
    return torch.where(x < 0, x * slope, x)


def _cast(attributes: Attributes, x: torch.Tensor) -> torch.Tensor:
    if attributes["to"] not in _TYPES:
        raise UsageError(f"Cast to type number {attributes['to']} is not supported; types {sorted(_TYPES)} are.")
    return x.to(_TYPES[attributes["to"]])


def _gelu(attributes: Attributes, x: torch.Tensor) -> torch.Tensor:
    return functional.gelu(x, approximate=attributes.get("approximate", "none"))


def _hard_sigmoid(attributes: Attributes, x: torch.Tensor) -> torch.Tensor:
    return torch.clamp(x * attributes.get("alpha", 0.2) + attributes.get("beta", 0.5), 0, 1)


def _reduction(function: Callable[[torch.Tensor, list[int], bool], torch.Tensor]) -> _Function:
    def run(attributes: Attributes, x: torch.Tensor, axes: Any = None) -> torch.Tensor:
        chosen = axes_of(sizes(axes), x.ndim) if axes is not None else []
        if not chosen and attributes.get("noop_with_empty_axes", 0):
            return x
        return function(x, chosen or list(range(x.ndim)), bool(attributes.get("keepdims", 1)))

    return run


def _global(function: Callable[[torch.Tensor, list[int], bool], torch.Tensor]) -> _Function:
    return lambda _, x: function(x, list(range(2, x.ndim)), True)


def _max_pool(attributes: Attributes, x: torch.Tensor) -> torch.Tensor:
    kernel, strides, pads, dilations = _window(attributes)
    pool = (functional.max_pool1d, functional.max_pool2d, functional.max_pool3d)[len(kernel) - 1]
    ceil = bool(attributes.get("ceil_mode", 0))
    found = pool(padded(x, pads, -math.inf), kernel, strides, 0, dilations, ceil)
    if ceil and any(pads):
        # No window starts behind the last pixel. Here the border counts as pixels, so PyTorch may have one more.
        for i, (stride, pad) in enumerate(zip(strides, pads, strict=False)):
            found = found.narrow(2 + i, 0, min(found.shape[2 + i], -(-(x.shape[2 + i] + pad) // stride)))
    return found


def _average_pool(attributes: Attributes, x: torch.Tensor) -> torch.Tensor:
    kernel, strides, pads, dilations = _window(attributes)
    if any(d != 1 for d in dilations):
        raise UsageError("AveragePool with dilations is not supported in PyTorch.")
    pool = (functional.avg_pool1d, functional.avg_pool2d, functional.avg_pool3d)[len(kernel) - 1]
    ceil, half = bool(attributes.get("ceil_mode", 0)), len(pads) // 2
    if not any(pads) or (pads[:half] == pads[half:] and all(2 * p <= k for p, k in zip(pads, kernel, strict=False))):
        return pool(x, kernel, strides, tuple(pads[:half]), ceil, bool(attributes.get("count_include_pad", 0)))
    if ceil:
        raise UsageError("AveragePool with ceil_mode and pads that differ is not supported in PyTorch.")
    means = pool(padded(x, pads), kernel, strides)
    if attributes.get("count_include_pad", 0):
        return means
    # The share of each window that lies inside the picture.
    inside = padded(torch.ones_like(x[:1, :1]), pads)
    return means / pool(inside, kernel, strides)


def _window(attributes: Attributes) -> tuple[tuple[int, ...], ...]:
    if attributes.get("auto_pad", "NOTSET") not in ("NOTSET", "VALID"):
        raise UsageError(f"auto_pad {attributes['auto_pad']} of unknown sizes is not supported.")
    kernel = tuple(attributes["kernel_shape"])
    ones = (1,) * len(kernel)
    return (
        kernel,
        tuple(attributes.get("strides", ones)),
        tuple(attributes.get("pads", (0, 0) * len(kernel))),
        tuple(attributes.get("dilations", ones)),
    )


def _concat(attributes: Attributes, *inputs: torch.Tensor) -> torch.Tensor:
    return torch.cat(inputs, axis_of(attributes["axis"], inputs[0].ndim))


def _split(attributes: Attributes, x: torch.Tensor, split: Any = None) -> Sequence[torch.Tensor]:
    axis = axis_of(attributes.get("axis", 0), x.ndim)
    parts = -(-x.shape[axis] // attributes.get("num_outputs", 1)) if split is None else sizes(split)
    return torch.split(x, parts, axis)


def _slice(_: Attributes, x: torch.Tensor, starts: Any, ends: Any, axes: Any = None, steps: Any = None) -> torch.Tensor:
    first, last = sizes(starts), sizes(ends)
    chosen = axes_of(sizes(axes) if axes is not None else range(len(first)), x.ndim)
    strides = sizes(steps) if steps is not None else [1] * len(first)
    for axis, start, end, step in zip(chosen, first, last, strides, strict=True):
        if step < 1:
            raise UsageError(f"Slice with step {step} is not supported in PyTorch.")
        x = x[(slice(None),) * axis + (slice(max(start, -x.shape[axis]), end, step),)]
    return x


def _gather(attributes: Attributes, x: torch.Tensor, indices: Any) -> torch.Tensor:
    axis = axis_of(attributes.get("axis", 0), x.ndim)
    at = indices if isinstance(indices, torch.Tensor) else torch.tensor(np.array(indices), device=x.device)
    at = torch.where(at < 0, at + x.shape[axis], at)
    found = torch.index_select(x, axis, at.reshape(-1))
    return found.reshape(*x.shape[:axis], *at.shape, *x.shape[axis + 1 :])


def _reshape(attributes: Attributes, x: torch.Tensor, shape: Any) -> torch.Tensor:
    wanted = sizes(shape)
    if not attributes.get("allowzero", 0):
        wanted = [x.shape[i] if isinstance(n, int) and n == 0 else n for i, n in enumerate(wanted)]
    return x.reshape(wanted)


def _flatten(attributes: Attributes, x: torch.Tensor) -> torch.Tensor:
    axis = attributes.get("axis", 1)
    axis = axis if axis == x.ndim else axis_of(axis, x.ndim)
    if axis == 0:
        return x.reshape(1, -1)
    # The batch stays the first axis, whatever its size.
    return x.flatten(axis).flatten(0, axis - 1) if axis < x.ndim else x.reshape(-1, 1)


def _transpose(attributes: Attributes, x: torch.Tensor) -> torch.Tensor:
    return x.permute(attributes.get("perm", tuple(reversed(range(x.ndim)))))


def _squeeze(_: Attributes, x: torch.Tensor, axes: Any = None) -> torch.Tensor:
    return x.squeeze() if axes is None else x.squeeze(tuple(axes_of(sizes(axes), x.ndim)))


def _unsqueeze(_: Attributes, x: torch.Tensor, axes: Any) -> torch.Tensor:
    rank = x.ndim + len(sizes(axes))
    for axis in sorted(axes_of(sizes(axes), rank)):
        x = x.unsqueeze(axis)
    return x


def _expand(_: Attributes, x: torch.Tensor, shape: Any) -> torch.Tensor:
    wanted = sizes(shape)
    missing = max(len(wanted) - x.ndim, 0)
    own = [1] * missing + list(x.shape)
    wanted = [1] * (len(own) - len(wanted)) + wanted
    # A size of 1 in the shape keeps that of the tensor.
    return x.reshape(own).expand([-1 if n == 1 else n for n in wanted])


def _tile(_: Attributes, x: torch.Tensor, repeats: Any) -> torch.Tensor:
    return x.repeat(sizes(repeats))


def _pad(attributes: Attributes, x: torch.Tensor, pads: Any, value: Any = None, axes: Any = None) -> torch.Tensor:
    mode = {"edge": "replicate", "wrap": "circular"}.get(attributes.get("mode", "constant"), attributes.get("mode"))
    widths, half = sizes(pads), len(sizes(pads)) // 2
    if axes is not None:
        full = [0] * (2 * x.ndim)
        for i, axis in enumerate(axes_of(sizes(axes), x.ndim)):
            full[axis], full[x.ndim + axis] = widths[i], widths[half + i]
        widths, half = full, x.ndim
    if mode not in (None, "constant"):
        # torch mirrors the last axes alone.
        first = next((i for i in range(half) if widths[i] or widths[half + i]), half)
        widths = [*widths[first:half], *widths[half + first :]]
    filler = 0.0 if value is None else float(value)
    return padded(x, widths, filler, mode or "constant")


def _depth_to_space(attributes: Attributes, x: torch.Tensor) -> torch.Tensor:
    side = attributes["blocksize"]
    if attributes.get("mode", "DCR") == "DCR":
        # torch's own order is the other one.
        batch, channels, height, width = x.shape
        inner = channels // (side * side)
        x = x.reshape(batch, side * side, inner, height, width).transpose(1, 2).reshape(batch, channels, height, width)
    return functional.pixel_shuffle(x, side)


def _resize(
    attributes: Attributes,
    x: torch.Tensor,
    roi: Any = None,  # noqa: ARG001 - belongs to a coordinate mode that is not supported
    scales: Any = None,
    out: Any = None,
) -> torch.Tensor:
    mode, where = attributes.get("mode", "nearest"), attributes.get("coordinate_transformation_mode", "half_pixel")
    pixels = [int(n) for n in x.shape[2:]]
    if any(attributes.get(name) for name in ("antialias", "axes", "exclude_outside")) or len(pixels) not in (1, 2, 3):
        raise UsageError("Resize of chosen axes, with antialias or exclude_outside is not supported in PyTorch.")
    if attributes.get("keep_aspect_ratio_policy", "stretch") != "stretch":
        raise UsageError("Resize with keep_aspect_ratio_policy is not supported in PyTorch.")
    if out is not None and len(sizes(out)):
        wanted, others = [int(n) for n in sizes(out)[2:]], sizes(out)[1] == x.shape[1]
    else:
        # Sizes are those of float32, in which 1.3 times 10 is 13. PyTorch computes coordinates from sizes alone.
        grown = [float(np.float32(n * scale)) for n, scale in zip(pixels, sizes(scales)[2:], strict=True)]
        wanted, others = [int(n) for n in grown], sizes(scales)[:2] == [1, 1]
        others = others and (wanted == grown or where == "align_corners")
    if not others:
        raise UsageError(f"Resize of {pixels} pixels to parts of a pixel, or of channels, is not supported in PyTorch.")
    if mode == "nearest":
        rounding = attributes.get("nearest_mode", "round_prefer_floor")
        if not _repeats(pixels, wanted, where, rounding):
            raise UsageError(
                f"Resize of {pixels} to {wanted} by nearest pixels in mode {where}, {rounding} is not supported in "
                f"PyTorch."
            )
        return functional.interpolate(x, wanted, mode="nearest")
    known = where in ("half_pixel", "align_corners") or (where == "pytorch_half_pixel" and 1 not in wanted)
    if not known or (mode == "cubic" and (len(wanted) != 2 or attributes.get("cubic_coeff_a", -0.75) != -0.75)):
        raise UsageError(f"Resize in mode {mode} with coordinates {where} is not supported in PyTorch.")
    name = "bicubic" if mode == "cubic" else ("linear", "bilinear", "trilinear")[len(wanted) - 1]
    return functional.interpolate(x, wanted, mode=name, align_corners=where == "align_corners")


def _repeats(pixels: list[int], wanted: list[int], where: str, rounding: str) -> bool:
    """Returns whether a Resize takes the pixels that torch's `nearest` takes, at the coordinate rounded down."""
    if where == "asymmetric" and rounding == "floor":
        return True
    if any(n % own for n, own in zip(wanted, pixels, strict=True)):
        return False
    if where == "asymmetric":
        # Coordinates of a twice as large picture end in .0 and .5; larger ones have some above .5.
        return rounding == "round_prefer_floor" and all(n <= 2 * own for n, own in zip(wanted, pixels, strict=True))
    return where in ("half_pixel", "pytorch_half_pixel") and rounding in ("round_prefer_floor", "round_prefer_ceil")


def _selu(attributes: Attributes, x: torch.Tensor) -> torch.Tensor:
    if not attributes:
        return functional.selu(x)
    alpha = attributes.get("alpha", 1.67326319217681884765625)
    gamma: float = attributes.get("gamma", 1.05070102214813232421875)
    return functional.elu(x, alpha) * gamma


def _softmax(attributes: Attributes, x: torch.Tensor) -> torch.Tensor:
    return torch.softmax(x, axis_of(attributes.get("axis", -1), x.ndim))


def _log_softmax(attributes: Attributes, x: torch.Tensor) -> torch.Tensor:
    return torch.log_softmax(x, axis_of(attributes.get("axis", -1), x.ndim))


def _layer_norm(attributes: Attributes, x: torch.Tensor, scale: torch.Tensor, bias: Any = None) -> torch.Tensor:
    shape = x.shape[axis_of(attributes.get("axis", -1), x.ndim) :]
    return functional.layer_norm(x, shape, scale.reshape(shape), bias, attributes.get("epsilon", 1e-5))


def _instance_norm(attributes: Attributes, x: torch.Tensor, scale: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    return functional.instance_norm(x, weight=scale, bias=bias, eps=attributes.get("epsilon", 1e-5))


def _gemm(attributes: Attributes, a: torch.Tensor, b: torch.Tensor, c: Any = None) -> torch.Tensor:
    a = a.T if attributes.get("transA", 0) else a
    b = b.T if attributes.get("transB", 0) else b
    result: torch.Tensor = a @ b * attributes.get("alpha", 1.0)
    return result if c is None else result + c * attributes.get("beta", 1.0)


def _identity(_: Attributes, x: torch.Tensor) -> torch.Tensor:
    return x


def _dropout(_: Attributes, x: torch.Tensor, ratio: Any = None, training: Any = None) -> torch.Tensor:  # noqa: ARG001
    if training is not None and bool(np.any(sizes(training))):
        raise UsageError("Dropout in training mode returns random values; export the model in eval mode.")
    return x


FUNCTIONS: dict[str, _Function] = {
    "Abs": _simple(torch.abs),
    "Add": _simple(torch.add),
    "AveragePool": _average_pool,
    "Cast": _cast,
    "Ceil": _simple(torch.ceil),
    "Clip": _clip,
    "Concat": _concat,
    "Cos": _simple(torch.cos),
    "DepthToSpace": _depth_to_space,
    "Div": _div,
    "Dropout": _dropout,
    "Elu": lambda attributes, x: functional.elu(x, attributes.get("alpha", 1.0)),
    "Erf": _simple(torch.erf),
    "Exp": _simple(torch.exp),
    "Expand": _expand,
    "Flatten": _flatten,
    "Floor": _simple(torch.floor),
    "Gather": _gather,
    "Gelu": _gelu,
    "Gemm": _gemm,
    "GlobalAveragePool": _global(torch.mean),
    "GlobalMaxPool": _global(torch.amax),
    "HardSigmoid": _hard_sigmoid,
    "HardSwish": _simple(functional.hardswish),
    "Identity": _identity,
    "InstanceNormalization": _instance_norm,
    "LayerNormalization": _layer_norm,
    "LeakyRelu": lambda attributes, x: functional.leaky_relu(x, attributes.get("alpha", 0.01)),
    "Log": _simple(torch.log),
    "LogSoftmax": _log_softmax,
    "MatMul": _simple(torch.matmul),
    "Max": _many(torch.maximum),
    "MaxPool": _max_pool,
    "Min": _many(torch.minimum),
    "Mish": _simple(functional.mish),
    "Mul": _simple(torch.mul),
    "Neg": _simple(torch.neg),
    "PRelu": _prelu,
    "Pad": _pad,
    "Pow": _simple(torch.pow),
    "Reciprocal": _simple(torch.reciprocal),
    "ReduceMax": _reduction(torch.amax),
    "ReduceMean": _reduction(torch.mean),
    "ReduceMin": _reduction(torch.amin),
    "ReduceSum": _reduction(torch.sum),
    "Relu": _simple(functional.relu),
    "Reshape": _reshape,
    "Resize": _resize,
    "Selu": _selu,
    "Sigmoid": _simple(torch.sigmoid),
    "Sign": _simple(torch.sign),
    "Sin": _simple(torch.sin),
    "Slice": _slice,
    "Softmax": _softmax,
    "Softplus": _simple(functional.softplus),
    "Softsign": _simple(functional.softsign),
    "Split": _split,
    "Sqrt": _simple(torch.sqrt),
    "Squeeze": _squeeze,
    "Sub": _simple(torch.sub),
    "Sum": _many(torch.add),
    "Swish": lambda attributes, x: x * torch.sigmoid(attributes.get("alpha", 1.0) * x),
    "Tanh": _simple(torch.tanh),
    "Tile": _tile,
    "Transpose": _transpose,
    "Unsqueeze": _unsqueeze,
}
"""The function of every operator that networks from graphs may have, apart from those that are layers."""
