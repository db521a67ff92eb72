"""Convolutions and linear layers in the derivation of moments: sums of independent inputs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import cast

import numpy as np

from dsr_tool.calibrate.signals import Float, Signal
from dsr_tool.graph.ir import Node
from dsr_tool.graph.operators import operator_of
from dsr_tool.graph.windows import Window
from dsr_tool.sparsity.tensor import Array

__all__ = ["Linear"]


@dataclass(frozen=True)
class Linear:
    """The weight of a convolution or linear layer, as the sum over its kernel.

    Attributes:
        node: its node.
        weight: shape (groups, outputs per group, inputs per group, kernel entries).
        convolution: whether channels are on axis 1.
        transposed: whether the weight has its inputs in the first dimension.
    """

    node: Node
    weight: Float
    convolution: bool
    transposed: bool

    @classmethod
    def of(cls, node: Node, weight: Array) -> Linear:
        """Returns the layer of a node; the weight has the shape that the node's operator asks for."""
        groups, op = cast("int", node.attributes.get("group", 1)), node.op
        if op == "Conv":
            shaped = weight.reshape(groups, weight.shape[0] // groups, weight.shape[1], -1)
        elif op == "ConvTranspose":
            shaped = weight.reshape(groups, weight.shape[0] // groups, weight.shape[1], -1).swapaxes(1, 2)
        else:
            shaped = (weight if node.attributes.get("transB") else weight.T)[None, :, :, None]
        return cls(node, shaped.astype(np.float64), operator_of(op).by_image, op == "ConvTranspose")

    @property
    def groups(self) -> int:
        """Number of groups."""
        return int(self.weight.shape[0])

    @property
    def inputs(self) -> int:
        """Number of input channels."""
        return self.groups * int(self.weight.shape[2])

    @property
    def outputs(self) -> int:
        """Number of output channels."""
        return self.groups * int(self.weight.shape[1])

    def shape(self, source: tuple[int, ...]) -> tuple[int, ...]:
        """Returns the shape of the output."""
        if not self.convolution:
            return (*source[:-1], self.outputs)
        return (1, self.outputs, *_pixels(self.node, source[2:], self.weight.shape[3]))

    def output(self, shape: tuple[int, ...], mean: Float, variance: Float, bias: Array | None) -> Signal:
        """Returns the output, with inputs taken as independent."""
        parts = [array.reshape(self.groups, 1, -1) for array in (mean, variance)]
        summed = (self.weight.sum(3) * parts[0]).sum(2).reshape(-1)
        spread = ((self.weight**2).sum(3) * parts[1]).sum(2).reshape(-1)
        if bias is not None:
            summed = summed + bias.reshape(-1)
        place = [1] * len(shape)
        place[1 if self.convolution else -1] = self.outputs
        return Signal(shape, summed.reshape(place), spread.reshape(place))


def _pixels(node: Node, size: tuple[int, ...], taps: int) -> tuple[int, ...]:
    """Returns the pixels of a convolution's output."""
    ints = cast("dict[str, tuple[int, ...]]", node.attributes)
    kernel = ints.get("kernel_shape", (taps,))
    strides, pads, dilations = (ints.get(name, ()) for name in ("strides", "pads", "dilations"))
    window = Window.of(kernel, strides, pads, dilations, str(node.attributes.get("auto_pad", "NOTSET")))
    if node.op == "Conv":
        return window.output_size(size)
    extra = ints.get("output_padding", (0,) * len(size))
    parts = zip(size, window.strides, window.kernel, window.dilations, window.begin, window.end, extra, strict=True)
    return tuple((n - 1) * s + (k - 1) * d + 1 - b - e + x for n, s, k, d, b, e, x in parts)
