"""GEMV: weights times one vector."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from dsr_tool.runtime.compiler.constants import as_sparse, entries_of, reshaped, shape_of
from dsr_tool.runtime.compiler.layouts import Flat
from dsr_tool.runtime.compiler.lowering import Lowered, Lowering
from dsr_tool.runtime.compiler.op import Op, PackCache, Parameters
from dsr_tool.runtime.compiler.packing import Pack, Taps, checked_positions, pack_sparse
from dsr_tool.runtime.kernels.ops import Kind
from dsr_tool.sparsity.tensor import Array, SparseTensor, Weight, dense

__all__ = ["Gemv", "lower_gemv"]

BLOCK_FLOATS = 8192
"""Floats of the input per block: 32 KiB, about a first-level cache."""
MIN_DENSE = 0.4
"""Density from which a plain dot product with the zeros is faster than one that looks up its inputs."""


@dataclass(frozen=True, eq=False, kw_only=True)
class Gemv(Op):
    """A linear layer on one row.

    Attributes:
        weight: shape (rows, columns).
        bias: shape (rows,).
        threads: number of threads that share the rows.
    """

    source: Flat
    out: Flat
    weight: SparseTensor
    bias: Array
    threads: int

    kind: ClassVar[Kind] = Kind.GEMV
    fuses: ClassVar[bool] = True
    exact: ClassVar[bool] = True

    def parameters(self, packs: PackCache) -> Parameters:
        """Returns the packed weight and the bias."""
        del packs  # weights of one row are few, and packed anew for each plan
        entries, scales = entries_of(self.weight)
        pack = self._pack_dense(entries) if self.weight.mask.density > MIN_DENSE else self._pack_sparse(entries)
        fields = {"part_count": len(pack.parts), "rows": len(self.bias), "scales": 0 if scales is None else scales}
        return Parameters({**pack.fields, **fields, "bias": np.ascontiguousarray(self.bias, np.float32)}, pack)

    def _pack_sparse(self, weight: SparseTensor) -> Pack:
        # A matrix is packed as a convolution whose pixels are single floats: one tap, and one float per input channel.
        kernel = reshaped(weight, (*weight.mask.shape, 1))
        return pack_sparse(kernel, 1, [Taps((0,), 1)], BLOCK_FLOATS, self.threads)

    def _pack_dense(self, weight: SparseTensor) -> Pack:
        """Returns all weights as one block; a row is one entry."""
        checked_positions(weight.mask)
        rows, columns = weight.mask.shape
        entries = np.array([(row, columns) for row in range(rows)], np.int32)
        block, part = (0, 0, 0, 0, rows), (0, 1, 0, 1)
        values = np.ascontiguousarray(dense(weight)).ravel()
        offsets = np.zeros(0, np.uint16)
        return Pack(values, offsets, entries, np.array([block], np.int64), np.array([part], np.int64))


def lower_gemv(low: Lowering, name: str, weight: Weight, bias: Weight | None, shape: tuple[int, ...]) -> Lowered | None:
    """Lowers a product with one vector.

    Args:
        low: the lowering.
        name: the vector.
        weight: shape (rows, columns, ...).
        bias: shape (rows,).
        shape: shape of the result.
    """
    source = low.flat(name)
    if source is None:
        return None
    rows, columns = shape_of(weight)[0], math.prod(shape_of(weight)[1:])
    op = Gemv(
        source=source,
        out=low.new_flat(shape),
        # The weight of a 1 x 1 convolution has two more axes of one entry.
        weight=reshaped(as_sparse(weight), (rows, columns)),
        bias=np.zeros(rows, np.float32) if bias is None else dense(bias),
        threads=low.target.threads,
    )
    return Lowered(low.add(op), shape)
