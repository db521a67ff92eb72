"""Lowering rules of operators that change a shape alone."""

from __future__ import annotations

import math
import operator

from dsr_tool.graph.axes import axes_of, axis_of
from dsr_tool.graph.ir import Node
from dsr_tool.graph.limits import int_list
from dsr_tool.runtime.compiler.layouts import Flat, Rows
from dsr_tool.runtime.compiler.lowering import Lowered, Lowering

__all__ = ["flatten", "identity", "reshape", "squeeze", "unsqueeze"]


def flatten(low: Lowering, node: Node, *, axis: int = 1) -> Lowered | None:
    """Lowers a change to two axes."""
    shape = low.shapes.get(node.inputs[0], ())
    axis = axis if axis == len(shape) else axis_of(axis, len(shape))
    return _view(low, node.inputs[0], (math.prod(shape[:axis]), math.prod(shape[axis:])))


def identity(low: Lowering, node: Node, *, seed: int = 0) -> Lowered | None:
    """Lowers a value under another name. A Dropout that trains, or may train, is declined."""
    del seed  # concerns a Dropout that trains
    training = node.inputs[2] if len(node.inputs) > 2 else ""
    if training and (training not in low.constants or low.constants.dense(training).any()):
        return None
    name = node.inputs[0]
    # An alias, as of a view: where the input is read elsewhere, entries are picked.
    value = low.value(name) if low.only_reader(name) else low.picked(name)
    return None if value is None else Lowered(value, low.shapes[name])


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


def squeeze(low: Lowering, node: Node) -> Lowered | None:
    """Lowers the removal of axes of size one."""
    shape = low.shapes.get(node.inputs[0], ())
    if len(node.inputs) > 1 and node.inputs[1]:
        axes = axes_of(int_list(low.constants.dense(node.inputs[1])), len(shape))
    else:
        axes = [axis for axis, size in enumerate(shape) if size == 1]
    if any(shape[axis] != 1 for axis in axes):
        return None
    return _view(low, node.inputs[0], tuple(size for axis, size in enumerate(shape) if axis not in axes))


def unsqueeze(low: Lowering, node: Node) -> Lowered | None:
    """Lowers new axes of size one."""
    shape = low.shapes.get(node.inputs[0], ())
    wanted = int_list(low.constants.dense(node.inputs[1]))
    rank = len(shape) + len(wanted)
    axes = axes_of(wanted, rank)
    sizes = iter(shape)
    return _view(low, node.inputs[0], tuple(1 if axis in axes else next(sizes) for axis in range(rank)))


def _view(low: Lowering, name: str, wanted: tuple[int, ...]) -> Lowered | None:
    """Lowers a value of another shape with the same entries in the same order."""
    shape = low.shapes.get(name, ())
    if (
        not shape
        or min(wanted, default=0) < 0
        or (low.batch > 1 and wanted[:1] != shape[:1])
        or math.prod(wanted) != math.prod(shape)
    ):
        return None
    value = low.values.get(name)
    # A view aliases its input. Where that is read elsewhere, entries are picked: later ops are fused in place.
    if low.only_reader(name) and (isinstance(value, Flat) or (isinstance(value, Rows) and wanted[-1:] == shape[-1:])):
        return Lowered(value, wanted)
    picked = low.picked(name)
    changed = None if picked is None else picked.reshaped(low.piece(wanted))
    if changed is None and (flat := low.flat(name)) is not None:
        if low.only_reader(name):
            return Lowered(flat, wanted)
        # Its tables would be too large, or mix channels and pixels; in order it is the same entries.
        low.values[name] = flat
        picked = low.picked(name)
        changed = None if picked is None else picked.reshaped(low.piece(wanted))
    return None if changed is None else Lowered(changed, wanted)
