"""BROADCAST: two values entry by entry, one of which is repeated along some axes."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from dsr_tool.graph.ir import Node
from dsr_tool.runtime.compiler.layouts import Flat, Planes
from dsr_tool.runtime.compiler.lowering import Lowered, Lowering
from dsr_tool.runtime.compiler.op import Op, Parameters
from dsr_tool.runtime.compiler.packing import Packer
from dsr_tool.runtime.compiler.picked import Picked
from dsr_tool.runtime.kernels.ops import Combination, Kind

__all__ = ["Broadcast", "broadcast"]


@dataclass(frozen=True, eq=False, kw_only=True)
class Broadcast(Op):
    """Two values in order.

    Attributes:
        left: the entries of the source, in the shape of the result.
        right: those of `other`.
        split: the first axis of a row.
        how: the function of two entries.
    """

    out: Flat
    left: Picked
    right: Picked
    split: int
    how: Combination

    kind: ClassVar[Kind] = Kind.BROADCAST
    fuses: ClassVar[bool] = True
    exact: ClassVar[bool] = True

    def parameters(self, packer: Packer) -> Parameters:
        """Returns the distances to all rows of both values."""
        del packer
        axes = range(len(self.left.shape))
        rows = [side.floats(axes[: self.split], first=True).reshape(-1) for side in (self.left, self.right)]
        steps = [_step(side, self.split) for side in (self.left, self.right)]
        return Parameters(
            {
                "how": self.how,
                "rows": rows[0].size,
                "columns": math.prod(self.left.shape[self.split :]),
                "source_rows": np.ascontiguousarray(rows[0]),
                "source_step": steps[0] or 0,
                "other_rows": np.ascontiguousarray(rows[1]),
                "other_step": steps[1] or 0,
            }
        )


def broadcast(low: Lowering, node: Node, how: Combination) -> Lowered | None:
    """Lowers a sum, difference, product or quotient of any two values, computed or known."""
    sides = [low.picked(name) for name in node.inputs]
    if sides[0] is None or sides[1] is None:
        return None
    shape = np.broadcast_shapes(sides[0].shape, sides[1].shape)
    # The first axis of each computed value is the batch, so that of a value with fewer axes would meet another axis.
    ranks = {len(low.shapes[name]) for name in node.inputs if name in low.shapes}
    if low.batch > 1 and (ranks != {len(shape)} or shape[0] != 1):
        return None
    wide = [_in_rows(low, side, shape) for side in sides if side is not None]
    left, right = wide
    if left is None or right is None:
        return None
    split = max(_first_axis(left), _first_axis(right))
    whole = (low.batch * shape[0], *shape[1:])
    out = low.new_flat(whole)
    low.add(Broadcast(source=left.base, other=right.base, out=out, left=left, right=right, split=split, how=how))
    return Lowered(out, whole)


def _in_rows(low: Lowering, side: Picked, shape: tuple[int, ...]) -> Picked | None:
    """Returns a value in a wider shape, whose last axis lies together or repeats one entry."""
    wide = side.expanded(shape)
    simple = not isinstance(side.base, Planes) and side.factor == 1 and not side.partial
    if wide is None or not simple or (_first_axis(wide) == len(shape) and shape[-1:] != (1,)):
        wide = low.gathered(side).expanded(shape)
    return wide


def _first_axis(side: Picked) -> int:
    """Returns the first axis from which on entries lie together, or are the same one."""
    rank = len(side.shape)
    return next((axis for axis in range(rank) if _step(side, axis) is not None), rank)


def _step(side: Picked, split: int) -> int | None:
    """Returns the floats from one entry of a row to the next, 0 or 1; None if they lie in another way."""
    inner = range(len(side.shape))[split:]
    if not side.divides(inner):
        return None
    floats = side.floats(inner, first=False).reshape(-1)
    if not floats.any():
        return 0
    return 1 if np.array_equal(floats, np.arange(floats.size)) else None
