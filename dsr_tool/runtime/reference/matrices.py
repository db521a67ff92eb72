"""Weights as matrices that multiply from the left: CSR if that is faster than BLAS, else dense."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeAlias

import numpy as np
import scipy.sparse

from dsr_tool.graph.limits import claim
from dsr_tool.sparsity.layers import matrix_shape
from dsr_tool.sparsity.mask import Mask
from dsr_tool.sparsity.tensor import Array, SparseTensor, Weight, dense

__all__ = ["MAX_CSR_DENSITY", "Multiply", "multiplier"]

Multiply: TypeAlias = Callable[[Array], Array]
"""An operator with its weights bound, as a function of its input."""

MAX_CSR_DENSITY = 0.2
"""Density up to which a weight is multiplied as CSR. Measured on AVX-512 cores at the layer shapes of ResNet-50 and
ViT-B: one thread of scipy's CSR product does 15 to 26 GFLOP/s of non-zero work, OpenBLAS 105 to 120 GFLOP/s of all
work, so they are equally fast at a density of 0.14 to 0.22."""


def multiplier(weight: Weight, groups: int = 1) -> Multiply:
    """Returns the function x -> W @ x, with W the weight as a matrix.

    Args:
        weight: shape (rows, ...); as a matrix (rows, columns), columns being the product of the other sizes.
        groups: number of blocks of the block-diagonal matrix W, each of rows / groups rows.

    Returns:
        A function of an array (groups * columns, n) that returns a new array (rows, n).
    """
    if not isinstance(weight, SparseTensor):
        density = np.count_nonzero(weight) / max(weight.size, 1)
        if density <= MAX_CSR_DENSITY:
            return _sparse(SparseTensor.from_dense(weight, Mask.from_bool(weight != 0)), groups)
    elif weight.mask.density <= MAX_CSR_DENSITY:
        return _sparse(weight, groups)
    return _dense(dense(weight), groups)


def _sparse(weight: SparseTensor, groups: int) -> Multiply:
    rows, columns = matrix_shape(weight.mask.shape)
    row, column = np.divmod(weight.mask.positions, max(columns, 1))
    claim((rows + 1,), np.int32)  # a weight without columns may claim any number of rows
    indptr = np.zeros(rows + 1, np.int32)
    np.cumsum(np.bincount(row, minlength=rows), out=indptr[1:])
    # One product with the block-diagonal matrix needs no loop over groups.
    column += row // max(rows // groups, 1) * columns
    parts = (weight.values, column.astype(np.int32), indptr)
    matrix = scipy.sparse.csr_array(parts, shape=(rows, groups * columns))
    matrix.check_format(full_check=True)  # scipy does not check indices when it multiplies

    def multiply(x: Array) -> Array:
        claim((rows, *x.shape[1:]), x.dtype)
        product: Array = matrix @ np.ascontiguousarray(x)
        return product

    return multiply


def _dense(weight: Array, groups: int) -> Multiply:
    rows, columns = matrix_shape(weight.shape)
    blocks = weight.reshape(groups, rows // groups, columns)

    def multiply(x: Array) -> Array:
        claim((rows, x.size // max(groups * columns, 1)), x.dtype)
        product: Array = blocks @ x.reshape(groups, columns, -1)
        return product.reshape(rows, -1)

    return multiply
