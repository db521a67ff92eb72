"""Lowering rules of operators that change a shape and move nothing."""

from __future__ import annotations

import math
import operator

from dsr_tool.graph.ir import Node
from dsr_tool.graph.limits import int_list
from dsr_tool.runtime.compiler.layouts import Rows
from dsr_tool.runtime.compiler.lowering import Lowered, Lowering

__all__ = ["flatten", "reshape", "transpose"]


def flatten(low: Lowering, node: Node, *, axis: int = 1) -> Lowered | None:
    """Lowers a change to two axes."""
    shape = low.shapes.get(node.inputs[0], ())
    return _view(low, node.inputs[0], (math.prod(shape[:axis]), math.prod(shape[axis:])))


def reshape(low: Lowering, node: Node, *, allowzero: int = 0) -> Lowered | None:
    """Lowers a change to a known shape."""
    shape, wanted = low.shapes.get(node.inputs[0], ()), node.inputs[1]
    if not shape or wanted not in low.constants:
        return None
    sizes = [operator.index(size) for size in int_list(low.constants.dense(wanted))]
    if not allowzero:
        # A zero stands for the size of that axis, -1 for whatever is left.
        sizes = [shape[i] if size == 0 else size for i, size in enumerate(sizes)]
    if -1 in sizes:
        rest = -math.prod(sizes)
        sizes = [math.prod(shape) // rest if size == -1 else size for size in sizes]
    return _view(low, node.inputs[0], tuple(sizes))


def _view(low: Lowering, name: str, wanted: tuple[int, ...]) -> Lowered | None:
    """Lowers a value of another shape with the same entries in the same order."""
    shape = low.shapes.get(name, ())
    if (
        not shape
        or min(wanted, default=0) < 0
        or (low.batch > 1 and wanted[:1] != shape[:1])
        or math.prod(wanted) != math.prod(shape)
        # The view aliases its input, so refuse it if anything else reads the input: later ops are fused in place.
        or not low.only_reader(name)
    ):
        return None
    rows = low.values.get(name)
    if isinstance(rows, Rows) and wanted[-1:] == shape[-1:]:
        return Lowered(rows, wanted)
    value = low.flat(name)
    return None if value is None else Lowered(value, wanted)


def transpose(low: Lowering, node: Node, *, perm: tuple[int, ...] = ()) -> Lowered | None:
    """Lowers a permutation that moves axes of one entry alone, so that entries keep their order."""
    name = node.inputs[0]
    shape, value = low.shapes.get(name, ()), low.values.get(name)
    if not perm or sorted(perm) != list(range(len(shape))) or not low.only_reader(name):
        return None
    order = [axis for axis in perm if shape[axis] > 1]
    wanted = tuple(shape[axis] for axis in perm)
    # Values of rows alone know no other axes than rows and features.
    if order != sorted(order) or not isinstance(value, Rows) or wanted[-1] != shape[-1] or low.batch != 1:
        return None
    return Lowered(value, wanted)
