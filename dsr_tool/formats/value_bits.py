"""Bits of values: how many a code of single symbols needs, and how many fewer rounding would leave."""

from __future__ import annotations

import numpy as np

from dsr_tool.sparsity.grid import GridTensor
from dsr_tool.sparsity.tensor import Array, SparseTensor

__all__ = ["entropy_bits"]

_FEW = 4
"""A tensor has few distinct values if each stands for this many entries on average; then they are the symbols."""


def entropy_bits(tensor: SparseTensor) -> float:
    """Returns the fewest bits of all values of a tensor by any code that takes one symbol at a time.

    Symbols are the codes of a grid, the values themselves if few are distinct (a table of them is not counted), and
    else each byte of a value on its own, as files code them: sign and exponent are told apart from the mantissa.
    """
    if isinstance(tensor, GridTensor):
        return _entropy(tensor.codes.view(np.uint8))
    values = np.ascontiguousarray(tensor.values)
    bits = values.view(f"u{values.itemsize}")
    counts = np.unique(bits, return_counts=True)[1]
    if len(counts) * _FEW <= len(bits):
        return _bits_of(counts)
    # As byte planes have it: the exponent lies in one byte once the sign went to the other end.
    rotated = (bits << 1) | (bits >> (8 * values.itemsize - 1))
    planes = rotated.view(np.uint8).reshape(-1, values.itemsize)
    return sum(_entropy(planes[:, i]) for i in range(values.itemsize))


def _entropy(symbols: Array) -> float:
    return _bits_of(np.bincount(symbols, minlength=1))


def _bits_of(counts: Array) -> float:
    counts = counts[counts > 0].astype(np.float64)
    return float(-(counts * np.log2(counts / counts.sum())).sum()) if len(counts) else 0.0
