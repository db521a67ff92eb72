"""Weights times one vector, and what all products share."""

from __future__ import annotations

import math

import numpy as np

from dsr_tool.runtime.compiler.grids import shape_of
from dsr_tool.runtime.compiler.layouts import Flat, Value
from dsr_tool.runtime.compiler.lowering import Lowering
from dsr_tool.runtime.compiler.packing import Pack, Taps, pack_sparse
from dsr_tool.runtime.compiler.segment import Op, address
from dsr_tool.runtime.kernels.ops import Kind, Operation
from dsr_tool.sparsity.mask import Mask
from dsr_tool.sparsity.tensor import Array, SparseTensor, Weight, dense

__all__ = ["mask_of", "one_row", "point_to"]

ROW_FLOATS = 8192
"""Of one vector that a block of work reads."""


def one_row(into: Lowering, name: str, weight: Weight, bias: Weight | None, shape: tuple[int, ...]) -> Value | None:
    """Weights (rows, columns, ...) times one vector, which makes a value of this shape."""
    source = into.flat(name)
    rows, columns = shape_of(weight)[0], math.prod(shape_of(weight)[1:])
    if source is None:
        return None
    out = Flat(shape, into.lanes, into.batch)
    addend = np.zeros(rows, np.float32) if bias is None else dense(bias)
    tensor = weight if isinstance(weight, SparseTensor) else SparseTensor.from_dense(weight, mask_of(weight))

    def finish(struct: Operation, kept: list[object]) -> None:
        flat = SparseTensor(type(tensor.mask)((rows, columns, 1), tensor.mask.stored), tensor.values)
        pack = pack_sparse(flat, 1, [Taps((0,), 1)], ROW_FLOATS, into.split)
        if tensor.mask.density > 0.4:
            pack = Pack(
                dense(flat).ravel(),
                pack.offsets[:0],
                np.array([(r, columns) for r in range(rows)], np.int32),
                np.array([(0, 0, 0, 0, rows)], np.int64),
                np.array([(0, 1, 0, 1)], np.int64),
            )
        point_to(struct, pack, kept)
        struct.channels = rows

    return into.segment.add(Op(Kind.ROWS, source, out, bias=addend, finish=finish))


def point_to(struct: Operation, pack: Pack, kept: list[object]) -> None:
    """Let an operation use a pack."""
    struct.count = len(pack.parts)
    kept.append(pack)
    for name in ("values", "offsets", "entries", "blocks", "parts"):
        setattr(struct, name, address(getattr(pack, name), kept))


def mask_of(array: Array) -> Mask:
    """The mask of what is not zero."""
    return Mask.from_bool(array != 0)
