"""Activations, and sums and products of two values, joined with what makes the values where that is allowed."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from dsr_tool.graph.ir import Node
from dsr_tool.runtime.compiler.layouts import Flat, Planes, Rows, Value
from dsr_tool.runtime.compiler.matmul import biased
from dsr_tool.runtime.compiler.lowering import Lowering, Rule
from dsr_tool.runtime.compiler.relayout import copied
from dsr_tool.runtime.compiler.segment import Op
from dsr_tool.runtime.kernels.ops import Activation, Combination, Kind
from dsr_tool.sparsity.tensor import dense

__all__ = ["binary", "clip", "gelu", "hard_swish", "relu", "shaped"]


def relu(into: Lowering, node: Node) -> Any:
    """The larger of each entry and zero."""
    return activation_of(into, node, Activation.CLIP, low=0.0)


def clip(into: Lowering, node: Node) -> Any:
    """Entries kept between limits that are known."""
    limits = []
    for name in (*node.inputs[1:], "", "")[:2]:
        if name and name not in into.known:
            return None
        limits.append(dense(into.known[name]).item() if name else None)
    least, most = limits
    return activation_of(
        into, node, Activation.CLIP, low=-math.inf if least is None else least, high=math.inf if most is None else most
    )


def shaped(activation: Activation, **defaults: float) -> Rule:
    """An activation whose parameters are the attributes of its node, with these defaults."""

    def lower(into: Lowering, node: Node, **attributes: float) -> Any:
        unknown = attributes.keys() - defaults.keys()
        return None if unknown else activation_of(into, node, activation, **{**defaults, **attributes})

    return lower


def hard_swish(into: Lowering, node: Node, *, alpha: float = 1 / 6, beta: float = 0.5) -> Any:
    """X times its hard sigmoid."""
    return activation_of(into, node, Activation.HARD_SWISH, alpha=alpha, beta=beta)


def gelu(into: Lowering, node: Node, *, approximate: str = "none") -> Any:
    """X times the share of a normal distribution below it."""
    kinds = {"none": Activation.GELU, "tanh": Activation.GELU_TANH}
    return activation_of(into, node, kinds[approximate])


def activation_of(into: Lowering, node: Node, activation: Activation, **parameters: float) -> Any:
    name = node.inputs[0]
    value = into.value(name)
    if value is None:
        return None
    parameters = {key: float(given) for key, given in parameters.items()}
    if any(map(math.isnan, parameters.values())):
        return None
    maker = into.segment.maker(value)
    fusable = (Kind.PRODUCT, Kind.COMBINE, Kind.CHANNELWISE, Kind.ROWS)
    if maker is not None and maker.kind in fusable and maker.plain and into.only_here(name):
        _set(maker, activation, parameters)
        return value, into.shapes[name]
    value = plain(into, name)
    op = Op(Kind.COMBINE, value, like(into, value, into.shapes[name]))
    _set(op, activation, parameters)
    return into.segment.add(op), into.shapes[name]


def plain(into: Lowering, name: str) -> Value:
    """A value that there is, in the arena, as planes where it has pixels."""
    value = into.values[name] if name in into.values else into.array(name)
    if isinstance(value, Planes):
        return value
    if len(into.shapes[name]) == 4 and math.prod(into.shapes[name][2:]) > 1:
        planes = into.planes(name)
        if planes is not None:
            return planes
    if value in into.segment.inputs.values():
        # Arrays of the caller end where they end; kernels work on whole vectors.
        copy = Flat(into.shapes[name], into.lanes, into.batch)
        into.segment.add(copied(value, copy))
        into.values[name] = value = copy
    return value


def like(into: Lowering, value: Value, shape: tuple[int, ...]) -> Value:
    if isinstance(value, Rows):
        return Rows(value.shape, value.grid, 1)
    return Planes(shape, value.grid, value.factor) if isinstance(value, Planes) else Flat(shape, into.lanes, into.batch)


def _set(op: Op, activation: Activation, parameters: Mapping[str, float]) -> None:
    op.activation = activation
    for name, value in parameters.items():
        setattr(op, name, value)
    if isinstance(op.out, Planes):
        op.out.positive = activation is Activation.SIGMOID or (activation is Activation.CLIP and 0 <= op.low <= op.high)


def binary(into: Lowering, node: Node) -> Any:
    """Sum, difference, product or quotient of two values of one shape; a sum joins the product that made one."""
    first, second = node.inputs
    how = {"Add": Combination.ADD, "Sub": Combination.SUBTRACT, "Mul": Combination.MULTIPLY, "Div": Combination.DIVIDE}[
        node.op
    ]
    for name, vector in ((first, second), (second, first)):
        if how is Combination.ADD and vector in into.known and name in into.shapes:
            return biased(into, name, vector)
    shape = into.shapes.get(first)
    if shape is None or into.shapes.get(second) != shape or first == second:
        return _scaled(into, node, how)
    if into.value(first) is None or into.value(second) is None:
        return None
    a, b = plain(into, first), plain(into, second)
    if isinstance(a, Rows) or isinstance(b, Rows):
        one, two = into.rows(first), into.rows(second)
        if one is None or two is None:
            return None
        a, b = one, two
    if how is Combination.ADD:
        for made, other, name in ((a, b, first), (b, a, second)):
            maker = into.segment.maker(made)
            if maker is not None and _joins(into, maker, made, other, name):
                maker.other = other
                return made, shape
    if isinstance(a, Planes) and isinstance(b, Planes) and not alike(a, b):
        b = into.moved(b, a.grid, a.factor)
    if not alike(a, b):
        return None
    return into.segment.add(Op(Kind.COMBINE, a, like(into, a, shape), b, flag=how)), shape


def alike(a: Value, b: Value) -> bool:
    """Whether the entries of two values of one shape lie in the same order."""
    if isinstance(a, Planes) and isinstance(b, Planes):
        return (a.grid, a.factor) == (b.grid, b.factor)
    return isinstance(a, Flat) and isinstance(b, Flat)


def _joins(into: Lowering, maker: Op, one: Value, other: Value, name: str) -> bool:
    """Whether a sum can start from `other` where `maker` computes `one`."""
    before = into.segment.ops[: into.segment.ops.index(maker)]
    return (
        maker.kind in (Kind.PRODUCT, Kind.ROWS)
        and maker.plain
        and maker.other is None
        and into.only_here(name)
        and alike(one, other)
        and any(op.out is other for op in before)
    )


def _scaled(into: Lowering, node: Node, how: Combination) -> Any:
    """Planes times one number for each channel, which was computed."""
    first, second = node.inputs
    if how is not Combination.MULTIPLY or first not in into.shapes or second not in into.shapes:
        return None
    shapes = into.shapes[first], into.shapes[second]
    if len(shapes[0]) != 4 or len(shapes[1]) != 4 or shapes[0][:2] != shapes[1][:2]:
        return None
    if shapes[0][2:] == (1, 1):
        first, second, shapes = second, first, shapes[::-1]
    if shapes[1][2:] != (1, 1):
        return None
    planes, factors = into.planes(first), into.flat(second)
    if planes is None or factors is None:
        return None
    out = Planes(shapes[0], planes.grid, planes.factor)
    return into.segment.add(Op(Kind.CHANNELWISE, planes, out, factors)), shapes[0]
