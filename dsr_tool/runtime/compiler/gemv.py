"""GEMV: weights times one vector."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from dsr_tool.runtime.compiler.constants import as_sparse, entries_of, reshaped, shape_of
from dsr_tool.runtime.compiler.layouts import Flat
from dsr_tool.runtime.compiler.lowering import Lowered, Lowering
from dsr_tool.runtime.compiler.op import Op, Parameters
from dsr_tool.runtime.compiler.packing import Packer, Recipe, Taps
from dsr_tool.runtime.kernels.ops import Kind, Packing
from dsr_tool.sparsity.tensor import Array, SparseTensor, Weight, dense

__all__ = ["Gemv", "lower_gemv"]

BLOCK_SHARE = 2 / 3
"""Bytes of the input per block, as a share of the first-level cache: 32 KiB of 48."""
MIN_DENSE = 0.4
"""Density from which a plain dot product with the zeros is faster than one that looks up its inputs."""


@dataclass(frozen=True, eq=False, kw_only=True)
class Gemv(Op):
    """A linear layer on one row.

    Attributes:
        weight: shape (rows, columns).
        bias: shape (rows,).
        threads: number of threads that share the rows.
        block: floats of the input per block.
    """

    source: Flat
    out: Flat
    weight: SparseTensor
    bias: Array
    threads: int
    block: int

    kind: ClassVar[Kind] = Kind.GEMV
    fuses: ClassVar[bool] = True
    exact: ClassVar[bool] = True

    @property
    def multiply_adds(self) -> int:
        """Multiply-adds of its active weights, for one image."""
        return self.weight.mask.active

    @property
    def density(self) -> float:
        """Density of the weight."""
        return self.weight.mask.density

    def parameters(self, packer: Packer) -> Parameters:
        """Returns the packed weight and the bias."""
        entries, scales = entries_of(self.weight)
        recipe = Recipe(
            packing=Packing.ROWS if self.weight.mask.density > MIN_DENSE else Packing.SPARSE,
            weight=entries,
            # A matrix is packed as a convolution whose pixels are single floats: one tap, and one float per channel.
            taps=Taps(((0,),), 1),
            per_block=self.block,
            split=self.threads,
        )
        # Weights of one row are few, and packed anew for each plan.
        pack = packer.pack(recipe)
        fields = {"part_count": len(pack.parts), "rows": len(self.bias), "scales": 0 if scales is None else scales}
        return Parameters({**pack.fields, **fields, "bias": np.ascontiguousarray(self.bias, np.float32)}, pack)


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
        block=int(BLOCK_SHARE * low.target.l1_bytes) // 4,
    )
    return Lowered(low.add(op), shape)
