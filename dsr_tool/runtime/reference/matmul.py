"""Matrix products: with a known weight, sparse if that is faster, and of two computed arrays."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from dsr_tool.graph.limits import claim
from dsr_tool.runtime.reference import NumpyFunction
from dsr_tool.runtime.reference.matrices import Multiply, multiplier
from dsr_tool.sparsity.tensor import Array, Weight, dense

__all__ = ["FUNCTIONS", "prepare_gemm", "prepare_matmul"]


def prepare_matmul(weight: Weight) -> Multiply:
    """Returns the product x @ weight as a function of x, shape (..., columns).

    Args:
        weight: shape (columns, rows), or any shape that `np.matmul` accepts.
    """
    array = dense(weight)
    if array.ndim != 2:
        return lambda x: _matmul(x, array)
    # x @ W is computed as (Wᵀ @ xᵀ)ᵀ because scipy's CSR product has the sparse matrix on the left.
    multiply = multiplier(array.T)

    def run(x: Array) -> Array:
        rows = x.reshape(-1, x.shape[-1])
        return np.reshape(multiply(rows.T).T, (*x.shape[:-1], -1))

    return run


def prepare_gemm(
    weight: Weight,
    bias: Weight | None = None,
    *,
    alpha: float = 1.0,
    beta: float = 1.0,
    transA: int = 0,  # noqa: N803 - the standard's name
    transB: int = 0,  # noqa: N803
) -> Multiply:
    """Returns alpha * x @ weight + beta * bias as a function of x, shape (batch, columns).

    Args:
        weight: shape (columns, rows), or (rows, columns) with `transB`.
        bias: any shape that broadcasts to (batch, rows).
        alpha: factor of the product.
        beta: factor of the bias.
        transA: 1 if x has shape (columns, batch).
        transB: 1 if the weight has shape (rows, columns), as torch stores it.
    """
    multiply = multiplier(weight if transB else dense(weight).T)
    addend = None if bias is None else dense(bias) * beta

    def run(x: Array) -> Array:
        result: Array = multiply(x if transA else x.T).T
        if alpha != 1.0:
            result *= alpha
        if addend is not None:
            result += addend
        return result

    return run


def _matmul(a: Array, b: Array) -> Array:
    claim((*np.broadcast_shapes(a.shape[:-2], b.shape[:-2]), *a.shape[-2:-1], *b.shape[-1:]), a.dtype)
    result: Array = np.matmul(_for_blas(a), _for_blas(b))
    return result


def _for_blas(x: Array) -> Array:
    """Returns `x`, or a contiguous copy if neither of its last two axes is contiguous.

    BLAS needs one of them to be; without it, numpy falls back to a slow loop of its own.
    """
    return x if x.itemsize in x.strides[-2:] else np.ascontiguousarray(x)


def _gemm(
    a: Array,
    b: Array,
    c: Array | None = None,
    *,
    alpha: float = 1.0,
    beta: float = 1.0,
    transA: int = 0,  # noqa: N803
    transB: int = 0,  # noqa: N803
) -> Array:
    # Factors in the type of the matrices: a float64 array would turn the product into float64.
    result: Array = np.asarray(alpha, a.dtype) * _matmul(a.T if transA else a, b.T if transB else b)
    if c is None:
        return result
    claim(np.broadcast_shapes(result.shape, c.shape), a.dtype)
    return np.asarray(result + np.asarray(beta, a.dtype) * c)


def _einsum(*arrays: Array, equation: str) -> Array:
    claim(_einsum_shape(arrays, equation), arrays[0].dtype)
    # With optimize, operands are contracted in pairs and by BLAS, not in one loop over all labels.
    result: Array = np.einsum(equation, *arrays, optimize=True)
    return result


def _einsum_shape(arrays: Sequence[Array], equation: str) -> list[int]:
    """Returns the shape of the result; for an equation with an implicit output, the sizes of all arrays instead."""
    terms, _, out = equation.replace(" ", "").partition("->")
    # Without an output, or with an ellipsis, the sizes are only bounded, and that is enough for a limit.
    if not out.isalpha():
        return [array.size for array in arrays]
    sizes: dict[str, int] = {}
    for term, array in zip(terms.split(","), arrays, strict=True):
        sizes.update(zip(term, array.shape, strict=True))
    return [sizes[label] for label in out]


FUNCTIONS: dict[str, NumpyFunction] = {"Einsum": _einsum, "Gemm": _gemm, "MatMul": _matmul}
