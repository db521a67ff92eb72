"""MATMUL: products of two computed matrices."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import numpy.typing as npt

from dsr_tool.graph.ir import Node
from dsr_tool.runtime.compiler.layouts import Flat
from dsr_tool.runtime.compiler.lowering import Lowered, Lowering
from dsr_tool.runtime.compiler.op import Op, Parameters
from dsr_tool.runtime.compiler.packing import Packer
from dsr_tool.runtime.compiler.picked import Picked
from dsr_tool.runtime.kernels.ops import Kind
from dsr_tool.sparsity.tensor import Array

__all__ = ["Matmul", "add_to_product", "einsum", "multiply"]

_Int = npt.NDArray[np.int64]


@dataclass(frozen=True, eq=False, kw_only=True)
class Matmul(Op):
    """Products of two computed matrices.

    Attributes:
        left: shape (..., rows, depth), a part of the source.
        right: shape (..., depth, columns), a part of `other`.
        addend: added to the results, shape (products of its own, rows, columns); None for nothing.
        addend_of: the one of these for each product.
    """

    out: Flat
    left: Picked
    right: Picked
    addend: Array | None = None
    addend_of: tuple[int, ...] = ()

    kind: ClassVar[Kind] = Kind.MATMUL
    exact: ClassVar[bool] = True

    def parameters(self, packer: Packer) -> Parameters:
        """Returns the tables of both matrices."""
        del packer
        batches, (rows, depth), columns = math.prod(self.left.shape[:-2]), self.left.shape[-2:], self.right.shape[-1]
        source_rows, source_depth = _tables(self.left)
        other_depth, other_columns = _tables(self.right)
        addend, addend_batch = self.addend, np.array(self.addend_of, np.int64) * (rows * columns)
        return Parameters(
            {
                "batches": batches,
                "rows": rows,
                "columns": columns,
                "depth": depth,
                "source_rows": source_rows,
                "source_rows_step": rows if source_rows.size > rows else 0,
                "source_depth": source_depth,
                "source_depth_step": depth if source_depth.size > depth else 0,
                "other_depth": other_depth,
                "other_depth_step": depth if other_depth.size > depth else 0,
                "other_columns": other_columns,
                "other_columns_step": columns if other_columns.size > columns else 0,
                "source_factor": self.left.factor,
                "other_factor": self.right.factor,
                "addend": 0 if addend is None else np.ascontiguousarray(addend, np.float32),
                "addend_count": 0 if addend is None else addend.size,
                "addend_batch": 0 if addend is None else addend_batch,
            }
        )


def _divided(matrix: Picked) -> int | None:
    """Returns the one of the last two axes, 0 or 1, whose table depends on the product; None if there is none."""
    rank = len(matrix.shape)
    for axis in (0, 1):
        if matrix.divides((*range(rank - 2), rank - 2 + axis)):
            return axis
    return None


def _tables(matrix: Picked) -> tuple[_Int, _Int]:
    """Returns the distances to rows, and from there to columns; of each product, or of all alike."""
    rank, axis = len(matrix.shape), _divided(matrix)
    axes = [[rank - 2], [rank - 1]]
    axes[axis or 0] = [*range(rank - 2), *axes[axis or 0]]
    rows, columns = (matrix.floats(part, first=part is axes[axis or 0]).reshape(-1) for part in axes)
    return np.ascontiguousarray(rows), np.ascontiguousarray(columns)


def multiply(low: Lowering, node: Node) -> Lowered | None:
    """Lowers a product of two matrices that a linear layer's kernel does not compute, such as two computed ones."""
    matrices = [low.picked(name) for name in node.inputs]
    left, right = matrices
    if left is None or right is None or min(len(left.shape), len(right.shape)) < 2 or low.batch > 1:
        return None
    batch = np.broadcast_shapes(left.shape[:-2], right.shape[:-2])
    return _product(low, left, right, batch, (*batch, left.shape[-2], right.shape[-1]))


