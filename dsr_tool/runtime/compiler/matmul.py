"""Lowering rules of linear layers, on one row or on rows of features."""

from __future__ import annotations

import dataclasses
import math

import numpy as np

from dsr_tool.graph.ir import Node
from dsr_tool.runtime.compiler.constants import as_sparse, is_packable, reshaped, shape_of
from dsr_tool.runtime.compiler.gemv import Gemv, lower_gemv
from dsr_tool.runtime.compiler.layouts import Rows
from dsr_tool.runtime.compiler.lowering import Lowered, Lowering
from dsr_tool.runtime.compiler.op import IDENTITY
from dsr_tool.runtime.compiler.products import multiply
from dsr_tool.runtime.compiler.spmm import Spmm
from dsr_tool.runtime.compiler.taps import POINT
from dsr_tool.sparsity.tensor import Weight, dense

__all__ = ["add_bias", "gemm", "matmul"]


def matmul(low: Lowering, node: Node) -> Lowered | None:
    """Lowers a product: with a known matrix on the right as a linear layer, or of two matrices."""
    name, matrix = node.inputs
    # Exporters write x @ transpose(w), and w itself lies as the kernels want it.
    weight: Weight | None = low.constants.transposed_source(matrix)
    if weight is None and matrix in low.constants:
        weight = np.ascontiguousarray(low.constants.dense(matrix).T)
    lowered = None
    if weight is not None and name in low.shapes and len(shape_of(weight)) == 2:
        lowered = _linear(low, name, weight, None, (node.op, matrix))
    return lowered or multiply(low, node)


def gemm(
    low: Lowering,
    node: Node,
    *,
    alpha: float = 1.0,
    beta: float = 1.0,
    transA: int = 0,  # noqa: N803 - the standard's name
    transB: int = 0,  # noqa: N803
) -> Lowered | None:
    """Lowers a linear layer whose weight lies as torch stores it: (rows, columns)."""
    weight = low.constants.get(node.inputs[1])
    bias_name = node.inputs[2] if len(node.inputs) > 2 else ""
    bias = low.constants.get(bias_name)
    shape = low.shapes.get(node.inputs[0], ())
    if weight is None or (bias_name and bias is None):
        return None
    if len(shape) != 2 or transA or not transB or alpha != 1 or beta != 1 or len(shape_of(weight)) != 2:
        return None
    if shape[1] != shape_of(weight)[1] or (bias is not None and shape_of(bias) != shape_of(weight)[:1]):
        return None
    return _linear(low, node.inputs[0], weight, bias, (node.op, node.inputs[1]))


def _linear(
    low: Lowering, name: str, weight: Weight, bias: Weight | None, weight_name: tuple[str, str]
) -> Lowered | None:
    """Lowers the product of weights (rows, columns) with each row of features."""
    shape, (rows, columns) = low.shapes[name], shape_of(weight)
    if shape[-1] != columns or not is_packable(weight):
        return None
    out_shape = (*shape[:-1], rows)
    if math.prod(shape[:-1]) == 1:
        return lower_gemv(low, name, weight, bias, out_shape)
    source = low.rows(name)
    if source is None:
        return None
    op = Spmm(
        source=source,
        out=Rows((1, rows, 1, source.shape[3]), source.grid, 1),
        # Features are channels, so a linear layer is a convolution with a 1 x 1 kernel.
        weight=reshaped(as_sparse(weight), (rows, columns, 1, 1)),
        bias=np.zeros(rows, np.float32) if bias is None else dense(bias),
        window=POINT,
        groups=1,
        weight_name=weight_name,
        target=low.target,
    )
    return Lowered(low.add(op), out_shape)


def add_bias(low: Lowering, name: str, vector: str) -> Lowered | None:
    """Lowers the sum of a linear layer's result and a known vector: the vector becomes part of the layer's bias."""
    value, shape, bias = low.value(name), low.shapes.get(name, ()), low.constants.get(vector)
    maker = None if value is None else low.segment.maker(value)
    if value is None or bias is None or shape_of(bias) != shape[-1:] or not low.only_reader(name):
        return None
    if not isinstance(maker, Spmm | Gemv) or maker.activate != IDENTITY or maker.other is not None:
        return None
    # The last axis of a convolution's result is a row of pixels, not the channels.
    if not isinstance(value, Rows) and not (isinstance(maker, Gemv) and maker.bias.shape == shape[-1:]):
        return None
    low.segment.replace(maker, dataclasses.replace(maker, bias=maker.bias + dense(bias)))
    return Lowered(value, shape)
