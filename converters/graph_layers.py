"""Nodes of a graph whose weights are parameters, as layers of torch: where weights may become sparse."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import nn

from converters.graph_functions import padded
from dsr_tool.errors import UsageError
from dsr_tool.graph.ir import Node

__all__ = ["LAYERS", "Layer", "layer_of"]

_Shapes = Mapping[str, tuple[int, ...]]
_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
_NORMS: dict[int, type[nn.modules.batchnorm._BatchNorm]] = {
    2: nn.BatchNorm1d,
    3: nn.BatchNorm1d,
    4: nn.BatchNorm2d,
    5: nn.BatchNorm3d,
}


@dataclass(frozen=True)
class Layer:
    """A layer of torch for a node.

    Attributes:
        module: the layer, without values.
        parameters: names in the graph of its parameters and buffers, the weight first.
        locals: their names in the layer.
        transposed: True if the weight has its axes in the other order in the layer.
        pads: border of the input, where the layer cannot have it itself; see `padded`.
    """

    module: nn.Module
    parameters: tuple[str, ...]
    locals: tuple[str, ...]
    transposed: bool = False
    pads: tuple[int, ...] = ()

    def call(self, module: nn.Module, x: torch.Tensor) -> torch.Tensor:
        """Computes the node with its module."""
        return cast("torch.Tensor", module(padded(x, self.pads) if self.pads else x))


def layer_of(node: Node, shapes: _Shapes, rank: int) -> Layer | None:
    """Returns the layer of a node; None if it has none, such as a product of two computed values.

    Args:
        node: the node.
        shapes: shape of each parameter of the graph.
        rank: number of dimensions of its first input.

    Raises:
        UsageError: torch's layer lacks this form of the operator.
    """
    make = LAYERS.get(node.op)
    inputs = [name for name in node.inputs[1:] if name]
    if make is None or node.inputs[0] in shapes or not inputs or any(name not in shapes for name in inputs):
        return None
    if len(set(inputs)) < len(inputs):
        return None
    return make(node, inputs, shapes, rank)


def _conv(node: Node, names: list[str], shapes: _Shapes, _: int) -> Layer:
    window, group = _window(node, shapes[names[0]]), cast("int", node.attributes.get("group", 1))
    (out, channels, *kernel), bias = shapes[names[0]], len(names) > 1
    pads, half = window.pop("pads"), len(kernel)
    same = pads[:half] == pads[half:]
    make: Callable[..., nn.Module] = _CONVOLUTIONS[half - 1]
    module = make(
        channels * group, out, tuple(kernel), padding=pads[:half] if same else 0, groups=group, bias=bias, **window
    )
    return Layer(module, tuple(names), ("weight", "bias")[: len(names)], pads=() if same else pads)


def _conv_transpose(node: Node, names: list[str], shapes: _Shapes, _: int) -> Layer:
    window, group = _window(node, shapes[names[0]]), cast("int", node.attributes.get("group", 1))
    (channels, out, *kernel), bias = shapes[names[0]], len(names) > 1
    pads, half = window.pop("pads"), len(kernel)
    if pads[:half] != pads[half:] or node.attributes.get("output_shape"):
        raise UsageError(
            f"ConvTranspose (output {node.outputs[0][:80]!r}) with an output shape, or pads that differ on both sides, "
            f"is not supported in PyTorch."
        )
    extra = tuple(cast("tuple[int, ...]", node.attributes.get("output_padding", (0,) * half)))
    make: Callable[..., nn.Module] = _TRANSPOSED[half - 1]
    module = make(
        channels,
        out * group,
        tuple(kernel),
        padding=pads[:half],
        output_padding=extra,
        groups=group,
        bias=bias,
        **window,
    )
    return Layer(module, tuple(names), ("weight", "bias")[: len(names)])


def _window(node: Node, shape: tuple[int, ...]) -> dict[str, Any]:
    rank, attributes = len(shape) - 2, node.attributes
    if not 1 <= rank <= 3 or attributes.get("auto_pad", "NOTSET") not in ("NOTSET", "VALID"):
        raise UsageError(
            f"{node.op} (output {node.outputs[0][:80]!r}) of {rank} axes, or with padding that depends on sizes, "
            f"is not supported in PyTorch."
        )
    ones, zeros = (1,) * rank, (0, 0) * rank
    pads = attributes.get("pads", zeros) if attributes.get("auto_pad") != "VALID" else zeros
    return {
        "stride": tuple(cast("tuple[int, ...]", attributes.get("strides", ones))),
        "dilation": tuple(cast("tuple[int, ...]", attributes.get("dilations", ones))),
        "pads": tuple(cast("tuple[int, ...]", pads)),
    }


def _gemm(node: Node, names: list[str], shapes: _Shapes, _: int) -> Layer | None:
    attributes, weight = node.attributes, shapes[names[0]]
    plain = not attributes.get("transA", 0) and attributes.get("alpha", 1.0) == attributes.get("beta", 1.0) == 1.0
    transposed = not attributes.get("transB", 0)
    out, channels = reversed(weight) if transposed else weight
    if not plain or any(shapes[name] != (out,) for name in names[1:]):
        return None
    module = nn.Linear(channels, out, bias=len(names) > 1)
    return Layer(module, tuple(names), ("weight", "bias")[: len(names)], transposed)


def _matmul(_: Node, names: list[str], shapes: _Shapes, __: int) -> Layer | None:
    weight = shapes[names[0]]
    if len(weight) != 2:
        return None
    return Layer(nn.Linear(weight[0], weight[1], bias=False), (names[0],), ("weight",), transposed=True)


def _norm(node: Node, names: list[str], shapes: _Shapes, rank: int) -> Layer | None:
    if len(names) != 4 or rank not in _NORMS:
        return None
    if node.attributes.get("training_mode", 0):
        raise UsageError(
            f"BatchNormalization (output {node.outputs[0][:80]!r}) in training mode has the statistics of each batch; "
            f"export the model in eval mode."
        )
    # ONNX keeps this share of the old statistics, torch takes this share of the new ones.
    momentum = 1 - cast("float", node.attributes.get("momentum", 0.9))
    epsilon = cast("float", node.attributes.get("epsilon", 1e-5))
    module = _NORMS[rank](math.prod(shapes[names[0]]), eps=epsilon, momentum=momentum)
    return Layer(module, tuple(names), ("weight", "bias", "running_mean", "running_var"))


LAYERS: dict[str, Callable[[Node, list[str], _Shapes, int], Layer | None]] = {
    "BatchNormalization": _norm,
    "Conv": _conv,
    "ConvTranspose": _conv_transpose,
    "Gemm": _gemm,
    "MatMul": _matmul,
}
"""Functions that make the module of an operator with weights."""