def _product(
    low: Lowering, left: Picked, right: Picked, batch: tuple[int, ...], shape: tuple[int, ...]
) -> Lowered | None:
    if left.shape[-1] != right.shape[-2] or not math.prod(shape) or not left.shape[-1]:
        return None
    sides = []
    for side in (left, right):
        wide = side.expanded((*batch, *side.shape[-2:]))
        # A side is moved first if places do not divide into rows and columns, or entries are no part of a value.
        if wide is None or wide.partial or _divided(wide) is None:
            wide = low.gathered(side).expanded((*batch, *side.shape[-2:]))
        if wide is None or _divided(wide) is None:
            return None
        sides.append(wide)
    op = Matmul(source=sides[0].base, other=sides[1].base, out=low.new_flat(shape), left=sides[0], right=sides[1])
    return Lowered(low.add(op), shape)


def einsum(low: Lowering, node: Node, *, equation: str) -> Lowered | None:
    """Lowers a sum of products over one label of two computed values; other labels are of one value or of both."""
    terms, arrow, result = equation.replace(" ", "").partition("->")
    labels = terms.split(",")
    values = [low.picked(name) for name in node.inputs]
    if not arrow or len(labels) != 2 or len(values) != 2 or low.batch > 1:
        return None
    left, right = values
    if left is None or right is None or not all(part.isalpha() for part in (*labels, result)):
        return None
    if any(len(set(part)) != len(part) for part in (*labels, result)):
        return None
    sizes = dict(zip(labels[0], left.shape, strict=True)) | dict(zip(labels[1], right.shape, strict=True))
    both = [label for label in labels[0] if label in labels[1]]
    batch = [label for label in both if label in result]
    summed = [label for label in both if label not in result]
    rows = [label for label in labels[0] if label not in both]
    columns = [label for label in labels[1] if label not in both]
    if len(summed) != 1 or len(rows) != 1 or len(columns) != 1 or set(result) != {*batch, *rows, *columns}:
        return None
    if any(sizes[label] != size for label, size in zip(labels[0], left.shape, strict=True)):
        return None
    made = [*batch, *rows, *columns]
    shape = tuple(sizes[label] for label in batch)
    product = _product(
        low,
        left.transposed([labels[0].index(label) for label in (*batch, *rows, *summed)]),
        right.transposed([labels[1].index(label) for label in (*batch, *summed, *columns)]),
        shape,
        (*shape, sizes[rows[0]], sizes[columns[0]]),
    )
    if product is None or made == list(result):
        return product
    order = [made.index(label) for label in result]
    value = Picked.of(product.value, product.shape).transposed(order)
    return Lowered(value, tuple(sizes[label] for label in result))


def add_to_product(low: Lowering, name: str, known: str) -> Lowered | None:
    """Lowers the sum of a product and a known array, which becomes a part of the product."""
    value, shape = low.values.get(name), low.shapes.get(name, ())
    maker = None if value is None else low.segment.maker(value)
    addend = low.constants.dense(known)
    if not isinstance(maker, Matmul) or maker.addend is not None or not low.only_reader(name):
        return None
    if addend.dtype != np.float32 or len(shape) < 2 or np.broadcast_shapes(addend.shape, shape) != shape:
        return None
    # The value may have been reshaped since; its rows and columns must be those of the product.
    rows, columns = shape[-2:]
    if (rows, columns) != (maker.left.shape[-2], maker.right.shape[-1]):
        return None
    wide = addend.reshape((1,) * (len(shape) - addend.ndim) + addend.shape)
    wide = np.broadcast_to(wide, (*wide.shape[:-2], rows, columns))
    count = math.prod(wide.shape[:-2])
    numbers = np.broadcast_to(np.arange(count).reshape(wide.shape[:-2]), shape[:-2]).reshape(-1)
    low.segment.replace(
        maker,
        dataclasses.replace(maker, addend=wide.reshape(count, rows, columns), addend_of=tuple(numbers.tolist())),
    )
    return Lowered(maker.out, shape)
