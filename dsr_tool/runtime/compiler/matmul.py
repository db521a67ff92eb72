"""Linear layers, on one vector or on rows of features, and what else works on rows."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from dsr_tool.graph.ir import Node
from dsr_tool.graph.windows import Window
from dsr_tool.runtime.compiler.convolution import packed
from dsr_tool.runtime.compiler.gemv import one_row
from dsr_tool.runtime.compiler.grids import shape_of
from dsr_tool.runtime.compiler.layouts import Flat, Rows
from dsr_tool.runtime.compiler.lowering import Lowering, packable
from dsr_tool.runtime.compiler.segment import Op, address
from dsr_tool.runtime.kernels.ops import Kind, Operation
from dsr_tool.sparsity.mask import Mask
from dsr_tool.sparsity.tensor import SparseTensor, Weight, dense

__all__ = ["biased", "gemm", "layer_norm", "linear", "matmul", "softmax"]


_POINT = Window((1, 1), (1, 1), (1, 1), (0, 0), (0, 0))


def linear(into: Lowering, name: str, weight: Weight, bias: Weight | None, key: Any) -> Any:
    """Weights (rows, columns) times each row of features."""
    shape, (rows, columns) = into.shapes[name], shape_of(weight)
    if shape[-1] != columns or not packable(weight):
        return None
    made = (*shape[:-1], rows)
    if math.prod(shape[:-1]) == 1:
        value = one_row(into, name, weight, bias, made)
        return None if value is None else (value, made)
    source = into.rows(name)
    if source is None:
        return None
    out = Rows((1, rows, 1, source.shape[3]), source.grid, 1)
    addend = np.zeros(rows, np.float32) if bias is None else dense(bias)
    kernel = (
        SparseTensor(Mask((rows, columns, 1, 1), weight.mask.stored), weight.values)
        if isinstance(weight, SparseTensor)
        else weight.reshape(rows, columns, 1, 1)
    )
    op = Op(Kind.PRODUCT, source, out, bias=addend, finish=packed(into, key, source, out, _POINT, 1, kernel))
    return into.segment.add(op), made


def matmul(into: Lowering, node: Node) -> Any:
    """A product by a known matrix."""
    name = node.inputs[1]
    if name not in into.known or node.inputs[0] not in into.shapes:
        return None
    weight: Weight | None = into.known.swapped(name)
    if weight is None:
        weight = np.ascontiguousarray(dense(into.known[name]).T)
    return linear(into, node.inputs[0], weight, None, (node.op, name)) if len(shape_of(weight)) == 2 else None


def gemm(
    into: Lowering,
    node: Node,
    *,
    alpha: float = 1.0,
    beta: float = 1.0,
    transA: int = 0,  # noqa: N803 - the standard's name
    transB: int = 0,  # noqa: N803
) -> Any:
    """A linear layer, its weight as torch stores it."""
    weight = into.known.get(node.inputs[1])
    bias = into.known.get(node.inputs[2]) if len(node.inputs) > 2 else None
    shape = into.shapes.get(node.inputs[0], ())
    if (
        weight is None
        or len(shape) != 2
        or transA
        or not transB
        or alpha != 1
        or beta != 1
        or len(shape_of(weight)) != 2
    ):
        return None
    if shape[1] != shape_of(weight)[1] or (bias is not None and shape_of(bias) != shape_of(weight)[:1]):
        return None
    return linear(into, node.inputs[0], weight, bias, (node.op, node.inputs[1]))


def biased(into: Lowering, name: str, vector: str) -> Any:
    """The sum of rows of features and one vector for all rows."""
    value, shape, bias = into.value(name), into.shapes.get(name, ()), into.known.get(vector)
    maker = None if value is None else into.segment.maker(value)
    if bias is None or maker is None or shape_of(bias) != shape[-1:] or maker.bias is None or not into.only_here(name):
        return None
    if maker.kind not in (Kind.PRODUCT, Kind.ROWS) or not maker.plain or maker.other is not None:
        return None
    if not isinstance(value, Rows) and not (maker.kind is Kind.ROWS and maker.bias.shape == shape[-1:]):
        return None
    maker.bias = maker.bias + dense(bias)
    return value, shape


def layer_norm(
    into: Lowering,
    node: Node,
    *,
    axis: int = -1,
    epsilon: float = 1e-5,
    stash_type: int = 1,  # noqa: ARG001
) -> Any:
    """Each row less its mean, over its deviation."""
    name = node.inputs[0]
    shape = into.shapes.get(name, ())
    scale, shift = into.known.get(node.inputs[1]), into.known.get(node.inputs[2]) if node.inputs[2:] else None
    if not shape or scale is None or axis not in (-1, len(shape) - 1) or shape_of(scale) != shape[-1:]:
        return None
    if shift is not None and shape_of(shift) != shape[-1:]:
        return None
    source = into.rows(name)
    if source is None:
        return None
    out = Rows(source.shape, source.grid, 1)
    bias = np.zeros(shape[-1], np.float32) if shift is None else dense(shift)

    def finish(struct: Operation, kept: list[object]) -> None:
        struct.values = address(np.ascontiguousarray(dense(scale), np.float32), kept)

    return into.segment.add(Op(Kind.NORMALIZE, source, out, alpha=float(epsilon), bias=bias, finish=finish)), shape


def softmax(into: Lowering, node: Node, *, axis: int = -1) -> Any:
    """Softmax over the last axis."""
    shape = into.shapes.get(node.inputs[0], ())
    # Of a row for the whole batch, each run would see one entry.
    if not shape or axis not in (-1, len(shape) - 1) or (len(shape) == 1 and into.batch > 1):
        return None
    source = into.flat(node.inputs[0])
    if source is None:
        return None
    out = Flat(shape, into.lanes, into.batch)

    def finish(struct: Operation, kept: list[object]) -> None:  # noqa: ARG001
        struct.count, struct.inner = shape[-1], out.entries // shape[-1]

    return into.segment.add(Op(Kind.SOFTMAX, source, out, finish=finish)), shape
