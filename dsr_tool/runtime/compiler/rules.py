"""Which operator is put down by which rule; pools, means and changes of shape."""

from __future__ import annotations

import math
import operator
from typing import Any

import numpy as np

from dsr_tool.graph.ir import Node
from dsr_tool.graph.limits import int_list
from dsr_tool.runtime.compiler.convolution import average_pool, conv, placed
from dsr_tool.runtime.compiler.elementwise import binary, clip, gelu, hard_swish, relu, shaped
from dsr_tool.runtime.compiler.layouts import Flat, Planes, Rows
from dsr_tool.runtime.compiler.matmul import gemm, layer_norm, matmul, softmax
from dsr_tool.runtime.compiler.lowering import Lowering, Rule
from dsr_tool.runtime.compiler.relayout import offsets_of, reach, taps_of
from dsr_tool.runtime.compiler.segment import Op, address
from dsr_tool.runtime.kernels.ops import Activation, Kind, Operation
from dsr_tool.sparsity.tensor import dense

__all__ = ["RULES"]


def _max_pool(into: Lowering, node: Node, *, ceil_mode: int = 0, **_: Any) -> Any:
    window, shape = into.window(node), into.shapes.get(node.inputs[0], ())
    if window is None or len(shape) != 4 or len(set(window.strides)) != 1:
        return None
    size = window.output_size(shape[2:], ceil=bool(ceil_mode))
    source = into.planes(node.inputs[0])
    if source is None or min(size) < 1:
        return None
    padded = any(window.begin) or any(
        (n - 1) * s + (k - 1) * d + 1 > m
        for n, s, k, d, m in zip(size, window.strides, window.kernel, window.dilations, shape[2:], strict=True)
    )
    if padded and not source.positive:
        return None
    made = placed(into, source, window, size, node)
    if made is None:
        return None
    source, window, factor = made
    out = Planes((*shape[:2], *size), source.grid, factor)
    out.positive = source.positive
    if not reach(source, taps_of(window, source.factor, factor)):
        return None

    def finish(struct: Operation, kept: list[object]) -> None:
        offsets = np.array(offsets_of(window, source, out), np.int32)
        struct.index, struct.count, struct.inner = address(offsets, kept), offsets.shape[1], source.phases

    return into.segment.add(Op(Kind.MAX_POOL, source, out, finish=finish)), out.shape


def _mean(into: Lowering, node: Node, **attributes: Any) -> Any:
    shape = into.shapes.get(node.inputs[0], ())
    if len(shape) != 4:
        return None
    keep = 1
    if node.op == "ReduceMean":
        axes = into.known.get(node.inputs[1]) if len(node.inputs) > 1 else None
        keep = attributes.get("keepdims", 1)
        if axes is None or sorted(int(axis) % 4 for axis in dense(axes).ravel()) != [2, 3]:
            return None
    source = into.planes(node.inputs[0])
    if source is None:
        return None
    source.padded = True
    made = (*shape[:2], 1, 1) if keep else shape[:2]
    out = Flat(made, into.lanes, into.batch)

    def finish(struct: Operation, kept: list[object]) -> None:  # noqa: ARG001
        struct.channels, struct.phases, struct.length = source.channels, source.phases, source.grid.length

    return into.segment.add(Op(Kind.MEAN, source, out, alpha=1 / math.prod(shape[2:]), finish=finish)), made


def _reshape(into: Lowering, node: Node, **attributes: Any) -> Any:
    shape = into.shapes.get(node.inputs[0])
    if shape is None or not shape:
        return None
    if node.op == "Flatten":
        axis = attributes.get("axis", 1)
        wanted: tuple[int, ...] = (math.prod(shape[:axis]), math.prod(shape[axis:]))
    elif node.inputs[1] in into.known:
        given = [operator.index(n) for n in int_list(dense(into.known[node.inputs[1]]))]
        wanted = tuple(shape[i] if n == 0 and not attributes.get("allowzero") else n for i, n in enumerate(given))
        if -1 in wanted:
            rest = -math.prod(wanted)
            wanted = tuple(math.prod(shape) // rest if n == -1 else n for n in wanted)
    else:
        return None
    if (
        min(wanted, default=0) < 0
        or (into.batch > 1 and wanted[:1] != shape[:1])
        or math.prod(wanted) != math.prod(shape)
    ):
        return None
    rows = into.values.get(node.inputs[0])
    if isinstance(rows, Rows) and wanted[-1:] == shape[-1:] and into.only_here(node.inputs[0]):
        return rows, wanted
    value = into.flat(node.inputs[0])
    # What is done to the new value later must not be seen under the old name.
    return None if value is None or not into.only_here(node.inputs[0]) else (value, wanted)


def _transpose(into: Lowering, node: Node, *, perm: tuple[int, ...] = ()) -> Any:
    """Only where axes of one entry change places: nothing moves then."""
    name = node.inputs[0]
    shape = into.shapes.get(name, ())
    order = [axis for axis in perm if shape[axis] > 1]
    if not perm or order != sorted(order) or sorted(perm) != list(range(len(shape))) or not into.only_here(name):
        return None
    value = into.values.get(name)
    wanted = tuple(shape[axis] for axis in perm)
    if isinstance(value, Rows) and wanted[-1] == shape[-1] and into.batch == 1:
        return value, wanted
    return None


RULES: dict[str, Rule] = {
    "Add": binary,
    "AveragePool": average_pool,
    "Clip": clip,
    "Conv": conv,
    "Div": binary,
    "Elu": shaped(Activation.ELU, alpha=1.0),
    "Flatten": _reshape,
    "Gelu": gelu,
    "Gemm": gemm,
    "GlobalAveragePool": _mean,
    "HardSigmoid": shaped(Activation.HARD_SIGMOID, alpha=0.2, beta=0.5),
    "HardSwish": hard_swish,
    "LeakyRelu": shaped(Activation.LEAKY_RELU, alpha=0.01),
    "LayerNormalization": layer_norm,
    "MatMul": matmul,
    "MaxPool": _max_pool,
    "Mul": binary,
    "ReduceMean": _mean,
    "Relu": relu,
    "Reshape": _reshape,
    "Sigmoid": shaped(Activation.SIGMOID),
    "Softmax": softmax,
    "Sub": binary,
    "Swish": shaped(Activation.SILU),
    "Tanh": shaped(Activation.TANH),
    "Transpose": _transpose,
}
