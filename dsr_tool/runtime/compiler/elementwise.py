"""Lowering rules of activations and of arithmetic on two values, fused into the op that makes a value if possible."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from dsr_tool.graph.ir import Node
from dsr_tool.runtime.compiler.broadcast import broadcast
from dsr_tool.runtime.compiler.channels import by_channel
from dsr_tool.runtime.compiler.gemv import Gemv
from dsr_tool.runtime.compiler.layouts import Flat, Planes, Rows, Value, same_layout
from dsr_tool.runtime.compiler.lowering import Lowered, Lowering, Rule
from dsr_tool.runtime.compiler.matmul import add_bias
from dsr_tool.runtime.compiler.op import IDENTITY, Activate, Op, Parameters
from dsr_tool.runtime.compiler.packing import Packer
from dsr_tool.runtime.compiler.picked import Picked
from dsr_tool.runtime.compiler.products import add_to_product
from dsr_tool.runtime.compiler.relayout import Copy
from dsr_tool.runtime.compiler.spmm import Spmm
from dsr_tool.runtime.kernels.ops import Activation, Combination, Kind

__all__ = ["Combine", "Scale", "activation", "arithmetic", "clip", "gelu", "relu"]


@dataclass(frozen=True, eq=False, kw_only=True)
class Combine(Op):
    """Two values entry by entry, or one alone, and then an activation.

    Attributes:
        how: the function of two entries; FIRST for one value.
    """

    how: Combination

    kind: ClassVar[Kind] = Kind.COMBINE
    fuses: ClassVar[bool] = True

    def parameters(self, packer: Packer) -> Parameters:
        """Returns the function."""
        del packer
        return Parameters({"how": self.how})


@dataclass(frozen=True, eq=False, kw_only=True)
class Scale(Op):
    """Planes times one computed factor per channel: the source times `other`."""

    source: Planes
    out: Planes
    other: Flat

    kind: ClassVar[Kind] = Kind.SCALE
    fuses: ClassVar[bool] = True


def activation(function: Activation, fields: dict[str, str] | None = None, **defaults: float) -> Rule:
    """Returns the rule of an activation.

    Args:
        function: the activation.
        fields: by attribute of the operator, the field of `Activate` that it sets.
        defaults: values of the attributes where a node has none.
    """

    def rule(low: Lowering, node: Node, **attributes: float) -> Lowered | None:
        if attributes.keys() - defaults.keys():
            return None  # a later version of the standard, or a damaged file: the reference decides
        parameters = {**defaults, **attributes}
        names = fields or {}
        return _activate(low, node, Activate(function, **{names[k]: float(v) for k, v in parameters.items()}))

    return rule


def relu(low: Lowering, node: Node) -> Lowered | None:
    """Lowers max(x, 0)."""
    return _activate(low, node, Activate(Activation.CLIP, low=0.0))


def clip(low: Lowering, node: Node) -> Lowered | None:
    """Lowers a clip with known limits."""
    limits = []
    for name, default in zip((*node.inputs[1:], "", "")[:2], (-math.inf, math.inf), strict=True):
        if name and name not in low.constants:
            return None
        limits.append(float(low.constants.dense(name).item()) if name else default)
    least, most = limits
    return _activate(low, node, Activate(Activation.CLIP, low=least, high=most))


def gelu(low: Lowering, node: Node, *, approximate: str = "none") -> Lowered | None:
    """Lowers GELU, exact or by tanh."""
    functions = {"none": Activation.GELU, "tanh": Activation.GELU_TANH}
    return _activate(low, node, Activate(functions[approximate]))


def _activate(low: Lowering, node: Node, activate: Activate) -> Lowered | None:
    """Lowers an activation: as part of the op that makes the value, or as an op of its own."""
    name = node.inputs[0]
    value = low.value(name)
    if value is None or any(isinstance(x, float) and math.isnan(x) for x in dataclasses.astuple(activate)):
        return None
    maker = low.segment.maker(value)
    # Applied where the entries are in registers or in the cache, instead of reading and writing them once more.
    if maker is not None and maker.fuses and maker.activate == IDENTITY and low.only_reader(name):
        low.segment.replace(maker, dataclasses.replace(maker, activate=activate))
    else:
        source = _whole_vectors(low, name)
        value = _new_like(low, source, low.shapes[name])
        low.add(Combine(source=source, out=value, how=Combination.FIRST, activate=activate))
    if isinstance(value, Planes):
        value.nonnegative = activate.nonnegative
    return Lowered(value, low.shapes[name])


def _whole_vectors(low: Lowering, name: str) -> Value:
    """Returns a value that may be read and written in whole vectors; as planes if it has pixels."""
    value = low.values[name] if name in low.values else low.array(name)
    if isinstance(value, Planes):
        return value
    shape = low.shapes[name]
    if len(shape) == 4 and math.prod(shape[2:]) > 1:
        planes = low.planes(name)
        if planes is not None:
            return planes
    if value in low.segment.inputs.values():
        # Arrays of the caller end where they end.
        copy = low.new_flat(shape)
        low.add(Copy(source=value, out=copy))
        low.values[name] = value = copy
    return value


def _new_like(low: Lowering, value: Value, shape: tuple[int, ...]) -> Value:
    """Returns a new value in the layout of another one."""
    if isinstance(value, Rows):
        return Rows(value.shape, value.grid, 1)
    return Planes(shape, value.grid, value.factor) if isinstance(value, Planes) else low.new_flat(shape)


_FLOAT = np.finfo(np.float32)

_ARITHMETIC = {
    "Add": Combination.ADD,
    "Div": Combination.DIVIDE,
    "Mul": Combination.MULTIPLY,
    "Sub": Combination.SUBTRACT,
}


def arithmetic(low: Lowering, node: Node) -> Lowered | None:
    """Lowers a sum, difference, product or quotient of two values; a sum becomes part of the op that makes one."""
    first, second = node.inputs
    how = _ARITHMETIC[node.op]
    for name, known in ((first, second), (second, first)):
        if known in low.constants and name in low.shapes:
            return _with_known(low, node, name, known) or broadcast(low, node, how)
    shape = low.shapes.get(first)
    # x + x is none for the ops below, since a product cannot start from its own result.
    if shape is None or low.shapes.get(second) != shape or first == second:
        scaled = _scale(low, node) if how is Combination.MULTIPLY else None
        return scaled or broadcast(low, node, how)
    if low.value(first) is None or low.value(second) is None:
        return None
    a, b = _whole_vectors(low, first), _whole_vectors(low, second)
    if isinstance(a, Rows) or isinstance(b, Rows):
        # A transformer adds a residual whose one side may still be entries in order.
        rows = low.rows(first), low.rows(second)
        if rows[0] is None or rows[1] is None:
            return None
        a, b = rows[0], rows[1]
    if how is Combination.ADD:
        for value, other, name in ((a, b, first), (b, a, second)):
            maker = low.segment.maker(value)
            if maker is not None and _can_start_from(low, maker, other, name):
                low.segment.replace(maker, dataclasses.replace(maker, other=other))
                return Lowered(value, shape)
    if isinstance(a, Planes) and isinstance(b, Planes) and not same_layout(a, b):
        # Branches with different strides may lie on different grids.
        b = low.on_grid(b, a.grid, a.factor)
    if not same_layout(a, b):
        return broadcast(low, node, how)
    return Lowered(low.add(Combine(source=a, out=_new_like(low, a, shape), other=b, how=how)), shape)


def _with_known(low: Lowering, node: Node, name: str, known: str) -> Lowered | None:
    """Lowers arithmetic with a known array as part of an op that is there, or as factors and summands of channels."""
    lowered = None
    if node.op == "Add":
        lowered = add_bias(low, name, known) or add_to_product(low, name, known)
    value, array = low.values.get(name), low.constants.dense(known)
    if isinstance(value, Picked) and array.size == 1 and array.ndim <= len(low.shapes[name]):
        # Whoever reads the entries multiplies them by the number.
        factor = array.item() if node.op == "Mul" else 1 / array.item() if node.op == "Div" and array.item() else 0.0
        # As one float32, with those before it; other numbers would overflow or lose bits.
        normal = _FLOAT.tiny <= abs(value.factor * factor) <= _FLOAT.max
        if normal and known in node.inputs[0 if node.op == "Mul" else 1 :]:
            return Lowered(value.times(factor), low.shapes[name])
    return lowered or by_channel(low, node, name, known)


def _can_start_from(low: Lowering, maker: Op, residual: Value, name: str) -> bool:
    """Returns whether the sums of a product can start from a residual instead of zero."""
    return (
        isinstance(maker, Spmm | Gemv)
        and maker.activate == IDENTITY
        and maker.other is None
        and low.only_reader(name)
        and same_layout(maker.out, residual)
        # The residual must be there when the product starts.
        and low.segment.is_made_before(residual, maker)
    )


def _scale(low: Lowering, node: Node) -> Lowered | None:
    """Lowers the product of planes and one computed factor per channel."""
    first, second = node.inputs
    shapes = low.shapes.get(first, ()), low.shapes.get(second, ())
    if len(shapes[0]) != 4 or len(shapes[1]) != 4 or shapes[0][:2] != shapes[1][:2]:
        return None
    if shapes[0][2:] == (1, 1):
        first, second, shapes = second, first, shapes[::-1]
    if shapes[1][2:] != (1, 1):
        return None
    planes, factors = low.planes(first), low.flat(second)
    if planes is None or factors is None:
        return None
    out = Planes(shapes[0], planes.grid, planes.factor)
    return Lowered(low.add(Scale(source=planes, out=out, other=factors)), shapes[0])
