"""Lowering rules of factors and summands that belong to channels and are known: a product with one weight for each."""

from __future__ import annotations

import numpy as np

from dsr_tool.graph.ir import Node
from dsr_tool.runtime.compiler.constants import is_packable, shape_of
from dsr_tool.runtime.compiler.layouts import Planes, Rows
from dsr_tool.runtime.compiler.lowering import Lowered, Lowering
from dsr_tool.runtime.compiler.spmm import Spmm
from dsr_tool.runtime.compiler.taps import POINT
from dsr_tool.sparsity.mask import Mask
from dsr_tool.sparsity.tensor import Array, SparseTensor, dense

__all__ = ["batch_norm", "by_channel"]


def batch_norm(
    low: Lowering, node: Node, *, epsilon: float = 1e-5, training_mode: int = 0, **_: object
) -> Lowered | None:
    """Lowers a normalisation by known statistics that could not become part of a convolution."""
    name, *vectors = node.inputs
    shape = low.shapes.get(name, ())
    known = [low.constants.get(vector) for vector in vectors]
    if training_mode or len(shape) != 4:
        return None
    if any(value is None or shape_of(value) != shape[1:2] or not is_packable(value) for value in known):
        return None
    scale, bias, mean, variance = (dense(value) for value in known if value is not None)
    factor = scale / np.sqrt(variance + np.float32(epsilon))
    planes = low.planes(name)
    if planes is None:
        return None
    return Lowered(scaled(low, planes, factor, bias - mean * factor, (node.op, node.outputs[0])), shape)


def by_channel(low: Lowering, node: Node, name: str, known: str) -> Lowered | None:
    """Lowers the sum, difference, product or quotient of planes and a known number, or one for each channel."""
    shape, array = low.shapes.get(name, ()), low.constants.dense(known)
    value = low.value(name)
    if not isinstance(value, Planes) or array.dtype != np.float32 or np.broadcast_shapes(shape, array.shape) != shape:
        return None
    axis = len(shape) - 1 if isinstance(value, Rows) else 1
    wide = array.reshape((1,) * (len(shape) - array.ndim) + array.shape)
    if any(wide.shape[i] > 1 and i != axis for i in range(wide.ndim)):
        return None
    vector = np.broadcast_to(wide.reshape(-1), shape[axis : axis + 1]).astype(np.float32)
    ones, zeros = np.ones_like(vector), np.zeros_like(vector)
    first = node.inputs[0] == name
    forms: dict[tuple[str, bool], tuple[Array, Array]] = {
        ("Add", True): (ones, vector),
        ("Add", False): (ones, vector),
        ("Mul", True): (vector, zeros),
        ("Mul", False): (vector, zeros),
        ("Sub", True): (ones, -vector),
        ("Sub", False): (-ones, vector),
        ("Div", True): (1 / vector, zeros),
    }
    factor, shift = forms.get((node.op, first), (ones, zeros))
    # A quotient may be a number where the reciprocal is none.
    if (node.op, first) not in forms or (node.op == "Div" and not np.isfinite(factor).all()):
        return None
    return Lowered(scaled(low, value, factor, shift, (node.op, node.outputs[0])), shape)


def scaled(low: Lowering, source: Planes, factor: Array, shift: Array, name: tuple[str, str]) -> Planes:
    """Returns planes times a factor for each channel, plus a summand for each.

    Args:
        low: the lowering.
        source: the planes.
        factor: shape (channels,).
        shift: shape (channels,).
        name: operator and name of the result, under which the packed factors are kept.
    """
    shape = (source.channels, 1, 1, 1)
    out: Planes = (
        Rows(source.shape, source.grid, 1)
        if isinstance(source, Rows)
        else Planes(source.shape, source.grid, source.factor)
    )
    weight = SparseTensor(Mask.full(shape), np.ascontiguousarray(factor, np.float32))
    low.add(
        Spmm(
            source=source,
            out=out,
            weight=weight,
            bias=np.ascontiguousarray(shift, np.float32),
            window=POINT,
            groups=source.channels,
            weight_name=name,
            target=low.target,
        )
    )
    return out
